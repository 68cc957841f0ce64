"""Each gate, vote, level, estimator and balance loss against the naive reference, in float64."""

from typing import get_args

import pytest
import torch
from support.combinations import half_of_product
from support.messages import refused
from support.reference import Settings, best, site_update
from torch import nn

from moc_cli.nn import routing as routing_module
from moc_cli.nn.control import Control
from moc_cli.nn.forward import Forward, RouteStore
from moc_cli.nn.gate import GATES
from moc_cli.nn.mixture import Mixture
from moc_cli.nn.routing import Routing
from moc_cli.nn.vote import VOTES, Ballot, Route, Vote, Voters, decide, poll, top_k
from moc_cli.nn.watch import Decision, one_token_decides
from moc_cli.recipe.methods import MocMethod

WIDTH, RANK, LAYERS = 6, 2, 3


def make_mixture(blocks=("attn", "ffn"), scale=1.0, **routing) -> Mixture:
    generator = torch.Generator().manual_seed(3)
    routing = {"projection_dim": 5, **routing}
    mixture = Mixture(
        LAYERS, WIDTH, blocks, RANK, scale, Routing(**routing), generator=generator
    ).double()
    with torch.no_grad():
        for name, parameter in mixture.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(generator=generator)
            if name.endswith("experts") or name.endswith("gates.shared.weight"):
                parameter.mul_(50)
    return mixture


def make_input(rows=3, tokens=4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(rows, tokens, WIDTH, dtype=torch.float64, generator=generator)
    valid = torch.ones(rows, tokens, dtype=torch.bool)
    valid[0, 3:] = False
    valid[1, :2] = False
    return x, valid


def count(p, valid, level, vote) -> Ballot:
    return poll(p, Voters.of(p.shape[:2], valid, level, dtype=p.dtype), 1, vote)


def pool_of(mixture: Mixture, site) -> list[tuple[torch.Tensor, torch.Tensor]]:
    controls = [mixture.control(index) for index in mixture.pools[site.pool]]
    return [(control.A, control.B) for control in controls]


def gate_of(mixture: Mixture, site) -> dict[str, torch.Tensor]:
    return dict(mixture.gates[site.pool].named_parameters())


EVERY = [
    dict(zip(("gate", "vote", "level", "estimator", "top_k"), values, strict=True))
    for values in half_of_product(
        ("linear", "cosine"),
        ("mean", "mode"),
        ("batch", "sample", "token"),
        ("renormalized", "straight_through", "probability"),
        (1, 3),
    )
]
MORE = [
    {"exclude_local": True, "top_k": 2},
    {"exclude_local": True, "top_k": 5},
    {"top_k": 6},
    {"share_gate": False, "top_k": 2},
    {"blocks": ("ffn",), "top_k": 2},
    {"blocks": ("attn",), "top_k": 1},
    {"balance_f": "choice", "top_k": 2},
    {"balance_f": "choice", "top_k": 1, "level": "sample"},
    {"exclude_local": True, "balance_f": "choice", "level": "token"},
    {"alpha": 0.5, "scale": 1.7},
    {"alpha": 1.0},
    {"alpha": 0.0, "top_k": 2},
]


@pytest.mark.parametrize("case", EVERY + MORE, ids=str)
def test_update_gradients_and_balance_equal_the_reference(case):
    mixture = make_mixture(**case)
    routing = mixture.routing
    settings = Settings(
        routing.top_k,
        routing.alpha,
        mixture.scale,
        routing.gate,
        routing.level,
        routing.vote,
        routing.estimator,
        routing.exclude_local,
        routing.balance_f,
    )
    x, valid = make_input()
    for site in (mixture.sites[1], mixture.sites[-1]):
        mixture.zero_grad()
        mixture.current = Forward(valid)
        ours_in = x.clone().requires_grad_()
        update = mixture.update(site, ours_in)
        weight = torch.randn(update.shape, dtype=update.dtype)
        update.mul(weight).sum().backward()
        grads = {n: p.grad.clone() for n, p in mixture.named_parameters() if p.grad is not None}

        mixture.zero_grad()
        ref_in = x.clone().requires_grad_()
        local = mixture.pools[site.pool].index(site.index)
        expected, picks, loss = site_update(
            ref_in, valid, pool_of(mixture, site), local, gate_of(mixture, site), settings
        )
        (expected.mul(weight).sum() + routing.balance_weight * loss).backward()

        assert torch.allclose(update, expected, atol=1e-12, rtol=0)
        assert site.choice.tolist() == picks
        assert site.loss.item() == pytest.approx(loss.item(), abs=1e-12)
        assert torch.allclose(ours_in.grad, ref_in.grad, atol=1e-11, rtol=0)
        for name, parameter in mixture.named_parameters():
            nothing = torch.zeros_like(parameter)
            ours = grads.get(name, nothing)
            theirs = nothing if parameter.grad is None else parameter.grad
            assert torch.allclose(ours, theirs, atol=1e-11, rtol=0), name


def test_every_case_takes_several_routes():
    """The cases above would prove little if all decisions were the same."""
    mixture = make_mixture(level="sample")
    x, valid = make_input(rows=8)
    mixture.current = Forward(torch.ones_like(x[..., 0], dtype=torch.bool))
    mixture.update(mixture.sites[0], x)
    assert len(set(mixture.sites[0].choice.flatten().tolist())) >= 3


def test_gradcheck():
    mixture = make_mixture(top_k=2, estimator="renormalized")
    x, valid = make_input(rows=2, tokens=3)
    mixture.current = Forward(valid[:2, :3])
    names, parameters = zip(*mixture.named_parameters(), strict=True)

    def run(x, *values):
        mixture.current = Forward(valid[:2, :3])
        out = torch.func.functional_call(
            _Update(mixture), dict(zip(names, values, strict=True)), (x,)
        )
        return out

    x = x.requires_grad_()
    mixture.eval()
    inputs = (x, *[p.detach().clone().requires_grad_() for p in parameters])
    prefixed = ["mixture." + name for name in names]
    names = tuple(prefixed)
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6)


