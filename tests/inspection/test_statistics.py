"""The numbers of routing.json where several controls are routed, and where gates are not shared."""

from types import SimpleNamespace

import pytest
import torch
from support.models import make_batch, make_byte_tokenizer, make_tiny, train_controls

from moc_cli.inspection.ablation import local_at
from moc_cli.inspection.statistics import control_norm, matrices, per_control, per_site, summary
from moc_cli.inspection.tokens import text_votes
from moc_cli.kinds import Choice
from moc_cli.methods import attach
from moc_cli.recipe.methods import MocMethod


def make(**method):
    fields = {"rank": 4, "top_k": 2, "alpha": 0.6, "gate": {"projection_dim": 8}} | method
    model = make_tiny("llama").eval()
    adapted = attach(model, MocMethod.model_validate(fields), new_modules=(), seed=1)
    train_controls(adapted.named_trainables())
    return adapted


def run(adapted):
    recorder = adapted.recorder()
    with recorder, torch.no_grad():
        adapted.model(**make_batch(side="left"))
    return recorder.record()


def test_shares_are_of_the_choices_of_each_site():
    adapted = make()
    record, mixture = run(adapted), adapted.mixture
    found = matrices(record)
    counts = torch.tensor(found["counts"], dtype=torch.float64)
    assert found["decisions"] == len(make_batch()["input_ids"])
    assert counts.sum(1).tolist() == [2 * found["decisions"]] * len(mixture.sites)
    assert torch.allclose(torch.tensor(found["share"]).double(), counts / counts.sum(1)[0])
    pool = record.summary()["pools"]["shared"]
    assert pool["decisions"] == found["decisions"] * len(mixture.sites)
    numbers = per_site(record, "sample")
    share = counts / counts.sum(1, keepdim=True)
    assert [site["local_share"] for site in numbers] == pytest.approx(share.diagonal().tolist())
    entropy = torch.special.entr(share).sum(1)
    assert [s["effective"] for s in numbers] == pytest.approx(entropy.exp().tolist())
    whole = summary(record, mixture)
    attn, ffn = counts[::2], counts[1::2]
    assert whole["attn_to_ffn"] == pytest.approx((attn[:, 1::2].sum() / attn.sum()).item())
    assert whole["ffn_to_attn"] == pytest.approx((ffn[:, ::2].sum() / ffn.sum()).item())
    assert whole["local_share"] == pytest.approx((counts.diagonal().sum() / counts.sum()).item())
    assert whole["chance_local"] == pytest.approx(1 / len(mixture.sites))
    excluded = make(routing={"exclude_local": True})
    assert summary(run(excluded), excluded.mixture)["chance_local"] == 0


def test_local_shares_where_gates_are_not_shared():
    """A site's own control has the place of its layer in a pool of attention or FFN controls."""
    record = run(make(share_gate=False))
    layers = len(record.layout.names) // 2
    counts = torch.arange(1, layers + 1, dtype=torch.float64)
    record.sums.counts.copy_(counts.expand_as(record.sums.counts))
    local = [site["local_share"] for site in per_site(record, "sample")]
    expected = [(site // 2 + 1) / counts.sum().item() for site in range(2 * layers)]
    assert local == pytest.approx(expected)


def test_norms_hold_the_scale():
    adapted = make(scale=0.5)
    mixture = adapted.mixture
    norms = [entry["norm"] for entry in per_control(run(adapted), mixture, 0.5)]
    expected = [0.5 * control_norm(mixture.control(site.index)) for site in mixture.sites]
    assert norms == pytest.approx(expected)


def test_an_ablated_site_alone_runs_its_own_control():
    adapted = make(share_gate=False)
    mixture = adapted.mixture
    run(adapted)
    before = [site.choice for site in mixture.sites]
    for site in mixture.sites:
        with local_at(mixture, site.index):
            run(adapted)
        assert (site.choice == site.local).all()
        earlier = mixture.sites[: site.index]
        assert all(torch.equal(other.choice, before[other.index]) for other in earlier)
    assert mixture.reroute is None


def test_the_votes_of_a_text_name_sites_where_gates_are_not_shared():
    adapted = make(share_gate=False)
    mixture = adapted.mixture
    trained = SimpleNamespace(adapted=adapted, tokenizer=make_byte_tokenizer(), kind=Choice())
    _, found = text_votes(trained, "what is red?")
    for site in mixture.sites:
        pool = mixture.pools[site.pool]
        assert set(found["votes"][site.index]) <= set(pool)
        assert found["choice"][site.index] == [pool[k] for k in site.choice[0].tolist()]
