"""What the gate does: recorded routes, their pictures and the words about them."""
