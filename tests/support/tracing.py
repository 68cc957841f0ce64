"""torch.compile without a compiler: what is compiled is traced, and runs as it was traced."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch._dynamo.utils import counters


@contextmanager
def traced() -> Iterator[None]:
    """Within it graphs and their breaks are counted again; compiling is not ours, and slow."""
    eager = partial(torch.compile, backend="eager")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(torch, "compile", eager)
        monkeypatch.setattr(
            torch.nn.Module,
            "compile",
            lambda self, **options: setattr(
                self, "_compiled_call_impl", eager(self._call_impl, **options)
            ),
        )
        monkeypatch.setattr(logging.root.manager, "disable", logging.DEBUG)  # dynamo traces a lot
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()  # it holds the model, and what hangs on it
