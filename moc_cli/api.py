"""The Python API: place controls in a model, train them with any loop, save and load them.

The model stays the user's `PreTrainedModel`, and the controls are parameters of it, so that an
optimizer or the Trainer of transformers finds them. A complete example:

    >>> from pathlib import Path
    >>> from tempfile import mkdtemp
    >>> import torch
    >>> from transformers import AutoModelForCausalLM
    >>> from moc_cli import attach, load_controls
    >>> from moc_cli.models.load import resolve
    >>> model = AutoModelForCausalLM.from_pretrained(resolve("builtin:world-llama"))
    >>> controls = attach(model, "moc", rank=8)
    >>> optimizer = torch.optim.AdamW(controls.parameters(), lr=1e-3)
    >>> ids = torch.tensor([[5, 6, 7, 8]])
    >>> model.train()(input_ids=ids, labels=ids).loss.backward()
    >>> optimizer.step()
    >>> folder = Path(mkdtemp()) / "controls"
    >>> controls.save(folder)
    >>> trained = model.eval()(ids).logits
    >>> with controls.disabled():
    ...     base = model(ids).logits
    >>> model = controls.detach()
    >>> torch.equal(model(ids).logits, base)
    True
    >>> controls = load_controls(model, folder)
    >>> torch.equal(model(ids).logits, trained)
    True
"""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from moc_cli.adapter.check import check_adapter, check_free, check_modules, read_state
from moc_cli.adapter.config import make_method
from moc_cli.adapter.folder import CONFIG, PAYLOAD, write_adapter
from moc_cli.errors import MocError
from moc_cli.files import write_bytes_atomic, write_folder_atomic
from moc_cli.methods import Adapted, Counts
from moc_cli.methods import attach as place
from moc_cli.models.fingerprint import fingerprint
from moc_cli.models.load import name_classes
from moc_cli.models.quantization import of_model
from moc_cli.models.stored_weights import find_stored
from moc_cli.models.tokens import pad_tokens, set_pad_tokens
from moc_cli.models.weight_files import checkpoint_shapes, own_head


