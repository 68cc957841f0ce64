"""The built-in model and task, so that `moc` has something to fine-tune without a download.

`world-llama/` is a Hugging Face folder and `world/` holds the rows of a multiple-choice task;
`python -m moc_cli.builtin.pretrain` makes both from `words.py` and `world.py`.
"""
