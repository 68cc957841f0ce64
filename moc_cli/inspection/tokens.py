"""One text: what each of its tokens would have chosen, what was chosen, and by how much it won."""

from typing import Any

import torch
from torch import Tensor

from moc_cli.data.encode import Row
from moc_cli.errors import DataError
from moc_cli.load_run import LoadedRun
from moc_cli.nn.mixture import Mixture
from moc_cli.nn.watch import Decision
from moc_cli.scoring.forward import Limits, evaluating


class Votes:
    """Watches one forward of one row: the token probabilities (T, N) and the choice of each site.

    At level `token` each token has a choice of its own; elsewhere all share one.
    """

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture
        self.tokens: dict[int, Tensor] = {}
        self.choices: dict[int, list[list[int]]] = {}
        self.margins: dict[int, float] = {}

    def decided(self, site: Any, decision: Decision) -> None:
        """Keep the probabilities that the site got and what it chose, as numbers of all sites."""
        assert decision.probabilities is not None
        members = torch.tensor(self._mixture.pools[site.pool])
        ids = decision.route.ids.cpu()
        mean = decision.ballot.mean.detach().cpu()
        chosen = mean.gather(1, ids).amin(dim=1)
        runner_up = mean.scatter(1, ids, 0.0).amax(dim=1)
        self.tokens[site.index] = decision.probabilities[0].detach().float().cpu()
        self.choices[site.index] = members[ids].tolist()
        self.margins[site.index] = (chosen - runner_up).mean().item()

    def added(self, site: Any, output: Tensor, update: Tensor) -> None:
        """Sizes of updates are not kept."""


def text_votes(trained: LoadedRun, text: str) -> tuple[list[Row], dict[str, Any]]:
    """Run one text; return it as a row of tokens, and what routing.json says of them.

    `votes` and `probability` are (sites, T): each token's most probable control and how probable.
    `choice` is (sites, K), at level `token` (sites, T·K). Raises DataError where the text has no
    token, and where it has more than the model takes.
    """
    mixture = trained.adapted.mixture
    assert mixture is not None
    prompt: Row = dict(trained.tokenizer(text, verbose=False))
    if not prompt["input_ids"]:
        raise DataError("the text has no tokens", "give some words after --text")
    Limits.of(trained.adapted.model).check([prompt["input_ids"]], "the text")
    votes = Votes(mixture)
    mixture.watchers.append(votes)
    try:
        with evaluating(trained.adapted.model) as device:
            trained.kind.forward(trained, [prompt], device)
    finally:
        mixture.watchers.remove(votes)
    tops = {index: p.max(dim=-1) for index, p in votes.tokens.items()}
    order = range(len(mixture.sites))
    pools = {index: torch.tensor(mixture.pools[mixture.sites[index].pool]) for index in order}
    return [prompt], {
        "tokens": [trained.tokenizer.decode([token]) for token in prompt["input_ids"]],
        "votes": [pools[i][tops[i].indices].tolist() for i in order],
        "probability": [[round(p, 6) for p in tops[i].values.tolist()] for i in order],
        "choice": [[k for row in votes.choices[i] for k in row] for i in order],
        "margin": [votes.margins[i] for i in order],
    }
