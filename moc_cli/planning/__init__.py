"""What a training will take, before it runs: its steps are replayed on a fake device."""
