"""Small sweeps over a tiny run, and a stand-in for the processes that they start."""

import json
from pathlib import Path
from typing import Any


class Ended:
    """Stands in for a process that has ended with this exit code."""

    def __init__(self, code: int) -> None:
        self.code = code

    def poll(self) -> int:
        return self.code


def write_sweep(folder: Path, recipe: str, **keys: Any) -> str:
    """A sweep over two ranks and two rates, with small files kept apart."""
    content = {
        "recipe": recipe,
        "set": {"train.max_steps": 1, "eval.before": False, "output.save_strategy": "no"}
        | {"eval.eval_strategy": "steps", "eval.eval_steps": 1},
        "vary": {
            "size": {"r2": {"method.rank": 2}, "r4": {"method.rank": 4}},
            "train.learning_rate": [0.001, 0.01],
        },
        "seeds": [0, 1],
        "choose": "train.learning_rate",
        "reference": "r2",
        "eval": [""],
        "output_dir": str(folder / "runs"),
        "results_dir": str(folder / "kept"),
    }
    path = folder / "grid.yaml"
    path.write_text(json.dumps(content | keys))
    return str(path)
