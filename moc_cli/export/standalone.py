"""`standalone`: a Hugging Face folder that needs no moc: weights, tokenizer, one modeling file.

The file joins this package's own modules (see `one_file`) and ends with two classes that name the
base's own. transformers does not know the folder's `model_type`, so that nobody loads the base
without its controls by mistake.
"""

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_layers import GenericForSequenceClassification

from moc_cli import __version__
from moc_cli.errors import MocError
from moc_cli.export import FormatOptions, parity
from moc_cli.export.card import whole_code
from moc_cli.export.one_file import join_modules
from moc_cli.export.parity import Written
from moc_cli.files import write_json_atomic, write_text_atomic
from moc_cli.load_run import LoadedRun
from moc_cli.models.load import without_bars
from moc_cli.nn.mixture import Mixture
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.tasks import LANGUAGE, ModelHead

MODELING = "modeling_moc"
_HEAD = '''"""{model}: a transformers model with a Mixture-of-Control inside.

Needs torch and transformers. Written by moc_cli {version} from its own modules.
"""

'''
_CLASSES = '''

class {config}({base_config}):
    """The base's configuration, and under `moc` where the controls sit and how they are chosen."""

    model_type = "{model_type}"
    moc: dict[str, Any] | None = None


class {model}({bases}):
    """{base_model} with a Mixture-of-Control inside."""

    config_class = {config}


{inner}{config}.register_for_auto_class()
{model}.register_for_auto_class("{auto}")
'''
# transformers' classifiers over decoders make their inner model from the type of the config.
_INNER = '''class Moc{inner}({inner}):
    """The model inside of the classifier, which makes it: it has no controls of its own."""

    config_class = {config}

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        raise ValueError("this is a classifier: load it with {auto}")


AutoModel.register({config}, Moc{inner}, exist_ok=True)


'''


def export(trained: LoadedRun, folder: Path, options: FormatOptions) -> Written:
    """Write the run's model with its controls, to be loaded where moc cannot be imported.

    Raises MocError for a base that is itself custom code.
    """
    model = trained.adapted.model
    expected = parity.reference(trained)
    write(model, trained.tokenizer, trained.adapted.adapter_config(), trained.kind.head, folder)
    return Written(
        loading=whole_code(trained, "trust_remote_code=True"),
        expected=expected,
        dtype=trained.dtype,
        needs_moc=False,
        notes=(
            f"{MODELING}.py needs torch and transformers alone; it was tried with transformers "
            f"{transformers.__version__}.",
            "In training mode it routes and balances as the run did, once for each forward.",
        ),
    )


def check(recipe: Recipe) -> None:
    """Raise MocError for a method whose forward the modeling file does not know."""
    name = recipe.method.name
    if name in ("lora", "dora"):
        raise MocError(
            f"standalone is for controls, and a run of {name} has none: it changes the base's "
            "weights, and needs no code of its own",
            "take --to merged: a plain Hugging Face folder",
        )
    if name not in ("moc", "control"):
        raise MocError(
            f"standalone is for moc and control; a run of {name} needs the tool itself",
            "take --to controls",
        )


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: dict[str, Any],
    head: ModelHead,
    folder: Path,
) -> None:
    """Write model, tokenizer and modeling file; `adapter` is the method's own description."""
    mixture = model.moc
    assert isinstance(mixture, Mixture)  # `check` refuses methods without one
    settings = describe_mixture(mixture, adapter)
    base, config = type(model), type(model.config)
    inner = type(model.base_model) if isinstance(model, GenericForSequenceClassification) else None
    for class_ in (base, config, *([inner] if inner else [])):
        if getattr(transformers, class_.__name__, None) is not class_:
            raise MocError(
                f"the base is custom code ({class_.__name__} is not a class of transformers), and "
                "one file cannot hold it and the controls",
                "take --to controls",
            )
    model_type = model.config.model_type
    with without_bars():
        model.save_pretrained(folder, save_original_format=False)
    names = {"config": f"Moc{config.__name__}", "model": f"Moc{base.__name__}"}
    written = json.loads((folder / "config.json").read_text("utf-8"))
    written |= {
        "model_type": f"moc_{model_type}",
        "architectures": [names["model"]],
        "auto_map": {
            "AutoConfig": f"{MODELING}.{names['config']}",
            head.auto_class: f"{MODELING}.{names['model']}",
        },
        "moc": settings,
    }
    write_json_atomic(folder / "config.json", written)
    inner_name = inner.__name__ if inner else None
    source = modeling(base.__name__, config.__name__, f"moc_{model_type}", head, inner_name)
    write_text_atomic(folder / f"{MODELING}.py", source)
    tokenizer_copy = deepcopy(tokenizer)
    if head is LANGUAGE:
        # Generation needs the padding on the left.
        tokenizer_copy.padding_side = tokenizer_copy.init_kwargs["padding_side"] = "left"
        tokenizer_copy.pad_token = tokenizer_copy.pad_token or tokenizer_copy.eos_token
    tokenizer_copy.save_pretrained(folder)


def modeling(
    base: str, config: str, model_type: str, head: ModelHead, inner: str | None = None
) -> str:
    """Return the modeling file for a base class and its configuration class.

    `inner` is the class of its inner model, where it makes that from the type of the config.
    """
    # transformers asks for GenerationMixin among a class's own bases.
    bases = [base, *(["GenerationMixin"] if head is LANGUAGE else [])]
    used = [config, *bases, *(["AutoModel", inner] if inner else [])]
    libraries: dict[str, Sequence[str]] = {"transformers": used, "typing": ["Any"]}
    names = {
        "config": f"Moc{config}",
        "base_config": config,
        "model": f"Moc{base}",
        "base_model": base,
        "bases": ", ".join(["Controlled", *bases]),
        "model_type": model_type,
        "auto": head.auto_class,
        "inner": _inner_class(inner, f"Moc{config}", head) if inner else "",
        "version": __version__,
    }
    source = join_modules("moc_cli.export.controlled", ["Controlled"], libraries)
    return _HEAD.format(**names) + source + _CLASSES.format(**names)


def _inner_class(inner: str, config: str, head: ModelHead) -> str:
    return _INNER.format(inner=inner, config=config, auto=head.auto_class)


def describe_mixture(mixture: Mixture, adapter: dict[str, Any]) -> dict[str, Any]:
    """Return what config.json says of the controls: their places and sizes, and the routing."""
    return {
        "placement": adapter["placement"],
        "blocks": list(dict.fromkeys(site.block for site in mixture.sites)),
        "rank": adapter["method"]["rank"],
        "scale": mixture.scale,
        "modules": adapter["modules"],
        "routing": asdict(mixture.routing),
    }