class Controls:
    """A method placed in a user's model by `attach` or `load_controls`.

    Until `detach`, `model.save_pretrained(folder)` writes the controls without the base, so that
    the checkpoints of the Trainer are small. `load_controls` reads each of these folders; its
    `model.safetensors` holds the trained parameters only, and the Trainer resumes from it.
    """

    def __init__(
        self,
        adapted: Adapted,
        base_facts: dict[str, Any],
        modules_before: dict[str, Tensor],
        pads_before: tuple[int | None, int | None] | None = None,
        names_before: Mapping[str, Any] | None = None,
    ) -> None:
        self.adapted = adapted
        self._base_facts = base_facts
        self._modules_before = modules_before
        self._detached = False
        self._pads_before, self._names_before = pads_before, dict(names_before or {})
        self._ignored = self.model._keys_to_ignore_on_save
        vars(self.model)["save_pretrained"] = self._save_pretrained
        trained = {id(parameter) for parameter in self.parameters()}
        named = self.model.named_parameters(remove_duplicate=False)
        self._names = [name for name, parameter in named if id(parameter) in trained]
        # What the Trainer may miss in a checkpoint without a warning.
        frozen = self.model.state_dict().keys() - set(self._names)
        self.model._keys_to_ignore_on_save = sorted(frozen)

    @property
    def model(self) -> PreTrainedModel:
        """The model that holds the controls."""
        return self.adapted.model

    def parameters(self) -> list[nn.Parameter]:
        """The trained parameters; everything else in the model is frozen."""
        return list(self.named_parameters().values())

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters, under the keys of the adapter file."""
        return self.adapted.named_trainables()

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The trained parameters in two groups for an optimizer, as `moc train` groups them.

        Gates, biases and norms are in the second one, without weight decay.
        """
        groups: list[dict[str, Any]] = [
            {"params": [], "weight_decay": decay} for decay in (weight_decay, 0.0)
        ]
        for name, parameter in self.named_parameters().items():
            groups[self.adapted.no_decay(name)]["params"].append(parameter)
        return [group for group in groups if group["params"]]

    def counts(self) -> Counts:
        """Numbers of parameters: of the method, of `modules`, and of the base."""
        return self.adapted.counts()

    def set_loss_scale(self, scale: float) -> None:
        """Multiply the balance loss by this: 1 / the number of micro-batches of a step.

        The balance loss joins the objective in the backward pass, on top of any loss. Without this
        call it is scaled as the loss that the model returns for `labels` is.
        """
        self.adapted.set_loss_scale(scale)

    def balance_loss(self) -> float | None:
        """The last training forward's weighted balance loss; None where there is no gate."""
        return self.adapted.balance_loss()

    def disabled(self) -> AbstractContextManager[None]:
        """Context in which the method adds nothing; trained `modules` stay as they are."""
        return self.adapted.disabled()

    def save(self, folder: str | Path) -> None:
        """Write the adapter's two files into a new or empty folder, or over an earlier adapter.

        Raises MocError where the folder holds other files, FileError where it cannot be written.
        """
        target = Path(folder)
        if target.exists() and (
            not target.is_dir() or {path.name for path in target.iterdir()} - {CONFIG, PAYLOAD}
        ):
            raise MocError(f"{target} is not an adapter's folder; it is left alone")
        with write_folder_atomic(target) as temporary:
            self._write(temporary)

    def detach(self) -> PreTrainedModel:
        """Remove the controls: the model and its `modules` are as before `attach`, to the bit.

        But for lora and dora with an init that rewrites the base's weights (pissa, olora): those
        are as before up to rounding. Once more it changes nothing, whatever was attached since.
        """
        if self._detached:
            return self.model
        self._detached = True
        self.model.__dict__.pop("save_pretrained", None)
        self.model._keys_to_ignore_on_save = self._ignored
        parameters = self.named_parameters()
        with torch.no_grad():
            for name, value in self._modules_before.items():
                parameters[name].copy_(value)
        if self._pads_before is not None:
            set_pad_tokens(self.model, *self._pads_before)
        for key, value in self._names_before.items():
            setattr(self.model.config, key, value)
        return self.adapted.detach()

    def _write(self, folder: Path) -> None:
        config = self.adapted.adapter_config() | self._base_facts
        write_adapter(folder, config, save(self.adapted.state(), {"format": "pt"}))

    def _save_pretrained(
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Replaces the model's `save_pretrained`, see the class."""
        if push_to_hub:
            raise MocError("save the controls, then upload the folder", "moc export RUN --help")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        self._write(folder)
        state = self.model.state_dict() if state_dict is None else state_dict
        trained = {name: state[name].detach().contiguous() for name in self._names}
        write_bytes_atomic(folder / "model.safetensors", save(trained, {"format": "pt"}))


def attach(
    model: PreTrainedModel,
    method: str = "moc",
    *,
    modules: Sequence[str] = (),
    seed: int = 42,
    **options: Any,
) -> Controls:
    """Freeze a model and place new controls in it; the model's output stays the same.

    `method` and `options` are the keys of a recipe's `method` section. `modules` names modules of
    the model that are trained and saved completely, such as a new classifier:

        >>> from transformers import BertConfig, BertForSequenceClassification
        >>> from moc_cli import attach
        >>> shape = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4)
        >>> model = BertForSequenceClassification(BertConfig(**shape, num_hidden_layers=2))
        >>> gate = {"projection_dim": 16}
        >>> controls = attach(model, "moc", rank=4, top_k=2, gate=gate, modules=["classifier"])
        >>> controls.counts().adapter, controls.counts().modules
        (1601, 66)

    A classifier that no checkpoint holds is random: a warning says so where `modules` lacks it.
    Raises RecipeError with all mistakes in the options; FamilyError where the layers of the model
    are not known (give `placement`); MocError where the model holds controls already.
    """
    section = make_method(method, options)
    check_free(model)
    names = tuple(modules)
    check_modules(model, names)
    _warn_of_new_head(model, names)
    base = fingerprint(model, names, find_stored(model))
    copies = _copies(model, names)
    adapted = place(model, section, new_modules=names, seed=seed)
    return Controls(adapted, _base_facts(model, base, seed), copies)


def load_controls(model: PreTrainedModel, folder: str | Path) -> Controls:
    """Place the controls of an adapter folder in a model; nothing else in it is changed.

    A classifier whose classes have only numbers also gets their names in its config, and one that
    is a decoder the pad token of the training, by which it finds the last token of a row.

    Raises RunError, with the model unchanged, for: files that are missing, damaged or links out of
    the folder; unknown keys in the config; another base than the one trained on (compared by the
    parameters in memory, see `moc_cli.models.fingerprint`, or for files of format 1 by the hash of
    the weight files); missing, unexpected or wrongly shaped parameters; a payload that does not
    match its hash. Sizes are compared before anything is allocated.

    The folder is a run's `controls`, or was written by `moc export --to controls` or by `save`:

        controls = load_controls(model, "runs/mine/controls")
    """
    checked = check_adapter(model, folder)
    config, names = checked.config, tuple(checked.config.modules)
    if checked.note:
        warnings.warn(checked.note, stacklevel=2)
    state = read_state(checked.adapter)
    copies = _copies(model, names)
    adapted = place(model, config.method, new_modules=names, seed=checked.seed)
    try:
        adapted.load_state(state)
    except MocError:
        adapted.detach()
        raise
    values = checked.adapter.config
    names_before = name_classes(model.config, config.id2label)
    inherited = {key: values[key] for key in _INHERITED if values.get(key) is not None}
    pads_before = None
    if config.pad_token_id is not None:
        pads_before = pad_tokens(model)
        set_pad_tokens(model, config.pad_token_id, config.pad_token_id)
    facts = _base_facts(model, checked.base, checked.seed) | inherited
    return Controls(adapted, facts, copies, pads_before, names_before)


def _warn_of_new_head(model: PreTrainedModel, modules: tuple[str, ...]) -> None:
    """Warn of a classifier that came from no checkpoint and would stay as it was drawn."""
    if model.can_generate() or model.base_model is model:
        return
    shapes = checkpoint_shapes(model.name_or_path) if model.name_or_path else None
    stored_modules = {model.base_model_prefix, *own_head(model, shapes), *modules}
    heads = [name for name, part in model.named_children() if any(True for _ in part.parameters())]
    new = [name for name in heads if name not in stored_modules]
    if new:
        warnings.warn(
            f"{', '.join(new)} of {type(model).__name__} came from no checkpoint, and attach() "
            f"freezes it as it was drawn; to train it: attach(..., modules={new})",
            stacklevel=3,
        )


# Keys of a loaded adapter's config that are written again when it is saved.
_INHERITED = (
    *("base_model_name_or_path", "revision", "base_weights_sha256"),
    *("kind", "num_labels", "id2label"),
)


def _base_facts(model: PreTrainedModel, base: dict[str, str], seed: int) -> dict[str, Any]:
    """What the config says about the base, as far as it is known of a model in memory."""
    quantization = of_model(model)
    return {
        "base_model_name_or_path": model.name_or_path or type(model).__name__,
        "base_weights_sha256": None,
        "base_fingerprint": base,
        "base_quantization": quantization.arguments if quantization else None,
        "seed": seed,
    }


def _copies(model: PreTrainedModel, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Copies of the parameters of `modules`, under the keys of the adapter file."""
    return {
        f"modules.{name}.{key}": parameter.detach().clone()
        for name in names
        for key, parameter in model.get_submodule(name).named_parameters()
    }
