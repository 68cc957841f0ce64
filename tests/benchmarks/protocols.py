"""`rank` against `generate`: wall time of the same rows by both protocols, batch by batch.

    python tests/benchmarks/protocols.py RUN --path ROWS --tasks openbookqa,boolq --rows 16

Both take turns in one process, with the run's controls and without them.
"""

import argparse
import json
import time
from contextlib import nullcontext

import numpy as np
import torch

from moc_cli.data.examples import subset
from moc_cli.data.suites import load_examples
from moc_cli.load_run import open_run
from moc_cli.scoring.generate import generate
from moc_cli.scoring.rank import rank


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--path")
    parser.add_argument("--tasks", required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=8)
    given = parser.parse_args()
    trained = open_run(given.run)
    suite = trained.recipe.data.suite
    found = []
    for task in given.tasks.split(","):
        rows = load_examples(suite, task, "test", path=given.path)
        rows = subset(rows, given.rows)
        batches = [
            rows[first : first + given.batch_size]
            for first in range(0, len(rows), given.batch_size)
        ]
        for subject, around in (("run", nullcontext), ("base", trained.adapted.disabled)):
            seconds: dict[str, list[float]] = {"rank": [], "generate": []}
            for batch in batches:
                for name, score in (("rank", rank), ("generate", generate)):
                    begin = time.perf_counter()
                    with around():
                        score(
                            trained.adapted, trained.tokenizer, batch, batch_size=given.batch_size
                        )
                    seconds[name].append((time.perf_counter() - begin) / len(batch))
            ratios = np.array(seconds["generate"]) / np.array(seconds["rank"])
            line = {
                "task": task,
                "subject": subject,
                "rows": len(rows),
                "rank_seconds_per_item": float(np.mean(seconds["rank"])),
                "generate_seconds_per_item": float(np.mean(seconds["generate"])),
                "ratio_of_means": float(np.sum(seconds["generate"]) / np.sum(seconds["rank"])),
                "ratios": [round(float(ratio), 2) for ratio in ratios],
            }
            print(json.dumps(line), flush=True)
            found.append(line)
    total = {
        subject: sum(one["generate_seconds_per_item"] for one in found if one["subject"] == subject)
        / sum(one["rank_seconds_per_item"] for one in found if one["subject"] == subject)
        for subject in ("run", "base")
    }
    print(
        json.dumps({"ratio": total, "threads": torch.get_num_threads(), "batch": given.batch_size})
    )


if __name__ == "__main__":
    main()
