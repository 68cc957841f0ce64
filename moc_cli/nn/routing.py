"""How routes are decided: the settings of one mixture."""

from dataclasses import dataclass
from typing import get_args

from moc_cli.nn.gate import GATES
from moc_cli.nn.vote import VOTES, Estimator, Level

ALLOWED: dict[str, tuple[str, ...]] = {
    "gate": tuple(GATES),
    "estimator": get_args(Estimator),
    "level": get_args(Level),
    "vote": tuple(VOTES),
    "decode": ("frozen", "running"),
    "balance_f": ("top_k", "choice"),
    "balance_reduce": ("sum", "mean"),
}


@dataclass(frozen=True)
class Routing:
    """How routes are decided and what keeps them balanced; `top_k` = 0 means no gate at all."""

    top_k: int = 1
    alpha: float = 0.95
    share_gate: bool = True
    gate: str = "cosine"
    projection_dim: int = 256
    estimator: Estimator = "renormalized"
    level: Level = "batch"
    vote: str = "mean"
    exclude_local: bool = False
    decode: str = "frozen"
    sync: bool = False  # of several processes: one decision for the batches of all
    balance_weight: float = 0.01
    balance_f: str = "top_k"
    balance_reduce: str = "sum"

    @property
    def constant_weights(self) -> bool:
        """Whether a route's weights are 1 whatever the probabilities: they have no gradient."""
        return self.top_k == 1 and self.estimator == "renormalized"

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown kind, and for two kinds that exclude each other."""
        for name, allowed in ALLOWED.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"routing.{name}: '{getattr(self, name)}' is not known; allowed: "
                    f"{', '.join(allowed)}"
                )
        if self.sync and self.level != "batch":
            raise ValueError(
                f"routing.sync: one decision for the batches of all processes goes with level "
                f"'batch', found '{self.level}'"
            )
        if self.decode == "running" and not VOTES[self.vote].additive:
            raise ValueError(
                f"routing.decode: 'running' adds new tokens to a vote, and the scores of vote "
                f"'{self.vote}' do not add up; use decode 'frozen'"
            )
