"""A remembered kernel answers as the kernel itself; what gives away memory is called each time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moc_cli.planning import remembered

aten = torch.ops.aten


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def facts(result: Any) -> list[tuple]:
    tensors = [result] if isinstance(result, Tensor) else result
    return [(t.shape, t.stride(), t.dtype, t.untyped_storage().nbytes()) for t in tensors]


MAKERS = [
    (aten.add.Tensor, (meta(3, 4), meta(4, dtype=torch.float64)), {}),
    (aten.add.Tensor, (meta(3, 4), meta(4)), {"alpha": 2}),
    (aten.mul.Tensor, (meta(3, 4, dtype=torch.long), 2), {}),
    (aten.mul.Tensor, (meta(3, 4, dtype=torch.long), 2.0), {}),
    (aten.mul.Tensor, (meta(4, 3).t(), meta(3, 4)), {}),
    (aten.sum.dim_IntList, (meta(3, 4), [1], True), {}),
    (aten.topk.default, (meta(3, 4), 2), {}),
    (aten.cat.default, ([meta(3, 4), meta(2, 4)],), {}),
    (aten.mm.default, (meta(0, 4), meta(4, 3)), {}),
]


@pytest.mark.parametrize(("func", "args", "kwargs"), MAKERS)
def test_the_second_answer_is_the_first_in_memory_of_its_own(
    func: Any, args: tuple, kwargs: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remembered, "LAYOUTS", {})
    expected = facts(func(*args, **kwargs))
    first, second = (remembered.call(func, args, kwargs) for _ in range(2))
    assert facts(first) == facts(second) == expected
    assert all(remembered.LAYOUTS.values())
    pairs = [(first, second)] if isinstance(first, Tensor) else zip(first, second, strict=True)
    for one, other in pairs:
        assert one.untyped_storage()._cdata != other.untyped_storage()._cdata


def test_values_that_are_equal_and_not_the_same_are_kept_apart() -> None:
    x = meta(2, dtype=torch.long)
    given = (2, 2.0, True, torch.tensor(2.0), meta(2, dtype=torch.float16))
    for value in given:
        answer = remembered.call(aten.mul.Tensor, (x, value), {})
        assert answer.dtype == aten.mul.Tensor(x, value).dtype


@pytest.mark.parametrize(
    ("func", "args"),
    [
        (aten._unsafe_view.default, (meta(3, 4), [12])),
        (aten.t.default, (meta(3, 4),)),
        (aten.relu_.default, (meta(3, 4),)),
    ],
)
def test_memory_of_an_argument_stays_its(func: Any, args: tuple) -> None:
    for _ in range(2):
        answer = remembered.call(func, args, {})
        assert answer.untyped_storage()._cdata == args[0].untyped_storage()._cdata
