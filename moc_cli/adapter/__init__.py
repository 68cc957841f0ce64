"""An adapter folder: read, checked against a model, written."""
