"""`static`: routes frozen to each site's most used choice; what is left is an ungated control.

Local and routed controls of a site become one pair of rank r·(K+1), in which α, 1−α, π and the
scale are folded: an adapter of the method `control`. Routes are counted on training rows, so that
the rows that are scored play no part in the choice.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moc_cli.data.examples import Example, subset
from moc_cli.errors import MocError
from moc_cli.export import FormatOptions, parity
from moc_cli.export.controls import write_controls
from moc_cli.export.parity import Written
from moc_cli.load_run import LoadedRun
from moc_cli.methods import Adapted
from moc_cli.methods.route_counts import Record
from moc_cli.nn.mixture import Mixture
from moc_cli.nn.site import Site
from moc_cli.nn.vote import Route
from moc_cli.recipe.methods import ControlMethod
from moc_cli.recipe.schema import Recipe
from moc_cli.report.progress import WorkProgress
from moc_cli.scoring.results import Evaluation, ScoringOptions
from moc_cli.training.build import read_rows
from moc_cli.training.checks import fitting


@dataclass(frozen=True)
class Frozen:
    """One site's choice for good: the members of its pool and their weights, K each."""

    ids: tuple[int, ...]
    weights: tuple[float, ...]

    def route(self, device: torch.device) -> Route:
        """The choice as one decision."""
        ids = torch.tensor([self.ids], device=device)
        return Route(ids, torch.tensor([self.weights], dtype=torch.float32, device=device))


def check(recipe: Recipe) -> None:
    """Raise MocError where there are no routes to freeze."""
    method = recipe.method
    if method.name != "moc" or not method.top_k:
        raise MocError(
            f"static freezes the routes of a gate, and a run of {method.name} has none"
            + (" (top_k is 0)" if method.name == "moc" else ""),
            "take --to merged" if method.name in ("lora", "dora") else "take --to controls",
        )


def export(trained: LoadedRun, folder: Path, options: FormatOptions) -> Written:
    """Count routes, freeze them, write the pairs, and compare with the mixture so rerouted."""
    mixture = trained.adapted.mixture
    assert mixture is not None  # `check` refused what has none
    calibration, scored = drawn_rows(trained, options.calibration)
    counted, _ = score_tasks(trained, calibration, "counting routes")
    frozen = choose(mixture, counted)
    scored_record, before = score_tasks(trained, scored, "scoring with its routes")
    with frozen_routes(mixture, frozen):
        _, after = score_tasks(trained, scored, "scoring with frozen routes")
        expected = parity.reference(trained)
    method = static_method(trained.recipe.method)
    loading = write_controls(
        trained, folder, fold(trained.adapted, frozen), method=method.model_dump(mode="json")
    )
    facts = {
        "agreement": {
            "calibration": _share(mixture, counted, frozen, calibration),
            "scored": _share(mixture, scored_record, frozen, scored),
        },
        "scores": [_change(*pair) for pair in zip(before, after, strict=True)],
        "routes": _names(mixture, frozen),
    }
    return Written(
        loading,
        expected,
        dtype=trained.dtype,
        notes=_notes(facts, method.rank),
        library="moc",
        facts=facts,
    )


def choose(mixture: Mixture, record: Record) -> dict[int, Frozen]:
    """Each site's K most used controls (ties: the larger weight, then the lower index).

    Their weights are the mean of those that they got when they were chosen, with the sum 1 unless
    the gate's estimator is `probability`. Raises MocError where a site decided nothing.
    """
    frozen = {}
    for site in mixture.sites:
        counts, weights = record.sums.counts[site.index], record.sums.weights[site.index]
        if not counts.any():
            raise MocError("no row of the calibration decides a route: none has a prompt")
        order = sorted(range(len(counts)), key=lambda k: (-counts[k], -weights[k], k))
        ids = order[: mixture.routing.top_k]
        means = [(weights[k] / counts[k].clamp(min=1)).item() for k in ids]
        total = 1.0 if mixture.routing.estimator == "probability" else sum(means)
        frozen[site.index] = Frozen(tuple(ids), tuple(mean / total for mean in means))
    return frozen


@contextmanager
def frozen_routes(mixture: Mixture, frozen: dict[int, Frozen]) -> Iterator[None]:
    """Within it every decision of a site is its frozen choice."""

    def reroute(site: Site, route: Route) -> Route:
        choice = frozen[site.index].route(route.ids.device)
        return choice.rows(lambda values: values.expand(route.voters, -1))

    previous, mixture.reroute = mixture.reroute, reroute
    try:
        yield
    finally:
        mixture.reroute = previous


def static_method(method: Any) -> ControlMethod:
    """The `control` method that the frozen run is."""
    return ControlMethod(
        rank=method.rank * (method.top_k + 1),
        sites=method.sites,
        placement=method.placement,
    )


