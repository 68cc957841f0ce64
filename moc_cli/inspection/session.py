"""`moc inspect-routing` behind the door: from a run folder to routing.json.

asked -> checked against the run's files -> rows -> model -> record, compare, ablate -> write
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load

from moc_cli.errors import MocError, RunError
from moc_cli.evaluation.suite import Task
from moc_cli.inspection import statistics
from moc_cli.inspection.ablation import ablate
from moc_cli.inspection.differences import check_same_sites, compared, task_distances
from moc_cli.inspection.inputs import read_rows
from moc_cli.inspection.record import Seen, record, record_tasks
from moc_cli.inspection.tokens import text_votes
from moc_cli.inspection.warnings import remarks
from moc_cli.load_run import LoadedRun, open_run
from moc_cli.methods.route_counts import Layout
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.methods import MocMethod
from moc_cli.recipe.schema import Recipe
from moc_cli.report.progress import WorkProgress
from moc_cli.runs import RunFolder

FORMAT = 1


@dataclass(frozen=True)
class Asked:
    """What the user asked for; None: as in the run's recipe."""

    run: Path
    tasks: list[str]
    split: str | None = None
    limit: int | None = 100
    text: str | None = None
    site: str | None = None
    compare: Path | None = None
    ablate: bool = False
    batch_size: int | None = None
    device: str | None = None


class Inspection:
    """One call of the command. All that can be wrong is found before weights are loaded."""

    def __init__(self, asked: Asked, *, silent: bool) -> None:
        self.asked, self.silent = asked, silent
        self.recipe, self.layout = _checked(asked.run)
        self.history = history(RunFolder.open(asked.run))
        if asked.compare is not None:
            _, other = _checked(asked.compare)
            check_same_sites(self.layout, other, str(asked.compare))
        if asked.site is not None and asked.site not in self.layout.names:
            from moc_cli.recipe.suggest import choices

            raise MocError(
                f"--site: no site '{asked.site}'{choices(asked.site, self.layout.names)}"
            )
        names = asked.tasks or list(self.recipe.data.tasks)
        if len(set(names)) < len(names):
            raise MocError("--tasks: a task is named twice")
        self.tasks: list[Task] = []
        if asked.text is None:
            self.tasks = read_rows(self.recipe.data, names, asked.split, asked.limit)
        elif not asked.text.strip():
            raise MocError("--text is empty", "give a text, or leave it out to look at rows")
        elif asked.tasks or asked.split or asked.ablate:
            raise MocError(
                "--text looks at one text, without an answer: --tasks, --split and --ablate need "
                "rows",
                "leave out --text or the others",
            )

    def run(self) -> dict[str, Any]:
        """Load the model, look, and return what routing.json says."""
        trained = open_run(self.asked.run, device=self.asked.device, recipe=self.recipe)
        tokens = None
        if self.asked.text is None:
            seen = self._look(trained)
        else:
            seen, tokens = self._read(trained, self.asked.text)
        routing = self._describe(trained, seen)
        routing["tokens"] = tokens
        if self.asked.ablate:
            routing["ablation"] = self._ablate(trained)
        if self.asked.compare is not None:
            other = open_run(self.asked.compare, device=self.asked.device)
            theirs = self._look(other) if tokens is None else self._read(other, self.asked.text)[0]
            routing["compare"] = compared(str(self.asked.compare), seen.whole, theirs.whole)
        return routing

    def _batch_size(self) -> int:
        return self.asked.batch_size or self.recipe.eval.per_device_eval_batch_size

    def _look(self, trained: LoadedRun) -> Seen:
        return record_tasks(trained, self.tasks, batch_size=self._batch_size(), silent=self.silent)

    def _read(self, trained: LoadedRun, text: str | None) -> tuple[Seen, dict[str, Any]]:
        prompts, tokens = text_votes(trained, text or "")
        return Seen({}, record(trained, prompts, batch_size=1)), tokens

    def _ablate(self, trained: LoadedRun) -> list[dict[str, Any]]:
        examples = [example for task in self.tasks for example in task.examples]
        with WorkProgress("ablate sites", len(self.layout.names), silent=self.silent) as bar:
            return ablate(trained, examples, batch_size=self._batch_size(), on_progress=bar.observe)

    def _describe(self, trained: LoadedRun, seen: Seen) -> dict[str, Any]:
        """Return all of routing.json that follows from the records."""
        mixture, method = trained.adapted.mixture, self.recipe.method
        assert mixture is not None
        assert isinstance(method, MocMethod)
        level = "token" if method.routing.level == "token" else "sample"
        looked = self.asked.text is None
        routing: dict[str, Any] = {
            "format": FORMAT,
            "run": trained.name,
            "model": self.recipe.model.model_name_or_path,
            "method": method.model_dump(mode="json"),
            "step": trained.adapter_config.get("step"),
            "split": (self.asked.split or "scored") if looked else None,
            "limit": self.asked.limit if looked else None,
            "text": self.asked.text,
            "sites": statistics.sites(mixture),
            "level": level,
            **statistics.matrices(seen.whole),
            "tasks": {name: statistics.matrices(found) for name, found in seen.tasks.items()},
            "per_site": statistics.per_site(seen.whole, level),
            "per_control": statistics.per_control(seen.whole, mixture),
            "summary": statistics.summary(seen.whole, mixture),
            "history": self.history,
            "task_distance": task_distances(seen.tasks),
            "compare": None,
            "ablation": None,
            "tokens": None,
        }
        return routing | {"warnings": remarks(routing, method)}


def history(folder: RunFolder) -> list[dict[str, Any]]:
    """Return the use of controls over training steps; [] where the run did not record it.

    Raises RunError where a line holds something else.
    """
    found = []
    for line in folder.read_metrics():
        if "routing" in line:
            try:
                use = [float(share) for share in line["routing"]["use"]]
                local = float(line["routing"]["local_share"])
                found.append({"step": int(line["step"]), "use": use, "local_share": local})
            except (KeyError, TypeError, ValueError) as error:
                raise RunError(f"{folder.metrics}: a line's 'routing' is damaged") from error
    if len({len(entry["use"]) for entry in found}) > 1:
        raise RunError(f"{folder.metrics}: lines tell of different numbers of controls")
    return found


def _checked(path: Path) -> tuple[Recipe, Layout]:
    """Return a run's recipe and its sites, from its files alone."""
    folder = RunFolder.open(path)
    recipe = load_recipe(folder.recipe_file)
    method = recipe.method
    assert isinstance(method, MocMethod)  # the door has refused the others
    _, payload = folder.read_controls()
    return recipe, layout_of_controls(set(load(payload)), method.top_k)


def layout_of_controls(keys: set[str], top_k: int) -> Layout:
    """Return the sites and pools that an adapter file's keys name."""
    places = {tuple(key.split(".")[1:3]) for key in keys if key.startswith("controls.")}
    order = sorted(places, key=lambda place: (int(place[0]), place[1]))
    gates = sorted({key.split(".")[1] for key in keys if key.startswith("gates.")})
    pool_of = tuple(gates[0] if len(gates) == 1 else block for _, block in order)
    pools = {pool: [i for i, own in enumerate(pool_of) if own == pool] for pool in gates}
    return Layout(tuple(".".join(place) for place in order), pool_of, pools, top_k)
