"""Runs side by side: what each is, whether its scores differ by more than chance, its curves."""
