"""The targets for memory and speed, each printed with what is measured, counted or planned now.

    python tests/benchmarks/targets.py                        # a small Llama on the CPU
    python tests/benchmarks/targets.py --recipe commonsense/llama2-7b/moc --full   # on a GPU

Times, peaks and generation come from `moc bench`, planned bytes from `moc plan`, waits and kernels
from a replayed step. The small shape: 6 layers of SmolLM2-135M, 8 rows of 128 tokens, float32.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from plans import MIX, at_own_lengths

from moc_cli.kinds.loss import LanguageLoss
from moc_cli.methods import attach
from moc_cli.planning.fake_device import META
from moc_cli.planning.replay import StepMeasurement, replay
from moc_cli.recipe.load import load_recipe
from moc_cli.training import build

SMALL = "commonsense/smollm2-135m/moc"
EIGHT_OF_128 = ("data.max_length=128", "train.per_device_train_batch_size=8", "launch.device=cpu")
GB = 1e9


@dataclass(frozen=True)
class Line:
    """A target: what is measured, its limit (at most, or `at_least`), and the value found."""

    what: str
    limit: float
    value: float | None
    at_least: bool = False

    def __str__(self) -> str:
        """One line of the printed table."""
        sign = ">=" if self.at_least else "<="
        if self.value is None:
            return f"{self.what:72} {sign} {self.limit:<6g} not measured"
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return f"{self.what:72} {sign} {self.limit:<6g} {self.value:8.3f} {'' if met else 'missed'}"


@dataclass(frozen=True)
class Case:
    """Which recipe is measured, changed how, in how many turns, with rows of which folder."""

    recipe: str
    options: tuple[str, ...]
    turns: int
    data: str | None
    tokenizer: str | None

    def bench(self, *more: str) -> dict[str, Any]:
        """Return the entries of `moc bench`."""
        turns = ("--repeats", str(self.turns))
        methods: dict[str, Any] = moc("bench", self.recipe, *self.options, *turns, *more)["methods"]
        return methods

    @property
    def rows(self) -> tuple[str, ...]:
        """The options with which the real rows are read."""
        where = (("data.path", self.data), ("model.tokenizer_name", self.tokenizer))
        return tuple(text for key, value in where if value for text in ("--set", f"{key}={value}"))


def moc(*arguments: str) -> dict[str, Any]:
    """Run a command in a new process; return its JSON, and say why where it is refused."""
    with TemporaryDirectory() as folder:
        output = ("--output-dir", folder) if arguments[0] == "bench" else ()
        command = [sys.executable, "-m", "moc_cli", *arguments, *output, "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        print(f"moc {' '.join(arguments)}:\n{done.stdout}", file=sys.stderr)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def steps(case: Case) -> Iterator[Line]:
    """Times and peaks of a training step."""
    found = case.bench("--methods", "moc,control,lora", "--vary", "method.top_k=1,7")
    first, seventh = found["moc method.top_k=1"], found["moc method.top_k=7"]
    yield Line("moc K=1 / control, step time", 1.03, first["ratio_to_control"])
    yield Line("moc K=1 / control, peak memory", 1.01, first["peak_bytes_to_control"])
    yield Line("moc K=7 / control, step time", 1.12, seventh["ratio_to_control"])
    yield Line("moc / lora, step time", 0.75, first["ratio_to_lora"])
    yield Line("moc / lora, memory beyond what is kept", 0.60, first["working_bytes_to_lora"])


def packed(case: Case) -> Iterator[Line]:
    """Rows of their own lengths: packed with moc, padded in random batches with lora."""
    what = "moc packed / lora in random padded batches, examples/s"
    if case.data is None:
        yield Line(what, 2.5, None, at_least=True)
        return
    vary = ("--vary", "train.packing=true,false", "--set", "train.group_by_length=false")
    sixteen = ("data.max_length=256", "train.per_device_train_batch_size=16", MIX)
    size = tuple(text for change in sixteen for text in ("--set", change))
    found = case.bench("--methods", "moc,lora", "--rows", "data", *case.rows, *size, *vary)
    ours, theirs = found["moc train.packing=true"], found["lora train.packing=false"]
    ratio = ours["examples_per_second"] / theirs["examples_per_second"]
    yield Line(what, 2.5, ratio, at_least=True)


def generation(case: Case) -> Iterator[Line]:
    """Tokens per second with moc, and of the bare base."""
    sizes = ("--vary", "eval.per_device_eval_batch_size=1,16")
    found = case.bench("--generate", "--methods", "moc", *sizes)
    for entry in found.values():
        if entry["method"] == "moc":
            what = f"generation with moc / bare base, tokens/s, batch {entry['rows']}"
            yield Line(what, 0.95, entry["ratio_to_base"], at_least=True)


def planned(case: Case) -> Iterator[Line]:
    """Planned bytes of a step of the paper's models, 16 rows of 256 tokens."""
    plain = _plans("commonsense/llama2-7b/moc")
    for mode, limit in (("none", 33.8), ("selective", 29.0), ("full", 16.1), ("offload", 15.2)):
        yield Line(f"LLaMA2-7B bf16 16x256, planned GB, {mode}", limit, _gigabytes(plain, mode))
    if case.data is not None and case.tokenizer is not None:
        *_, (packed, limit) = at_own_lengths(case.data, case.tokenizer)
        what = "the same, none, packed at the data's lengths, even batches"
        yield Line(what, limit or 0.0, packed.step_bytes / GB)
    wide = _plans("commonsense/llama3-8b/moc")
    yield Line("LLaMA3-8B bf16 16x256, planned GB, full", 18.5, _gigabytes(wide, "full"))
    changes = ("model.load_in_4bit=true", "train.optim=paged_adamw_8bit")
    small = _plans("commonsense/llama3-8b/moc", *(t for c in changes for t in ("--set", c)))
    what = "LLaMA3-8B NF4, 8-bit optimizer, planned GB, full"
    yield Line(what, 8.0, _gigabytes(small, "full", four=True))


