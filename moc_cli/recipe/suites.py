"""The benchmarks, their tasks, and what each task may be measured by."""

TASKS: dict[str, tuple[str, ...]] = {
    "commonsense": (
        "boolq",
        "piqa",
        "social_i_qa",
        "hellaswag",
        "winogrande",
        "ARC-Easy",
        "ARC-Challenge",
        "openbookqa",
    ),
    "glue": ("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "qnli", "rte", "wnli"),
    "builtin": ("world",),
    "custom": (),  # a task of one's own has any name
}
CUSTOM_TASK = "custom"  # its name where none is given

BUILTIN_MODELS = ("world-llama",)

# Own metric first; where nothing is said, it is the accuracy.
_METRICS = {
    "cola": ("matthews",),
    "stsb": ("pearson", "spearman"),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
}

# Formats of one's own rows: the columns that each reads, and what training is watched by.
FORMAT_COLUMNS: dict[str, tuple[str, ...]] = {
    "instruction": ("instruction", "input", "output"),
    "chat": ("messages",),
    "text": ("text",),
    "classification": ("text", "text_pair", "label"),
    "regression": ("text", "text_pair", "label"),
}
_FORMAT_METRICS = {
    "classification": ("accuracy",),
    "regression": ("pearson", "spearman"),
}


def task_metrics(task: str) -> tuple[str, ...]:
    """Return what `metric_for_best_model` may be for a benchmark's task, its own metric first."""
    return (*_METRICS.get(task, ("accuracy",)), "loss")


def format_metrics(name: str | None) -> tuple[str, ...]:
    """Return the same for a format of one's own rows; all there are while it is not yet known."""
    if name is None:
        return ("accuracy", "pearson", "spearman", "perplexity", "loss")
    return (*_FORMAT_METRICS.get(name, ("perplexity",)), "loss")


def is_benchmark_task(task: str) -> bool:
    """Return whether some benchmark has a task of this name."""
    return any(task in tasks for tasks in TASKS.values())
