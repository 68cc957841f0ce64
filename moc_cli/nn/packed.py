"""Several rows laid end to end in one, for routes that each row decides for itself."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedRows:
    """V rows in one of T tokens; the longest has S.

    `places` (V, S) says where a row's tokens lie in the one row, `valid` (V, S) which of them are
    there, `back` (T,) where each token of the one row lies among the V·S.
    """

    places: Tensor
    valid: Tensor
    back: Tensor

    @classmethod
    def of(cls, bounds: Tensor, longest: int, total: int) -> "PackedRows":
        """Rows from `bounds` (V + 1,), the places where they begin and the end of the last one."""
        bounds = bounds.long()
        starts, lengths = bounds[:-1, None], bounds.diff()[:, None]
        number = torch.arange(longest, device=bounds.device)
        valid = number < lengths
        places = (starts + number).where(valid, 0)
        token = torch.arange(total, device=bounds.device)
        owner = torch.searchsorted(bounds[1:].contiguous(), token, right=True)
        return cls(places, valid, owner * longest + token - bounds[owner])

    def split(self, x: Tensor) -> Tensor:
        """x (1, T, d) -> its rows (V, S, d); what stands behind a short row is never read."""
        return x[0][self.places]

    def join(self, x: Tensor) -> Tensor:
        """x (V, S, d) -> (1, T, d)."""
        return x.flatten(0, 1)[self.back][None]
