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
}

BUILTIN_MODELS = ("world-llama",)

# Own metric first; where nothing is said, it is the accuracy.
_METRICS = {
    "cola": ("matthews",),
    "stsb": ("pearson", "spearman"),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
}


def task_metrics(task: str) -> tuple[str, ...]:
    """Return what `metric_for_best_model` may be for `task`, its own metric first."""
    return (*_METRICS.get(task, ("accuracy",)), "loss")
