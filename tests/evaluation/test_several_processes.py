"""`moc eval` and `moc inspect-routing` in two processes: the files are those of one."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.group import run_together
from support.tiny_runs import choices_run

from moc_cli import load_run
from moc_cli.cli import run
from moc_cli.errors import MocError
from moc_cli.evaluation.options import EvalOptions
from moc_cli.evaluation.session import evaluate
from moc_cli.inspection.session import InspectOptions, inspect
from moc_cli.processes import Elsewhere, Processes
from moc_cli.runs import RunFolder


def options(home: Path, name: str, folder: Path) -> EvalOptions:
    """An evaluation of the run or the model in `home`, written below `folder`."""
    common: dict[str, Any] = {"batch_size": "2", "device": "cpu", "output_dir": folder / name}
    model = {"model": str(home / "model"), "path": str(home / "data"), "tasks": ("ARC-Easy",)}
    return EvalOptions(
        **common,
        **{
            "rank": {"run": home / "run", "base": True},
            "model": model,
        }[name],
    )


def use_everything(home: Path, folder: Path) -> dict[str, Any]:
    """Evaluate in each way into folders below `folder`, and return what routing.json would hold."""
    for name in ("rank", "model"):
        evaluate(options(home, name, folder))
    recipe = RunFolder.open(home / "run").read_recipe(trust_remote_code=False)
    routing = {}
    for name, text in (("rows", None), ("text", "Is it so?")):
        how = InspectOptions(
            home / "run", recipe, [], text=text, ablate=text is None, batch_size=2, device="cpu"
        )
        routing[name] = inspect(how)
    return routing


def use_everything_together(group: Processes, home: Path) -> None:
    """Only the first process may touch the folder of its results."""
    folder = home / f"by {group.rank}"
    routing = use_everything(home, folder)
    assert group.gather(routing) == [routing] * group.world
    assert folder.exists() == group.main
    if group.main:
        (home / "routing.json").write_text(json.dumps(routing))
    one_finds_no_rows(group, home)


def one_finds_no_rows(group: Processes, home: Path) -> None:
    """As on a machine without them: all end with that sentence, and nothing is written."""
    asked = options(home, "rank", home / "refused")
    if not group.main:
        asked = replace(asked, path=str(home / "nowhere"))
    with pytest.raises(MocError, match="process 1 on .*nowhere") as caught:
        evaluate(asked)
    assert isinstance(caught.value, Elsewhere) == (not group.main)
    assert not (home / "refused").exists()


def without_times(file: Path) -> dict[str, Any]:
    """What results.json says, but for seconds."""
    results = json.loads(file.read_text())
    for entry in results["tasks"].values():
        assert entry.pop("seconds") > 0
    return results


def leaves(value: Any, place: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested JSON with their places."""
    parts = value.items() if isinstance(value, dict) else enumerate(value)
    for key, part in parts:
        if isinstance(part, dict | list):
            yield from leaves(part, f"{place}.{key}")
        else:
            yield f"{place}.{key}", part


def test_two_processes_write_what_one_writes(tmp_path: Path) -> None:
    assert run([*choices_run(tmp_path), "--json"]) == 0
    alone = json.loads(json.dumps(use_everything(tmp_path, tmp_path / "alone")))
    run_together(use_everything_together, 2, tmp_path)
    for name in ("rank", "model"):
        one, several = tmp_path / "alone" / name, tmp_path / "by 0" / name
        assert sorted(p.name for p in several.iterdir()) == sorted(p.name for p in one.iterdir())
        assert without_times(several / "results.json") == without_times(one / "results.json")
        assert (several / "samples.jsonl").read_bytes() == (one / "samples.jsonl").read_bytes()
    expected, together = leaves(alone), leaves(json.loads((tmp_path / "routing.json").read_text()))
    for (place, value), (other_place, other) in zip(expected, together, strict=True):
        assert place == other_place
        # Sums over rows are added up in another order: their last bits may differ, and no count.
        assert other == (pytest.approx(value, rel=1e-9) if isinstance(value, float) else value)


def test_a_bare_model_loads_to_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a number it would be the first one for all processes of a machine."""

    class Loading(Exception):
        pass

    def load(*_: Any, device: torch.device, **__: Any) -> None:
        raise Loading(str(device))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(load_run, "load_model", load)
    with pytest.raises(Loading, match="^cuda:3$"):
        load_run.open_model("builtin:world-llama")
