"""What a recipe makes, built part by part on tiny models and on first use: `KeyRun`."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from accelerate import Accelerator
from accelerate.commands.launch import launch_command_parser
from peft.tuners.lora import LoraLayer
from support.models import make_byte_tokenizer, make_pair_tokenizer, make_tiny_model
from support.rows import choice_rows, pair_rows, write_rows
from support.tiny_runs import PHRASES
from support.toy import ToyAdapted, toy_data
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from moc_cli.data.splits import Splits
from moc_cli.errors import MocError
from moc_cli.launching.plan import launcher_arguments, make_plan
from moc_cli.methods import Adapted
from moc_cli.nn.layer_mixture import LayerMixture
from moc_cli.nn.mixture import Mixture
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import Recipe
from moc_cli.runs import Call, RunFolder
from moc_cli.training import accelerator, build, session
from moc_cli.training.checkpoint import Checkpoints, read_checkpoint
from moc_cli.training.log import MetricsLog
from moc_cli.training.loop import Loop
from moc_cli.training.session import Job, Session, TrainOptions

CPU = torch.device("cpu")
BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
# What an evaluation of the toy loop gives: accuracy is best at first, f1 later.
SCRIPT = [{"accuracy": 0.9, "f1": 0.1}, {"accuracy": 0.5, "f1": 0.7}, {"accuracy": 0.4, "f1": 0.6}]
_REPLY = {"role": "assistant", "content": "yes"}
OWN_ROWS = [
    {
        "text": f"a {number}",
        "other_text": f"b {number}",
        "text_pair": f"c {number}",
        "other_pair": f"d {number}",
        "label": number % 2,
        "other_label": 1 - number % 2,
        "instruction": f"say {number}",
        "other_instruction": f"write {number}",
        "input": f"in {number}",
        "other_input": f"at {number}",
        "output": f"out {number}",
        "other_output": f"down {number}",
        "messages": [{"role": "user", "content": f"u {number}"}, _REPLY],
        "other_messages": [
            {"role": "system", "content": "be brief"},
            *({"role": "user", "content": f"x {number}"}, _REPLY) * 2,
        ],
    }
    for number in range(12)
]
# Rows of each file below the folder `parts`.
PART_FILES = {
    **{"train": 12, "validation": 3, "test": 4},
    **{"fit": 5, "watch": 6, "score": 7, "more/train": 8},
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
)


def make_bases(folder: Path) -> None:
    """Write a recipe for each base run, and the models and rows they name.

    `choices` trains a decoder on questions, `pairs` a classifier, `own` a decoder on a custom
    dataset with columns for each format, `parts` one on a folder of files.
    """
    llama, bert, other = folder / "llama", folder / "bert", folder / "other"
    tokenizer = make_byte_tokenizer(PHRASES)
    tokenizer.chat_template = CHAT_TEMPLATE
    for path, seed in ((llama, 0), (other, 1)):
        make_tiny_model("llama", seed=seed).save_pretrained(path)
        tokenizer.save_pretrained(path)
    make_tiny_model("bert", num_labels=2).base_model.save_pretrained(bert)
    make_pair_tokenizer().save_pretrained(bert)
    for data, count in (("data", 20), ("other-data", 16)):
        for task in ("ARC-Easy", "ARC-Challenge"):
            write_rows(folder / data / task / "train.jsonl", choice_rows(count))
            write_rows(folder / data / task / "test.jsonl", choice_rows(6))
    for task, labels in (("mrpc", [0, 1]), ("stsb", [0.5, 2.0, 4.5])):
        write_rows(folder / "data" / task / "train.jsonl", pair_rows(24, labels))
        write_rows(folder / "data" / task / "validation.jsonl", pair_rows(9, labels))
    write_rows(folder / "own.jsonl", OWN_ROWS)
    for name, count in PART_FILES.items():
        write_rows(folder / "parts" / f"{name}.jsonl", OWN_ROWS[:count])
    (folder / "quoted.csv").write_text("text\n" + "".join(f'"one {n}"\n' for n in range(8)))
    suites = {
        "choices": ("llama", "suite: commonsense, tasks: [ARC-Easy], held_out: 4, max_length: 400"),
        "pairs": ("bert", "suite: glue, tasks: [mrpc]"),
        "own": ("llama", "suite: custom, format: instruction, held_out: 4"),
        "parts": ("llama", "suite: custom, format: instruction, held_out: 4"),
    }
    paths = {"own": "own.jsonl", "parts": "parts"}
    for name, (model, data) in suites.items():
        path = paths.get(name, "data")
        (folder / f"{name}.yaml").write_text(
            f"model: {{model_name_or_path: {model}}}\ndata: {{{data}, path: {path}}}\n"
            "output: {output_dir: run}\nlaunch: {device: cpu, num_threads: 1}\n"
        )


class KeyRun:
    """A run of the recipe `file` with other `values` by dotted key; each part is made once.

    Its files lie below `folder`.
    """

    def __init__(self, file: str, folder: Path, values: Mapping[str, Any]) -> None:
        self.folder = folder
        changes = {"output.output_dir": str(folder / "run"), **values}
        sets = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        self.loaded = load_recipe(file, sets)

    @cached_property
    def _read(self) -> tuple[Recipe, Splits]:
        return build.read_rows(self.loaded)

    @property
    def recipe(self) -> Recipe:
        return self._read[0]

    @property
    def splits(self) -> Splits:
        return self._read[1]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return build.make_tokenizer(self.recipe.model)

    @cached_property
    def rows(self) -> build.TrainingRows:
        shapes = build.build_shapes(self.recipe).model
        return build.encode_rows(self.recipe, self.splits, self.tokenizer, shapes)

    @property
    def first_text(self) -> str:
        """The first training row, as the session prepares it, as text."""
        row = self.job.rows.encoded.rows[0]
        return str(self.job.tokenizer.decode(row["input_ids"]))

    @cached_property
    def adapted(self) -> Adapted:
        return build.build(self.recipe, CPU, self.tokenizer).adapted

    @cached_property
    def state(self) -> dict[str, torch.Tensor]:
        return self.adapted.state()

    @property
    def mixture(self) -> Mixture | LayerMixture:
        modules = self.adapted.model.modules()
        return next(m for m in modules if isinstance(m, Mixture | LayerMixture))

    @property
    def lora(self) -> LoraLayer:
        return next(m for m in self.adapted.model.modules() if isinstance(m, LoraLayer))

    @property
    def adapted_modules(self) -> set[str]:
        """The last names of the modules that have LoRA in them."""
        modules = self.adapted.model.named_modules()
        return {name.rsplit(".", 1)[-1] for name, m in modules if isinstance(m, LoraLayer)}

    @property
    def refusal(self) -> str:
        """The sentence with which the method is refused; "" where it is placed."""
        try:
            assert self.adapted
        except MocError as error:
            return error.message
        return ""

    @cached_property
    def logits(self) -> torch.Tensor:
        """Of one row, with every control's B set to 1."""
        with torch.no_grad():
            for name, parameter in self.adapted.named_trainables().items():
                if name.endswith(".B"):
                    parameter.fill_(1.0)
            return self.adapted.model.eval()(torch.tensor([[5, 6, 7, 8]])).logits

    @cached_property
    def keeps_routes(self) -> bool:
        """Whether a forward begins a generation whose later tokens keep its routes."""
        self.adapted.model.eval()(torch.tensor([[5, 6, 7, 8]]), use_cache=True)
        return self.mixture.current.store is not None

    @cached_property
    def calls(self) -> dict[str, Any]:
        """The arguments with which transformers loads the `model` and the `tokenizer`."""
        model, tokenizer = AutoModelForCausalLM, AutoTokenizer
        with (
            patch.object(model, "from_pretrained", wraps=model.from_pretrained) as weights,
            patch.object(tokenizer, "from_pretrained", wraps=tokenizer.from_pretrained) as words,
        ):
            build.build(self.recipe, CPU, build.make_tokenizer(self.recipe.model))
        return {"model": weights.call_args, "tokenizer": words.call_args}

    @cached_property
    def accelerator(self) -> dict[str, Any]:
        """The arguments with which the session starts accelerate where there is a GPU."""
        with (
            patch.object(torch.cuda, "is_available", return_value=True),
            patch.object(accelerator, "Accelerator", side_effect=_Started) as made,
            suppress(_Started),
        ):
            assert self.job
        arguments: dict[str, Any] = made.call_args.kwargs
        return arguments

    @cached_property
    def joined(self) -> dict[str, Any]:
        """The arguments with which a run joins other processes."""
        with patch.object(accelerator, "join") as joined:
            accelerator.make_accelerator(self.recipe.launch, (), self.folder)
        arguments: dict[str, Any] = joined.call_args.kwargs
        return arguments

    @property
    def launcher(self) -> Namespace:
        """What accelerate's launcher reads of the arguments that it is started with."""
        arguments = launcher_arguments(make_plan(self.recipe.launch), ["train"])
        return launch_command_parser().parse_args(arguments)

    @cached_property
    def loop(self) -> SimpleNamespace:
        """A toy model trained by the loop with this recipe's settings, and what it left."""
        folder, script = self.folder / "toy", iter(SCRIPT * 99)
        folder.mkdir(parents=True)
        adapted, settings = ToyAdapted(dropout=0.2), build.make_settings(self.recipe)
        checkpoints = Checkpoints(folder / "checkpoints")
        loop = Loop(
            adapted,
            toy_data(BATCHES),
            settings,
            accelerator=Accelerator(cpu=True),
            checkpoints=checkpoints,
            log=MetricsLog(folder / "metrics.jsonl"),
            evaluate=(lambda: next(script)) if settings.eval_strategy != "no" else None,
        )
        start = {**loop.optimizer.param_groups[0]}
        outcome = loop.run()
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return SimpleNamespace(
            optimizer=start,
            optimizer_name=type(loop.optimizer).__name__,
            outcome=outcome,
            scales=adapted.scales,
            state=adapted.state(),
            losses=[line for line in lines if "loss" in line],
            evaluations=[line["step"] for line in lines if "eval" in line],
            checkpoints=checkpoints.steps(),
            newest=read_checkpoint(checkpoints.path(outcome.counters.step)),
        )

    @cached_property
    def job(self) -> Job:
        """What the session prepares before the first step."""
        folder = RunFolder(self.folder / "run")
        with _threads_kept():
            launch, report_to = self.recipe.launch, self.recipe.output.report_to
            made = accelerator.make_accelerator(launch, report_to, folder.trackers)
            return self._session().prepare(made)

    def _session(self) -> Session:
        return Session(self.loaded, TrainOptions(Call("moc train")), say=lambda text: None)

    @cached_property
    def _finished(self) -> tuple[dict[str, Any], int]:
        with (
            _threads_kept(),
            patch.object(session, "require_trackers"),
            patch.object(Accelerator, "init_trackers"),
            patch.object(Accelerator, "log") as log,
        ):
            return self._session().run(), log.call_count

    @property
    def finished(self) -> dict[str, Any]:
        """The results of the whole session."""
        return self._finished[0]

    @property
    def tracked(self) -> int:
        """How many lines of numbers the whole session gave to its trackers."""
        return self._finished[1]


class _Started(Exception):
    """Ends a session where it starts accelerate."""


@contextmanager
def _threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
