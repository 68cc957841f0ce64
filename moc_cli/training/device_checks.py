"""Keys of a recipe that a device or the installed packages cannot honour, asked before weights
load.
"""

from typing import get_args

import torch
from transformers.utils.import_utils import is_flash_attn_2_available

from moc_cli.errors import MocError
from moc_cli.models.compiler import compiler_problem
from moc_cli.models.quantization import has_bitsandbytes
from moc_cli.recipe.quantization import asked_for
from moc_cli.recipe.schema import Recipe
from moc_cli.recipe.sections import TrainSection

ON_GPU = {
    "adamw_fused": "updates all parameters in one kernel of a GPU",
    "paged_adamw_8bit": "moves a GPU's memory to the host",
}
_INSTALL = "is not installed (pip install bitsandbytes)"


def find_device(name: str) -> torch.device:
    """Return the device for auto, cpu or cuda: the GPU, unless there is none or cpu is wanted."""
    on_gpu = name != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if on_gpu else "cpu")


def gpu_problem(name: str) -> str | None:
    """Say that the device of a recipe is a GPU, and none is there; None where that is not so."""
    wanted = name == "cuda" and not torch.cuda.is_available()
    return "launch.device is cuda, but torch sees no GPU" if wanted else None


def check_device_keys(recipe: Recipe, device: torch.device, *, training: bool) -> None:
    """Raise MocError naming every key that cannot be honoured on `device`.

    The keys of the optimizer and of the compiler count in `training` alone.
    """
    wrong = _model_problems(recipe, device)
    if training:
        wrong += _optimizer_problems(recipe, device)
        compiled = {"train": recipe.train.torch_compile, "eval": recipe.eval.torch_compile}
        problem = compiler_problem(device) if any(compiled.values()) else None
        wrong += [f"{key}.torch_compile {problem}" for key in compiled if compiled[key] and problem]
    if wrong:
        raise MocError("\n".join(wrong))


def _model_problems(recipe: Recipe, device: torch.device) -> list[str]:
    wrong = []
    if recipe.model.attn_implementation == "flash_attention_2":
        key = "model.attn_implementation: flash_attention_2 needs"
        if device.type != "cuda":
            wrong.append(f"{key} a GPU, and this runs on the {device.type}; allowed here: sdpa")
        elif not is_flash_attn_2_available():
            wrong.append(f"{key} the package flash-attn, which is not installed; or take sdpa")
    quantization = asked_for(recipe.model)
    if quantization is not None and not has_bitsandbytes():
        key = "load_in_8bit" if quantization.load_in_8bit else "load_in_4bit"
        wrong.append(f"model.{key} needs bitsandbytes, which {_INSTALL}")
    if recipe.train.bf16 and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        name = torch.cuda.get_device_name(device)
        wrong.append(f"train.bf16: {name} has no bfloat16; leave it out")
    return wrong


def _optimizer_problems(recipe: Recipe, device: torch.device) -> list[str]:
    kind, kinds = recipe.train.optim, get_args(TrainSection.model_fields["optim"].annotation)
    if kind in ON_GPU and device.type != "cuda":
        allowed = ", ".join(optimizer for optimizer in kinds if optimizer not in ON_GPU)
        return [
            f"train.optim: {kind} {ON_GPU[kind]}, and this runs on the {device.type}; allowed "
            f"here: {allowed}"
        ]
    if kind.endswith("8bit") and not has_bitsandbytes():
        return [f"train.optim: {kind} needs bitsandbytes, which {_INSTALL}"]
    return []


def check_compiler(recipe: Recipe | None, torch_compile: bool | None, device: str | None) -> bool:
    """Return whether generation is compiled: as `torch_compile`, or None: as the run's recipe says.

    `device` is None where none was typed, `recipe` for a bare model. Raises MocError where the
    device lacks a compiler.
    """
    if torch_compile is None:
        torch_compile = recipe is not None and recipe.eval.torch_compile
    device_name = device or ("auto" if recipe is None else recipe.launch.device)
    problem = compiler_problem(find_device(device_name)) if torch_compile else None
    if problem is not None:
        raise MocError(f"--torch-compile {problem}", "or give --no-torch-compile")
    return torch_compile
