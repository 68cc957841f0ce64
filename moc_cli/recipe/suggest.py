"""The nearest valid word to a wrong one."""

import difflib
from collections.abc import Iterable

# Words people bring along from elsewhere, and what they are called here.
_KNOWN_AS = {
    "lr": "learning_rate",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "batch": "per_device_train_batch_size",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulation": "gradient_accumulation_steps",
    "clip": "max_grad_norm",
    "scheduler": "lr_scheduler_type",
    "evaluation_strategy": "eval_strategy",
    "recompute": "activation_checkpointing",
    "r": "rank",
    "k": "top_k",
    "lambda": "weight",
    "task": "tasks",
    "dataset": "suite",
    "cutoff_len": "max_length",
    "name_or_path": "model_name_or_path",
    "model": "model_name_or_path",
    "tokenizer": "tokenizer_name",
    "patience": "early_stopping_patience",
    "dir": "output_dir",
    "threads": "num_threads",
    "gpu": "cuda",
}


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """Return the one of `allowed` that `word` most likely means, or None."""
    names = list(allowed)
    lower = {name.lower(): name for name in reversed(names)}
    plain = word.strip().lower().replace("-", "_")
    for candidate in (word.lower(), plain, _KNOWN_AS.get(plain, "")):
        if candidate in lower:
            return lower[candidate]
    close = difflib.get_close_matches(word.lower(), list(lower), n=1, cutoff=0.6)
    return lower[close[0]] if close else None


def did_you_mean(word: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'?", or nothing where none is near."""
    near = nearest(word, allowed)
    return f"; did you mean '{near}'?" if near else ""


def choices(word: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean 'x'? allowed: x, y", or without the guess where none is near."""
    names = list(allowed)
    return f"{did_you_mean(word, names) or ';'} allowed: {', '.join(names)}"