class _Update(nn.Module):
    def __init__(self, mixture):
        super().__init__()
        self.mixture = mixture

    def forward(self, x):
        return self.mixture.update(self.mixture.sites[2], x)


def test_padding_never_votes():
    x, valid = make_input()
    for level in ("batch", "sample"):
        mixture = make_mixture(level=level, top_k=2)
        mixture.current = Forward(valid)
        first = mixture.update(mixture.sites[0], x)
        other = x.clone()
        other[~valid] = 100 * torch.randn(int((~valid).sum()), WIDTH, dtype=x.dtype)
        second = mixture.update(mixture.sites[0], other)
        assert torch.allclose(first[valid], second[valid], atol=1e-12)


@pytest.mark.parametrize("balance_f", ["top_k", "choice"])
@pytest.mark.parametrize("level", ["batch", "sample", "token"])
def test_more_padding_changes_no_balance_loss(level, balance_f):
    """Nor its gradient: forty tokens of padding more, and a row of nothing else."""
    x, valid = make_input()
    generator = torch.Generator().manual_seed(4)
    more = torch.randn(len(x), 40, WIDTH, dtype=x.dtype, generator=generator)
    longer = torch.cat([x, more], dim=1)
    longer = torch.cat([longer, longer[:1]])
    marks = torch.zeros(longer.shape[:2], dtype=torch.bool)
    marks[: len(x), : x.shape[1]] = valid
    found = []
    for states, mask in ((x, valid), (longer, marks)):
        mixture = make_mixture(level=level, balance_f=balance_f, top_k=2)
        mixture.current = Forward(mask)
        site = mixture.sites[2]
        (0 * mixture.update(site, states)).sum().backward()
        gradients = [parameter.grad for parameter in mixture.gates.parameters()]
        found.append([site.loss, *gradients])
    for short, long in zip(*found, strict=True):
        assert torch.allclose(short, long, atol=1e-13, rtol=0)
    assert found[0][1].any()