def fold(adapted: Adapted, frozen: dict[int, Frozen]) -> dict[str, Tensor]:
    """The adapter's state: A (r(K+1), d), B (d, r(K+1)) with α, 1−α, π and the scale in it."""
    mixture = adapted.mixture
    assert mixture is not None
    state = {k: v for k, v in adapted.state().items() if k.startswith("modules.")}
    # What the mixture's scale holds of the model's own multiplier, loading puts in again.
    scale = adapted.adapter_config()["method"]["scale"] / mixture.scale
    for site in mixture.sites:
        route = frozen[site.index].route(mixture.control(site.index).A.device)
        pair = mixture.combine(site, route).stack(torch.float32)
        key = f"controls.{site.layer}.{site.block}"
        state[f"{key}.A"] = pair.A.detach().cpu().contiguous()
        state[f"{key}.B"] = (scale * pair.B).detach().cpu().contiguous()
    return state


def drawn_rows(trained: LoadedRun, limit: int) -> tuple[dict[str, list[Example]], ...]:
    """Up to `limit` rows a task: of the training part to count on, of the scored part to score.

    Rows that are too long for the model to score are left out.
    """
    recipe, rows = read_rows(trained.recipe)

    def drawn(examples: list[Example]) -> list[Example]:
        chosen, model = subset(examples, limit), trained.adapted.model
        options = _options(trained)
        numbers, _ = fitting(trained.kind, chosen, trained.tokenizer, model, options)
        return [chosen[number] for number in numbers]

    train = {
        task: drawn([row for row in rows.train if row.task == task]) for task in recipe.data.tasks
    }
    scored = {name: drawn(part) for name, part in rows.tests.items()}
    return (
        {name: part for name, part in train.items() if part},
        {name: part for name, part in scored.items() if part},
    )


def _options(trained: LoadedRun) -> ScoringOptions:
    recipe = trained.recipe
    return ScoringOptions(recipe.eval.per_device_eval_batch_size, recipe.data.max_length)


def score_tasks(
    trained: LoadedRun, tasks: dict[str, list[Example]], label: str
) -> tuple[Record, list[Evaluation]]:
    """Score each task; return what the gates decided on its rows, and the results."""
    options = _options(trained)
    recorder = trained.adapted.recorder()
    assert recorder is not None
    results = []
    with recorder:
        for name, examples in tasks.items():
            with WorkProgress(f"{label}: {name}", len(examples)) as bar:
                results.append(trained.kind.score(trained, examples, options, bar.observe))
    return recorder.record(), results


def _share(
    mixture: Mixture,
    record: Record,
    frozen: dict[int, Frozen],
    rows: Mapping[str, Sequence[Example]],
) -> dict[str, Any]:
    """The share of all choices that are the frozen ones, over all sites; the lowest site's."""
    frozen_counts, all_counts = [], []
    for site in mixture.sites:
        counts = record.sums.counts[site.index]
        frozen_counts.append(counts[list(frozen[site.index].ids)].sum().item())
        all_counts.append(counts.sum().item())
    shares = [
        part / total if total else 0.0
        for part, total in zip(frozen_counts, all_counts, strict=True)
    ]
    lowest = min(range(len(shares)), key=shares.__getitem__)
    return {
        "share": sum(frozen_counts) / max(sum(all_counts), 1),
        "lowest": {"site": mixture.sites[lowest].name, "share": shares[lowest]},
        "rows": sum(map(len, rows.values())),
    }


def _change(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    return {
        "task": before.task,
        "metric": before.metric,
        "before": before.main.value,
        "after": after.main.value,
        "n": before.main.n,
        "stderr": before.main.stderr,
    }


def _names(mixture: Mixture, frozen: dict[int, Frozen]) -> dict[str, list[str]]:
    """Each site's frozen controls, by name."""
    return {
        site.name: [mixture.sites[mixture.pools[site.pool][k]].name for k in frozen[site.index].ids]
        for site in mixture.sites
    }


def _notes(facts: dict[str, Any], rank: int) -> tuple[str, ...]:
    counted, scored = facts["agreement"]["calibration"], facts["agreement"]["scored"]
    lines = [
        f"Routes agree with the frozen ones in {counted['share']:.1%} of the choices on "
        f"{counted['rows']} training rows, and in {scored['share']:.1%} on {scored['rows']} "
        f"scored rows (lowest site {scored['lowest']['site']}: {scored['lowest']['share']:.1%})."
    ]
    for score in facts["scores"]:
        lines.append(
            f"{score['task']}: {score['metric']} {score['before']:.4f} with its routes, "
            f"{score['after']:.4f} frozen, on the same {score['n']} rows."
        )
    return (*lines, f"An ungated control of rank {rank} at each site; load it as any adapter.")
