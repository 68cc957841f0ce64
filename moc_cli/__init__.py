"""`moc`: fine-tune transformers with Mixture-of-Control (arXiv 2606.31397)."""

__version__ = "0.1.0"