@pytest.mark.parametrize("vote", VOTES)
@pytest.mark.parametrize("level", ["batch", "sample", "token"])
def test_an_excluded_control_is_not_chosen_where_the_softmax_underflows(level, vote):
    """One control has probability 1, so that the local one's 0 is no smaller than the others'."""
    mixture = make_mixture(gate="linear", level=level, vote=vote, exclude_local=True, top_k=2)
    with torch.no_grad():
        mixture.gates["shared"].weight.mul_(1e6)
    x, valid = make_input()
    for train in (True, False):
        mixture.train(train)
        for site in mixture.sites:
            mixture.current = Forward(valid)
            assert torch.isfinite(mixture.update(site, x)).all()
            assert not (site.choice == site.local).any()
            if train:
                assert not site.balance.slope[:, site.local].any()


@pytest.mark.parametrize("level", ["batch", "sample", "token"])
def test_k_of_one_gives_the_gate_exactly_no_gradient(level):
    """In float32 c/c has a gradient of rounding noise, which Adam would scale up to full steps."""
    mixture = make_mixture(balance_weight=0.0, level=level).float()
    x = torch.randn(16, 9, WIDTH, requires_grad=True)
    mixture.current = Forward(None)
    for site in mixture.sites:
        mixture.update(site, x).square().sum().backward()
    for parameter in mixture.gates.parameters():
        assert parameter.grad is not None
        assert not parameter.grad.any()


def test_alpha_one_is_control():
    x, valid = make_input()
    mixture, control = make_mixture(alpha=1.0), make_mixture(top_k=0)
    state = control.state_dict() | {
        k: v for k, v in mixture.state_dict().items() if k.startswith("controls")
    }
    control.load_state_dict(state)
    mixture.current = control.current = Forward(valid)
    for ours, theirs in zip(mixture.sites, control.sites, strict=True):
        difference = mixture.update(ours, x) - control.update(theirs, x)
        assert difference.abs().max() < 1e-14
    assert not list(control.gates.parameters())


def test_a_pool_of_one_is_control():
    x, _ = make_input()
    one = Mixture(1, WIDTH, ("ffn",), RANK, 1.0, Routing(projection_dim=4)).double()
    nn.init.normal_(one.controls[0]["ffn"].B)
    expected = one.controls[0]["ffn"](x)
    assert torch.allclose(one.update(one.sites[0], x), expected, atol=1e-14)


def test_balanced_use_gives_one():
    """With every token's probability spread evenly, N · Σ f P = 1 whatever the picks."""
    mixture = make_mixture(gate="linear", top_k=2)
    nn.init.zeros_(mixture.gates["shared"].weight)
    x, valid = make_input()
    mixture.current = Forward(valid)
    mixture.update(mixture.sites[0], x)
    assert mixture.sites[0].loss.item() == pytest.approx(1.0)


def test_evaluation_routes_each_row_alone():
    mixture = make_mixture(top_k=2).eval()
    x, valid = make_input()
    mixture.current = Forward(valid)
    together = mixture.update(mixture.sites[3], x)
    for row in range(len(x)):
        mixture.current = Forward(valid[row : row + 1])
        alone = mixture.update(mixture.sites[3], x[row : row + 1])
        assert torch.allclose(together[row], alone[0], atol=1e-13)


def test_running_counts_the_new_token_before_the_choice():
    mixture = make_mixture(top_k=1, vote="mode", decode="running").eval()
    x, _ = make_input(rows=2, tokens=4)
    store = RouteStore()
    mixture.current = Forward(None, store)
    mixture.update(mixture.sites[0], x[:, :3])
    mixture.update(mixture.sites[0], x[:, 3:])
    ours = mixture.sites[0].choice
    mixture.current = Forward(None, RouteStore())
    mixture.update(mixture.sites[0], x)
    assert torch.equal(ours, mixture.sites[0].choice)


def test_top_k_breaks_ties_by_the_lower_index():
    scores = torch.tensor([[0.2, 0.4, 0.4, 0.2], [0.25, 0.25, 0.25, 0.25]])
    for k in (1, 2, 3, 4):
        expected = [best([(v,) for v in row], k) for row in scores.tolist()]
        assert top_k(scores, k).tolist() == expected


