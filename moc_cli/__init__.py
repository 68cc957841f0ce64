"""`moc`: fine-tune transformers with Mixture-of-Control (arXiv 2606.31397).

In Python: `from moc_cli import attach, load_controls, Tenants`, see `moc_cli.api` and
`moc_cli.serving.tenants`. They are looked up when first used, so that `import moc_cli` alone loads
no torch.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
_SURFACE = {
    "Controls": "moc_cli.api",
    "Tenants": "moc_cli.serving.tenants",
    "attach": "moc_cli.api",
    "load_controls": "moc_cli.api",
}


def __getattr__(name: str) -> Any:
    if name in _SURFACE:
        return getattr(import_module(_SURFACE[name]), name)
    raise AttributeError(f"module 'moc_cli' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_SURFACE])
