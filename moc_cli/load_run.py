"""A run, or a bare model, brought back: the model with its controls, and where both came from."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moc_cli.adapter.config import parse_adapter
from moc_cli.errors import MocError, RunError
from moc_cli.methods import Adapted
from moc_cli.models.load import load_model, load_tokenizer
from moc_cli.recipe.load import load_recipe
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.suggest import choices
from moc_cli.runs import RunFolder
from moc_cli.training import build

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Bare:
    """A model with nothing in it, where an adapted one is expected."""

    model: PreTrainedModel

    def voting(self, mask: Tensor) -> AbstractContextManager[None]:
        """Nothing votes here."""
        return nullcontext()

    def disabled(self) -> AbstractContextManager[None]:
        """There is nothing to switch off."""
        return nullcontext()


@dataclass(frozen=True)
class Trained:
    """A run's model with its controls in it.

    `recipe` is the run's; `controls` is its adapter_config.json; `weights_hash` and `base` (its
    name, fingerprint, kind) are of the base that was loaded now.
    """

    folder: RunFolder
    recipe: Recipe
    adapted: Adapted
    tokenizer: PreTrainedTokenizerBase
    controls: dict[str, Any]
    weights_hash: str
    device: torch.device
    base: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The run folder, as the user wrote it."""
        return str(self.folder.path)

    @property
    def causal(self) -> bool:
        """Whether it is a language model rather than a classifier."""
        return build.recipe_is_causal(self.recipe)


def open_run(path: str | Path, *, device: str | None = None) -> Trained:
    """Load a run's base model and put its trained controls in it, in evaluation mode.

    `device` is auto, cpu or cuda; without one the recipe's. Raises RunError where there is no run,
    where it has no controls yet, where they are damaged, and where the base is not the one that
    they were trained on.
    """
    folder = RunFolder.open(path)
    if device is not None:
        check_device(device)
    recipe = load_recipe(folder.recipe_file, [f"launch.device={device}"] if device else [])
    controls, payload = folder.read_controls()
    chosen = build.make_accelerator(recipe.launch, (), folder.path).device
    tokenizer = build.make_tokenizer(recipe.model)
    if parse_adapter(controls, str(folder.controls))[0].method != recipe.method:
        raise RunError(
            f"{folder.controls} holds another method than {folder.recipe_file} describes"
        )
    built = build.build(recipe, chosen)
    check_base(controls, built.weights_hash, built.name)
    built.adapted.load_state(load(payload))
    built.adapted.model.train(False)
    return Trained(
        folder,
        recipe,
        built.adapted,
        tokenizer,
        controls,
        built.weights_hash,
        chosen,
        build.base_facts(recipe, built),
    )


def check_device(device: str) -> None:
    """Raise MocError for an option `--device` that is none, or that is not there."""
    if device not in DEVICES:
        raise MocError(f"--device: found '{device}'{choices(device, DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise MocError("--device is cuda, but torch sees no GPU", "use --device cpu or auto")


def check_base(controls: dict[str, Any], weights_hash: str, name: str) -> None:
    """Raise RunError unless the weights are those that the controls were trained on."""
    expected = controls.get("base_weights_sha256")
    if expected != weights_hash:
        raise RunError(
            f"model '{name}' has other weights than the controls were trained on: "
            f"sha256 {weights_hash[:12]}, expected {str(expected)[:12]}",
            "give the same base model, or train anew on this one",
        )


@dataclass(frozen=True)
class Base:
    """A bare language model, for the line that every method starts from."""

    name: str
    adapted: Bare
    tokenizer: PreTrainedTokenizerBase
    weights_hash: str
    device: torch.device


def open_base(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> Base:
    """Load a bare language model: a hub id, a folder, or `builtin:<name>`."""
    check_device(device)
    chosen = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust_remote_code)
    loaded = load_model(
        name,
        kind="causal",
        dtype=dtype,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    loaded.model.to(chosen)  # type: ignore[arg-type]
    loaded.model.train(False)
    return Base(name, Bare(loaded.model), tokenizer, loaded.weights_hash, chosen)
