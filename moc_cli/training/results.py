"""What results.json of a training holds."""

from dataclasses import asdict
from typing import Any

from moc_cli.results import FORMAT
from moc_cli.scoring.results import Evaluation, average
from moc_cli.training.loop_types import Outcome
from moc_cli.training.prepare import Job
from moc_cli.training.resume import Scores

LAST = "last"  # the controls of the end are kept, whatever their value


def make_results(
    job: Job,
    outcome: Outcome,
    after: dict[str, Evaluation],
    before: Scores,
    chosen: dict[str, Any],
) -> dict[str, Any]:
    """Return what results.json holds, but for routing; `chosen` says which controls are kept."""
    counters, counts, encoded = outcome.counters, job.built.adapted.counts(), job.rows.encoded
    return {
        "format": FORMAT,
        "status": "finished",
        "tasks": {
            name: evaluation.entry("before", before.get(name)) for name, evaluation in after.items()
        },
        "average": average(list(after.values())) if after else None,
        "protocol": job.scoring.protocol,
        "train_on_inputs": job.recipe.data.train_on_inputs,
        "validation": None
        if counters.best_value is None or chosen["chosen"] == LAST  # no value chose the step
        else {
            "metric": job.settings.metric,
            "value": counters.best_value,
            "step": counters.best_step,
        },
        "stopped": outcome.stopped,
        "steps": counters.step,
        "epochs": outcome.epochs,
        "examples": counters.examples,
        "tokens": counters.tokens,
        "seconds": counters.seconds,
        "padding_share": outcome.padding_share,
        "truncated": encoded.truncated,
        "answers_cut_off": encoded.answers_cut_off,
        "parameters": counts.to_json(),
        "memory": asdict(outcome.memory)
        | ({} if job.predicted is None else {"predicted": job.predicted}),
        **job.rows.splits.facts,
        **job.rows.kind.facts,
        "controls": chosen,
    }
