"""What the user sees: tables, progress, JSON. No torch."""