def test_bfloat16_states_keep_float32_parameters():
    control = Control(WIDTH, RANK)
    nn.init.normal_(control.B)
    x = torch.randn(2, 3, WIDTH, dtype=torch.bfloat16)
    assert control(x).dtype == torch.bfloat16
    mixture = Mixture(2, WIDTH, ("attn", "ffn"), RANK, 1.0, Routing(projection_dim=4))
    assert mixture.update(mixture.sites[0], x).dtype == torch.bfloat16
    assert {p.dtype for p in mixture.parameters()} == {torch.float32}


def test_the_kinds_of_a_recipe_are_those_that_are_known():
    fields = MocMethod.model_fields
    gate, routing = fields["gate"].annotation, fields["routing"].annotation
    assert set(get_args(gate.model_fields["kind"].annotation)) == set(GATES)
    assert set(get_args(routing.model_fields["vote"].annotation)) == set(VOTES)


@pytest.mark.parametrize("key", ["gate", "vote", "estimator", "level", "decode", "balance_f"])
def test_an_unknown_kind_is_refused(key):
    with refused(ValueError):
        Routing(**{key: "other"})


class TestVoteWhoseScoresDoNotAddUp:
    """The median of the tokens' probabilities, which a vote may be without being in the product."""

    @pytest.fixture(autouse=True)
    def median(self, monkeypatch):
        def score(p, weight, k):
            return p.masked_fill(weight[..., None] == 0, float("nan")).nanmedian(dim=1).values

        monkeypatch.setitem(VOTES, "median", Vote(score, additive=False))
        monkeypatch.setitem(routing_module.ALLOWED, "vote", tuple(VOTES))

    def test_running_decode_refuses_it(self):
        with refused(ValueError):
            Routing(vote="median", decode="running")
        ballot = count(torch.rand(2, 3, 4), None, "sample", "median")
        with refused(ValueError):
            ballot + ballot

    def test_it_ranks_by_the_median(self):
        p = torch.tensor([[[0.1, 0.5, 0.4], [0.1, 0.5, 0.4], [1.0, 0.0, 0.0]]])
        ballot = count(p, None, "sample", "median")
        assert decide(ballot, 1, "renormalized").ids.tolist() == [[1]]
        assert decide(count(p, None, "sample", "mean"), 1, "renormalized").ids.tolist() == [[0]]

    @pytest.mark.parametrize("level", ["sample", "batch"])
    @pytest.mark.parametrize("vote", ["mean", "mode", "median"])
    def test_one_token_decides_as_a_vote_without_it_shows(self, vote, level):
        p = torch.rand(5, 4, 3, dtype=torch.float64).softmax(-1)
        valid = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [0, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 1]])
        ballot = count(p, valid, level, vote)
        route = decide(ballot, 1, "renormalized")
        marked = one_token_decides(Decision(level, route, ballot, None, p, valid))
        rows = [row[mark.bool()] for row, mark in zip(p, valid, strict=True)]
        rows = rows if level == "sample" else [torch.cat(rows)]
        for row, ids, mark in zip(rows, route.ids.tolist(), marked.tolist(), strict=True):
            turned = len(row) == 1
            for token in range(len(row)):
                rest = torch.cat([row[:token], row[token + 1 :]])[None]
                if len(row) > 1:
                    other = decide(count(rest, None, "sample", vote), 1, "renormalized")
                    turned |= other.ids.tolist()[0] != ids
            assert mark == turned


@pytest.mark.parametrize("rows", [1, 3])
def test_a_generation_reads_b_along_its_memory(rows):
    """A product of few rows with a matrix that lies the other way takes several times longer."""
    mixture = make_mixture()
    route = Route(torch.arange(rows)[:, None], torch.ones(rows, 1, dtype=torch.float64))
    weighted = mixture.combine(mixture.sites[0], route)
    stack = weighted.stack(torch.float64)
    assert stack.B.t().is_contiguous()
    x = torch.randn(rows, 1, stack.A.shape[1], dtype=torch.float64)
    assert torch.allclose(stack.update(x), weighted.update(x), atol=1e-12)
