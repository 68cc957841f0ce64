"""A grid of runs: which there are, how they are trained, and their scores side by side."""
