"""Models ready to use: a run's base model with its trained controls in it, or a bare model."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moc_cli.adapter.check import (
    check_base,
    check_bounds,
    check_finite,
    compare_quantization,
    open_adapter,
    read_state,
)
from moc_cli.adapter.folder import read_shapes
from moc_cli.errors import MocError, RecipeError, RunError
from moc_cli.kinds import Kind, make_kind
from moc_cli.methods import TextModel, bare
from moc_cli.models.fingerprint import (
    find_differences,
    hash_tensors,
    hash_vocabulary,
    in_a_layer,
    is_packed,
    list_differences,
)
from moc_cli.models.load import load_config, load_model, load_tokenizer
from moc_cli.models.quantization import of_model, stored_as
from moc_cli.models.tokens import match_tokens
from moc_cli.models.weight_files import known_hash
from moc_cli.recipe.quantization import Quantization
from moc_cli.recipe.rules import broken_rules
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.suggest import choices
from moc_cli.report.output import say
from moc_cli.runs import BaseOptions, RunFolder
from moc_cli.training import build, checkpoint
from moc_cli.training.accelerator import make_accelerator
from moc_cli.training.compiled import matmul_precision
from moc_cli.training.device_checks import check_device_keys, find_device

TRAINABLES = "trainables.safetensors"
DEVICES = ("auto", "cpu", "cuda")
HINT = "if the base model is in another folder now, name it: --base-path DIR"


@dataclass(frozen=True)
class LoadedModel(TextModel):
    """A model on its device, in evaluation mode.

    `name` is the run folder or the model, as the user wrote it; `weights_hash` is over the tensors
    of the base that was loaded.
    """

    name: str
    weights_hash: str
    device: torch.device

    @property
    def quantization(self) -> Quantization | None:
        """How the linear weights of the base are kept, if not in `dtype`."""
        return of_model(self.adapted.model)

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
    def kind(self) -> Kind:
        """The kind of the tasks that it was trained on."""
        return make_kind(self.recipe.data.task)


def open_run(
    path: str | Path,
    *,
    device: str | None = None,
    recipe: Recipe | None = None,
    base: BaseOptions = BaseOptions(),  # noqa: B008 - frozen
    exact: bool = False,
) -> LoadedRun:
    """Load a run's base model and put its trained controls in it, in evaluation mode.

    `device` is auto, cpu or cuda, by default the recipe's; `recipe` is the run's, as
    `RunFolder.read_recipe` gives it; without it no code of the base's folder runs. Products of
    float32 are made as in training (`train.tf32`), or with `exact` in float32. What `base` allows
    to differ is said. Raises RunError where there is no run, where it has no controls yet,
    where they are damaged, and where the base is not the one that they were trained on.
    """
    folder = RunFolder.open(path)
    check_device(device)
    recipe = _on_device(recipe or folder.read_recipe(trust_remote_code=False), device)
    recipe = _in_4_bits(_with_base(recipe, folder, base), base.load_in_4bit)
    saved, state = _read_saved(folder, recipe)
    chosen = make_accelerator(recipe.launch, (), folder.path).device
    check_device_keys(recipe, chosen, training=False)
    precision = "highest" if exact else matmul_precision(chosen, tf32=recipe.train.tf32)
    torch.set_float32_matmul_precision(precision)
    try:
        tokenizer = build.make_tokenizer(recipe.model, recipe.data.chat_template)
    except MocError as error:
        raise RunError(error.message, HINT) from error
    built = build.build(recipe, chosen, tokenizer)
    _check_weights(folder, recipe, saved, built, base)
    note = compare_quantization(saved, built.quantization)
    if note:
        say(note)
    _check_vocabulary(folder, hash_vocabulary(tokenizer), base)
    built.adapted.load_state(state)
    built.adapted.model.train(False)
    facts = build.base_facts(recipe, built)
    return LoadedRun(
        name=folder.name,
        adapted=built.adapted,
        tokenizer=tokenizer,
        weights_hash=built.weights_hash,
        device=chosen,
        folder=folder,
        recipe=recipe,
        adapter_config=built.adapted.adapter_config() | facts | saved,
        base=facts,
    )


def open_model(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "float32",
    trust_remote_code: bool = False,
    load_in_4bit: bool | None = None,
) -> LoadedModel:
    """Load a bare language model: a hub id, a folder, or `builtin:<name>`."""
    check_device(device)
    chosen = find_device(device)
    if chosen.type == "cuda":  # of several processes each has its own
        chosen = torch.device("cuda", torch.cuda.current_device())
    tokenizer = load_tokenizer(name, trust_remote_code=trust_remote_code)
    loaded = load_model(
        name,
        kind="causal",
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        device=chosen,
        quantization=Quantization(load_in_4bit=True) if load_in_4bit else None,
    )
    match_tokens(loaded.model, tokenizer)
    loaded.model.to(chosen)  # type: ignore[arg-type]
    loaded.model.train(False)
    return LoadedModel(bare(loaded.model), tokenizer, name, loaded.weights_hash, chosen)


def check_device(device: str | None) -> None:
    """Raise MocError for an option `--device` that does not exist or is not available here."""
    if device is not None and device not in DEVICES:
        raise MocError(f"--device: found '{device}'{choices(device, DEVICES)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise MocError("--device is cuda, but torch sees no GPU", "use --device cpu or auto")


def saved_shapes(folder: RunFolder) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of a run's saved tensors; RunError where they are damaged."""
    if folder.checkpoint is not None:
        return read_shapes(folder.checkpoint, TRAINABLES)
    adapter, _, _ = open_adapter(folder.controls)
    return adapter.shapes