def _plans(recipe: str, *options: str) -> list[dict[str, Any]]:
    """Plans of one micro-batch size: that of the recipe."""
    plans: list[dict[str, Any]] = moc("plan", recipe, *options).get("plans", [])
    size = plans[0]["per_device_train_batch_size"] if plans else None
    return [plan for plan in plans if plan["per_device_train_batch_size"] == size]


def _gigabytes(plans: list[dict[str, Any]], mode: str, *, four: bool = False) -> float | None:
    for plan in plans:
        if (plan["activation_checkpointing"], plan["load_in_4bit"]) == (mode, four):
            return float(plan["step_bytes"]) / GB
    return None


def counts(case: Case) -> Iterator[Line]:
    """Waits of the host in a step, and kernels of a layer, replayed on a fake GPU."""
    yield Line(
        "host waits of a step with one micro-batch", 1, _replayed("moc", 2).fake.syncs.total()
    )
    moc_2, moc_4, control_2, control_4 = (
        _replayed(method, layers).fake.kernels for method in ("moc", "control") for layers in (2, 4)
    )
    for way in ("forward", "backward"):
        ratio = (moc_4[way] - moc_2[way]) / (control_4[way] - control_2[way])
        yield Line(f"kernels of a layer, {way}, moc / control", 1.3, ratio)


def _replayed(method: str, layers: int) -> StepMeasurement:
    changes = [f"method={method}", "train.gradient_accumulation_steps=1"]
    recipe = load_recipe("commonsense/llama2-7b/moc", changes)
    config = build.base_shape(recipe).config
    config.num_hidden_layers = layers
    with META:
        model = type(build.base_shape(recipe))(config)
    ids = torch.full((16, 256), 7)
    mask = torch.ones_like(ids)
    mask[-1, 128:] = 0  # there is padding, as in nearly every batch
    labels = ids.masked_fill(mask == 0, -100)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return replay(attach(model, recipe.method), batch, LanguageLoss, build.make_settings(recipe))


def answers(case: Case) -> Iterator[Line]:
    """Processor seconds of `moc --help` by those of the imports that it needs, in turns."""
    imports = [sys.executable, "-c", "import typer, rich, pydantic, yaml"]
    shown = [sys.executable, "-m", "moc_cli", "--help"]
    ratios = [_processor_seconds(shown) / _processor_seconds(imports) for _ in range(case.turns)]
    yield Line("moc --help / its imports, processor seconds", 2.0, median(ratios))


def _processor_seconds(command: list[str]) -> float:
    before = os.times()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    after = os.times()
    user = after.children_user - before.children_user
    return user + after.children_system - before.children_system


GROUPS: dict[str, Callable[[Case], Iterator[Line]]] = {
    "steps": steps,
    "packed": packed,
    "generation": generation,
    "planned": planned,
    "counts": counts,
    "answers": answers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", default=SMALL)
    parser.add_argument("--full", action="store_true", help="the recipe's own shape and batches")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1, help="on a CPU; 1 disturbs ratios least")
    parser.add_argument("--data", help="folder of the commonsense rows")
    parser.add_argument("--tokenizer", help="folder of a tokenizer for these rows")
    given = parser.parse_args()
    options: tuple[str, ...] = ()
    if not given.full:
        changes = (*EIGHT_OF_128, f"launch.num_threads={given.threads}")
        options = ("--layers", "6", *(text for change in changes for text in ("--set", change)))
    case = Case(given.recipe, options, given.turns, given.data, given.tokenizer)
    for name in given.only:
        for line in GROUPS[name](case):
            print(line, flush=True)


if __name__ == "__main__":
    main()
