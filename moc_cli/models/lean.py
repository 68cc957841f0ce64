"""Norms and gated blocks of a base that keep less for the backward pass: those of Llama's kind.

Most families have both, in classes of their own whose `forward` is Llama's.
"""

from types import CodeType, MethodType
from typing import Any

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from moc_cli.nn.lean import gated_product, rms_norm


def keep_less(model: nn.Module) -> None:
    """Let a model's frozen norms and its gated blocks keep less in training.

    Outputs stay the same numbers, gradients to rounding. Modules of other kinds stay as they are.
    """
    for module in model.modules():
        forward = _code(type(module))
        if forward == _code(LlamaMLP):
            module.forward = MethodType(_gated_block, module)
        elif forward == _code(LlamaRMSNorm) and not module.weight.requires_grad:
            module.forward = MethodType(_norm, module)


def _gated_block(module: Any, x: Tensor) -> Tensor:
    product = gated_product(module.gate_proj(x), module.up_proj(x), module.act_fn)
    result: Tensor = module.down_proj(product)
    return result


def _norm(module: Any, x: Tensor) -> Tensor:
    return rms_norm(x, module.weight, module.variance_epsilon)


def _code(kind: type) -> tuple[Any, ...]:
    """What a class's forward does: the same for functions with the same text."""
    code = getattr(getattr(kind, "forward", None), "__code__", None)
    if not isinstance(code, CodeType):
        return ()
    constants = tuple(value for value in code.co_consts if not isinstance(value, str))
    return code.co_code, code.co_names, constants
