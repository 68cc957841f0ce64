"""The routes that generations keep, seen from outside."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from moc_cli.methods import Adapted

Routes = list[dict[int, Tensor]]  # of each forward: site -> (B, K) controls


@contextmanager
def watching(found: Adapted) -> Iterator[Routes]:
    """Collect the routes that every forward within it has at its end."""
    mixture = found.model.moc
    seen: Routes = []

    def note(*_: object) -> None:
        routes = mixture.current.store.routes
        seen.append({site: route.ids.clone() for site, route in routes.items()})

    handle = found.model.base_model.register_forward_hook(note)
    try:
        yield seen
    finally:
        handle.remove()
