"""The hosts: unmodified Hugging Face models, and where a control is placed in each family."""
