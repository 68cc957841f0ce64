"""A device that is not there: torch's meta device, answering what a real one would be asked.

Tensors on the meta device have shapes and no values, and torch knows for each kernel what it
returns. What is left is here: values that the host reads, shapes that depend on values, the
attention kernels that a real device would run, and the count of all of it.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from moc_cli.nn.autograd import HALF
from moc_cli.planning import remembered
from moc_cli.planning.grouped import GROUPED, grouped_flops, grouped_product

META = torch.device("meta")
ROOM = Path(__file__).resolve().parent
PACKAGE = ROOM.parent
aten = torch.ops.aten
# These make or name memory, and start nothing on a device.
_NO_KERNEL = ("aten.empty", "aten.new_empty", "aten.detach", "aten._unsafe_view", "aten.lift")
# Their results have shapes that depend on values, or are values: the host waits for the device.
_READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
}
_MAKES = (torch.tensor, torch.as_tensor)  # with a device they copy from the host, and wait


class Sync(NamedTuple):
    """Where the host waits for the device: for what, and at which line of ours."""

    operation: str
    line: str


class Kernel(NamedTuple):
    """What a kernel does: operations of matrix products, bytes read and written, and whether in
    half precision.
    """

    flops: int
    moved: int
    half: bool


class FakeDevice(TorchDispatchMode):
    """Within it models on the meta device run as on a device of type `device_type` (cuda or cpu).

    `syncs` counts where the host waits for the device, `kernels` what is started in each phase that
    `phase()` names, `work` the kernels by what each computes and moves. A number read by the host
    is 1, a truth value false; where a shape depends on values, every element counts as chosen.
    Raises RuntimeError for tensors of the host among those of the device.
    """

    def __init__(self, device_type: str = "cuda", phase: Callable[[], str] = lambda: "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.syncs: Counter[Sync] = Counter()
        self.kernels: Counter[str] = Counter()
        self.work: Counter[Kernel] = Counter()
        self._phase = phase
        self._attention = _cpu_attention if device_type == "cpu" else _cuda_attention
        self._dropout = F.dropout if device_type == "cpu" else _cuda_dropout(F.dropout)
        self._open = ExitStack()

    def __enter__(self) -> Self:
        makers = {function.__name__: self._waiting(function) for function in _MAKES}
        self._open.enter_context(_replaced(torch, **makers))
        attention = self._faked(F.scaled_dot_product_attention)
        kernels = {"scaled_dot_product_attention": attention, "dropout": self._dropout}
        self._open.enter_context(_replaced(F, **kernels))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._open.close()

    def _waiting(self, make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """A maker of tensors from values of the host: with a device it waits for the copy."""

        def wait(data: Any, *args: Any, **options: Any) -> Tensor:
            device = options.get("device")
            if device is not None and torch.device(device) == META and not isinstance(data, Tensor):
                self.wait(make.__name__)
            return make(data, *args, **options)

        return wait

    def _faked(self, attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Attention by a kernel of the real device for tensors of the fake one."""

        def attend(query: Tensor, *args: Any, **options: Any) -> Tensor:
            return (self._attention if query.is_meta else attention)(query, *args, **options)

        return attend

    def forget(self) -> None:
        """Count again from here."""
        self.syncs.clear()
        self.kernels.clear()
        self.work.clear()

    def wait(self, operation: str) -> None:
        """Count one wait of the host."""
        self.syncs[Sync(operation, _line())] += 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = remembered.tensors_in((*args, *kwargs.values()))
        if func in (aten._to_copy.default, aten.copy_.default):
            result = self._copy(func, args, kwargs)
        elif not any(tensor.is_meta for tensor in inputs):
            result = func(*args, **kwargs)
        else:
            _refuse_host(func, args, inputs)
            result = self._run(func, args, kwargs)
        outputs = remembered.tensors_in(result if isinstance(result, tuple | list) else (result,))
        if any(tensor.is_meta for tensor in outputs) and _is_kernel(func):
            self.kernels[self._phase()] += 1
            count = grouped_flops if func is GROUPED else flop_registry.get(func.overloadpacket)
            full_args = _with_all_heads(args) if "attention" in str(func) else args
            flops = 0 if count is None else count(*full_args, **kwargs, out_val=result)
            tensors = [tensor for tensor in (*inputs, *outputs) if tensor.is_meta]
            moved = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
            half = any(tensor.dtype in HALF for tensor in tensors)
            self.work[Kernel(flops, moved, half)] += 1
        return result

    def _run(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        if func in _READS:
            self.wait(func.overloadpacket.__name__)
            return _read(func, args)
        if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
            places = [_every_place(place) for place in args[1]]
            if any(
                len(place) > 1 or place[0] is not argument
                for place, argument in zip(places, args[1], strict=True)
            ):
                self.wait("index")
                args = (args[0], [place for group in places for place in group], *args[2:])
        if func is GROUPED:
            return grouped_product(*args, **kwargs)
        return remembered.call(func, args, kwargs)

    def _copy(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Copy within the device, to it, or from it: then the host gets zeros."""
        new = func is aten._to_copy.default
        source = args[0] if new else args[1]
        target = torch.device(kwargs.get("device") or source.device) if new else args[0].device
        if (source.device.type == "meta") == (target.type == "meta"):
            return func(*args, **kwargs)
        if not (kwargs.get("non_blocking") or args[2:3] == (True,)):
            self.wait("copy")
        if target.type == "meta":
            return func(*args, **kwargs) if new else args[0]
        if not new:
            return args[0].zero_()
        return torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)


@contextmanager
def _replaced(owner: Any, **functions: Callable[..., Any]) -> Iterator[None]:
    """Within it functions of a module are others, in backward passes too."""
    originals = {name: getattr(owner, name) for name in functions}
    vars(owner).update(functions)
    try:
        yield
    finally:
        vars(owner).update(originals)


def _cuda_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Flash attention in half precision without a mask, memory-efficient attention otherwise."""
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        result: Tensor = aten._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return result
    if enable_gqa:
        groups = query.shape[1] // key.shape[1]
        key, value = (tensor.repeat_interleave(groups, dim=1) for tensor in (key, value))
    bias = None
    if attn_mask is not None:
        bias = _as_bias(attn_mask, query).expand(*query.shape[:-1], key.shape[-2])
    result = aten._scaled_dot_product_efficient_attention(
        query, key, value, bias, torch.is_grad_enabled(), dropout_p, is_causal, scale=scale
    )[0]
    return result


def _cuda_dropout(dropout: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Dropout in one kernel that keeps a byte for each number; elsewhere a number is kept."""

    def drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        if not x.is_meta or not training or not 0 < p < 1:
            return dropout(x, p, training, inplace)
        result: Tensor = torch.native_dropout(x, p, True)[0]
        return result

    return drop


def _cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The flash attention of the CPU; its plain products where it knows no dropout."""
    if dropout_p > 0.0 or (attn_mask is not None and attn_mask.requires_grad):
        return torch._C._nn.scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    bias = None if attn_mask is None else _as_bias(attn_mask, query)
    result: Tensor = aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=bias, scale=scale
    )[0]
    return result


def _as_bias(mask: Tensor, query: Tensor) -> Tensor:
    """A mask as torch adds it to the logits: 0 where it is true, else -inf."""
    if mask.dtype != torch.bool:
        return mask
    bias = torch.zeros_like(mask, dtype=query.dtype)
    return bias.masked_fill_(mask.logical_not(), float("-inf"))


def _read(func: Any, args: Any) -> Any:
    tensor: Tensor = args[0]
    if func is aten._local_scalar_dense.default:
        return False if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1
    if func is aten.nonzero.default:
        return torch.empty(tensor.numel(), tensor.ndim, dtype=torch.long, device=META)
    if func is aten.masked_select.default:
        return torch.empty(args[1].numel(), dtype=tensor.dtype, device=META)
    return True


def _every_place(place: Tensor | None) -> list[Tensor | None]:
    """An index as numbers: those of every place for a mask, itself otherwise."""
    if place is None or place.dtype not in (torch.bool, torch.uint8):
        return [place]
    size = place.numel()
    return [torch.empty(size, dtype=torch.long, device=META) for _ in range(place.ndim)]


def _with_all_heads(args: Any) -> list[Any]:
    """The arguments of an attention, with keys and values (B, H, T, d) for each head of queries.

    Before torch 2.12 the operations of no others are counted.
    """
    wide = [arg for arg in args if isinstance(arg, Tensor) and arg.ndim == 4]
    heads = max((arg.shape[1] for arg in wide), default=0)
    return [
        arg.new_empty(arg.shape[0], heads, *arg.shape[2:])
        if isinstance(arg, Tensor) and arg.ndim == 4
        else arg
        for arg in args
    ]


def _refuse_host(func: Any, args: Any, tensors: list[Tensor]) -> None:
    """Raise RuntimeError for tensors of the host beside those of the device; numbers may be."""
    host = [tensor for tensor in tensors if not tensor.is_meta and tensor.ndim]
    if host:
        raise RuntimeError(
            f"{func}: a tensor of the host, {tuple(host[0].shape)}, among those of the device, "
            f"at {_line()}"
        )


@cache
def _is_kernel(func: Any) -> bool:
    """Whether an operator starts work on a device: it is no view and does not only make memory."""
    views = any(
        r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
    )
    return not views and not str(func).startswith(("prim", *_NO_KERNEL))


def _line() -> str:
    """The innermost line of this package outside of this room, and what it called outside torch."""
    frame: FrameType | None = sys._getframe(1)
    below = ""
    while frame is not None:
        name = frame.f_code.co_filename
        is_planning = name.startswith(str(ROOM))
        if name.startswith(str(PACKAGE)) and not is_planning:
            line = f"{Path(name).relative_to(PACKAGE).as_posix()}:{frame.f_lineno}"
            return f"{line} > {below}" if below else line
        if not below and "/torch/" not in name and not is_planning:
            below = f"{name.rpartition('site-packages/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return below