def _read_saved(folder: RunFolder, recipe: Recipe) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what is known of a run's saved tensors, as adapter_config.json says it, and them.

    Raises RunError where they are damaged, or not of the recipe's method.
    """
    if folder.checkpoint is None:
        adapter, config, _ = open_adapter(folder.controls)
        if config.method != recipe.method:
            raise RunError(
                f"{folder.controls} holds another method than {folder.recipe_file} describes"
            )
        return adapter.config, read_state(adapter)
    checkpoint_folder = folder.checkpoint
    check_bounds(checkpoint_folder, recipe.method, saved_shapes(folder))
    snapshot = checkpoint.read_checkpoint(checkpoint_folder)
    check_finite(snapshot.trainables, checkpoint_folder)
    step, files = snapshot.counters.step, checkpoint.read_state(checkpoint_folder)["files"]
    say(f"{folder.path}: the controls are those of a checkpoint, step {step:,}")
    return {
        "base_weights_sha256": snapshot.identity.get("weights"),
        "base_quantization": snapshot.identity.get("quantization"),
        "step": step,
        "payload_sha256": files[TRAINABLES],
    }, snapshot.trainables


def _with_base(recipe: Recipe, folder: RunFolder, base: BaseOptions) -> Recipe:
    """The recipe with its base where it is now; raises MocError where no folder is there."""
    model = recipe.model
    if base.path is not None:
        if not Path(base.path, "config.json").is_file():
            raise MocError(
                f"--base-path {base.path}: no model is there",
                "give a local folder with config.json and the weights",
            )
        update: dict[str, Any] = {"model_name_or_path": str(base.path), "revision": None}
        tokenizer = model.tokenizer_name
        if tokenizer is not None and _is_gone(tokenizer):
            say(
                f"the tokenizer was in {tokenizer}, which is not there: that of {base.path} is used"
            )
            update["tokenizer_name"] = None
        return recipe.changed(model=update)
    name = model.model_name_or_path
    if _is_gone(name):
        raise RunError(f"the base model of {folder.path} was in {name}, which is not there", HINT)
    return recipe


def _is_gone(name: str) -> bool:
    """Whether a model or tokenizer was in a folder that is not there; a hub id is no folder."""
    return name.startswith(("/", ".", "~")) and not Path(name).expanduser().is_dir()


def _in_4_bits(recipe: Recipe, load_in_4bit: bool | None) -> Recipe:
    """The recipe with its base in 4 bits or unquantised, as it is wanted; None: as it is.

    Raises MocError where the files of a base that is wanted unquantised hold 4 or 8 bits alone.
    """
    if load_in_4bit is None:
        return recipe
    model = recipe.model
    if not load_in_4bit:
        name = model.model_name_or_path
        trust = model.trust_remote_code
        stored = stored_as(
            name, load_config(name, revision=model.revision, trust_remote_code=trust)
        )
        if stored is not None:
            raise MocError(
                f"--no-load-in-4bit: '{name}' holds its weights in {stored} alone",
                "name the unquantised base that it was made from: --base-path DIR",
            )
    return recipe.changed(model={"load_in_4bit": load_in_4bit, "load_in_8bit": False})


def _check_weights(
    folder: RunFolder,
    recipe: Recipe,
    adapter_config: dict[str, Any],
    built: build.Built,
    base: BaseOptions,
) -> None:
    """Raise RunError unless the base's tensors are those of the training, or may differ."""
    expected_hash = adapter_config.get("base_weights_sha256")
    if built.weights_hash == expected_hash:
        return
    trained_tensors = folder.base_tensors()
    packed = is_packed(trained_tensors) or is_packed(built.tensors)
    # An older run does not describe its tensors.
    if hash_tensors(trained_tensors) != expected_hash or packed:
        model = recipe.model
        check_base(
            built.name,
            adapter_config,
            fingerprint=built.fingerprint,
            weights_hash=lambda: known_hash(model.model_name_or_path, model.revision),
        )
        return
    differences = find_differences(trained_tensors, built.tensors)
    inside = any(map(in_a_layer, differences))
    text = f"{built.name} has other weights than the base of {folder.path}"
    text += f":\n{list_differences(differences)}"
    if base.allow_changes and not inside:
        say(text)
        return
    accept = "controls do not depend on these weights; to accept the change: --allow-changed-base"
    raise RunError(
        text,
        "give the base that it was trained on: --base-path DIR" if inside else accept,
    )


def _check_vocabulary(folder: RunFolder, vocabulary_hash: str, base: BaseOptions) -> None:
    """Raise RunError unless the tokenizer has the vocabulary of the training, or may differ."""
    expected_hash = folder.base_vocabulary()
    if expected_hash in (None, vocabulary_hash):
        return
    text = f"the tokenizer has another vocabulary than the one that {folder.path} was trained with"
    if not base.allow_changes:
        raise RunError(
            text, "give the base of the training with --base-path DIR, or --allow-changed-base"
        )
    say(text)


def _on_device(recipe: Recipe, device: str | None) -> Recipe:
    """The recipe with another device in it; raises RecipeError where a rule forbids it there."""
    if device is None:
        return recipe
    recipe = recipe.changed(launch={"device": device})
    broken = list(map(str, broken_rules(recipe)))
    if broken:
        raise RecipeError("\n".join(broken))
    return recipe
