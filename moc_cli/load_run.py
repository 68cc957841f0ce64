"""Models ready to use: a run's base model with its trained controls in it, or a bare model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moc_cli.adapter.check import check_base, open_adapter, read_state
from moc_cli.errors import MocError, RecipeError, RunError
from moc_cli.methods import TextModel, bare
from moc_cli.models.load import load_model, load_tokenizer
from moc_cli.recipe.rules import broken_rules
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.suggest import choices
from moc_cli.runs import RunFolder
from moc_cli.training import build

DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class LoadedModel(TextModel):
    """A model on its device, in evaluation mode.

    `name` is the run folder or the model, as the user wrote it; `weights_hash` is over the weight
    files of the base that was loaded.
    """

    name: str
    weights_hash: str
    device: torch.device

    @property
    def dtype(self) -> str:
        """The type of the base's parameters, such as float32."""
        return str(self.adapted.model.dtype).removeprefix("torch.")


@dataclass(frozen=True)
class LoadedRun(LoadedModel):
    """A model that came from a run folder, and what the folder says.

    `adapter_config` is the run's adapter_config.json; `base` describes the base that was loaded
    (name, fingerprint, kind, seed) under the keys of that file.
    """

    folder: RunFolder
    recipe: Recipe
    adapter_config: dict[str, Any]
    base: dict[str, Any]

    @property
    def causal(self) -> bool:
        """Whether it is a language model rather than a classifier."""
        return bool(self.base["kind"] == "causal")


def open_run(
    path: str | Path, *, device: str | None = None, recipe: Recipe | None = None
) -> LoadedRun:
    """Load a run's base model and put its trained controls in it, in evaluation mode.

    `device` is auto, cpu or cuda, by default the recipe's; `recipe` is the run's, as
    `RunFolder.read_recipe` gives it; without it no code of the base's folder runs. Raises RunError
    where there is no run, where it has no controls yet, where they are damaged, and where the base
    is not the one that they were trained on.
    """
    folder = RunFolder.open(path)
    check_device(device)
    recipe = _on_device(recipe or folder.read_recipe(trust_remote_code=False), device)
    adapter, config, _ = open_adapter(folder.controls)
    state = read_state(adapter)
    chosen = build.make_accelerator(recipe.launch, (), folder.path).device
    tokenizer = build.make_tokenizer(recipe.model)
    if config.method != recipe.method:
        raise RunError(
            f"{folder.controls} holds another method than {folder.recipe_file} describes"
        )
    built = build.build(recipe, chosen)
    check_base(built.name, adapter.config, weights_hash=lambda: built.weights_hash)
    built.adapted.load_state(state)
    built.adapted.model.train(False)
    return LoadedRun(
        name=str(folder.path),
        adapted=built.adapted,
        tokenizer=tokenizer,
        weights_hash=built.weights_hash,
        device=chosen,
        folder=folder,
        recipe=recipe,
        adapter_config=adapter.config,
        base=build.base_facts(recipe, built),
    )


def open_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "float32",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
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
    return LoadedModel(bare(loaded.model), tokenizer, name, loaded.weights_hash, chosen)


def check_device(device: str | None) -> None:
    """Raise MocError for an option `--device` that does not exist or is not available here."""
    if device is not None and device not in DEVICES:
        raise MocError(f"--device: found '{device}'{choices(device, DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise MocError("--device is cuda, but torch sees no GPU", "use --device cpu or auto")


def _on_device(recipe: Recipe, device: str | None) -> Recipe:
    """The recipe with another device in it; raises RecipeError where a rule forbids it there."""
    if device is None:
        return recipe
    launch = recipe.launch.model_copy(update={"device": device})
    recipe = recipe.model_copy(update={"launch": launch})
    broken = list(map(str, broken_rules(recipe)))
    if broken:
        raise RecipeError("\n".join(broken))
    return recipe
