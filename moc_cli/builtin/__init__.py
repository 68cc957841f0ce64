"""The built-in model and task, so that `moc` has something to fine-tune without a download.

`world-llama/` is a Hugging Face folder and `world/` holds the rows of a task of questions with
options. In the repository `PYTHONPATH=tests python -m builtin.pretrain` makes both.
"""
