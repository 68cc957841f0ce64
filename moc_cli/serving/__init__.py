"""Text from a run's model: one prompt, many, or a conversation."""
