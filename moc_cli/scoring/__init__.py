"""Scores of examples: likelihoods, generated answers, classes, metrics."""
