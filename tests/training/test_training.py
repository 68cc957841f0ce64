"""The loop's laws, on a model small enough to check by hand."""

import contextlib
import json
import math
import os
import signal
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.messages import refused
from support.processes import run_program
from support.tiny_runs import without_measured
from support.toy import POISON, Plan, ToyAdapted, toy_collate, toy_data, toy_fit, toy_rows
from torch import Tensor, nn
from transformers import get_scheduler
from transformers.loss.loss_utils import ForCausalLMLoss

from moc_cli.errors import MocError
from moc_cli.kinds.loss import ClassLoss, LanguageLoss, ScoreLoss, TaskLoss
from moc_cli.training import memory, optim, rng
from moc_cli.training.best import out_of_patience, update_best
from moc_cli.training.checkpoint import Checkpoints, Counters, read_checkpoint
from moc_cli.training.interrupt import Interrupt, Interrupted
from moc_cli.training.log import MEASURED, require_trackers
from moc_cli.training.loop import Loop
from moc_cli.training.loop_types import Data, Settings, StepReport, total_steps

SETTINGS = Settings(seed=3, learning_rate=0.05, num_train_epochs=2, logging_steps=1)
BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [8]]


def read_lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def comparable(folder) -> list[dict]:
    return [without_measured(line) for line in read_lines(folder)]


# Windows


def test_split_into_micro_batches_changes_nothing(tmp_path):
    whole, split = ToyAdapted(), ToyAdapted()
    toy_fit(tmp_path / "a", whole, toy_data([[0, 1, 2, 3], [4, 5, 6, 7], [8]]), SETTINGS)
    n2 = replace(SETTINGS, gradient_accumulation_steps=2)
    toy_fit(tmp_path / "b", split, toy_data(BATCHES), n2)
    for name, value in whole.state().items():
        torch.testing.assert_close(split.state()[name], value, rtol=1e-5, atol=1e-6)
    ours, theirs = comparable(tmp_path / "b"), comparable(tmp_path / "a")
    assert len(ours) == len(theirs) == 6
    for one, other in zip(ours, theirs, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert one["tokens"] == other["tokens"]


def test_first_gradient_is_that_of_the_mean_over_the_window_s_targets(tmp_path):
    adapted, rows = ToyAdapted(), toy_rows(9)
    reference = ToyAdapted()
    total, count = torch.zeros(()), 0
    for row in rows[:4]:
        logits = reference.model(torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
        for position, label in enumerate(row["labels"][1:]):
            if label != -100:
                total = total + F.cross_entropy(logits[position], torch.tensor(label))
                count += 1
    (total / count).backward()
    grads = [p.grad for p in reference.named_trainables().values()]
    norm = torch.cat([grad.flatten() for grad in grads]).norm().item()
    once = replace(SETTINGS, max_steps=1, gradient_accumulation_steps=2, max_grad_norm=0.0)
    toy_fit(tmp_path, adapted, toy_data(BATCHES), once)
    (line,) = read_lines(tmp_path)
    assert line["loss"] == pytest.approx((total / count).item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_balance_scale_follows_the_real_window(tmp_path):
    adapted = ToyAdapted()
    toy_fit(tmp_path, adapted, toy_data(BATCHES), replace(SETTINGS, gradient_accumulation_steps=2))
    assert adapted.scales == [0.5, 0.5, 1.0] * 2


def test_steps_are_counted_in_whole_windows():
    plan = Plan(BATCHES)
    two = replace(SETTINGS, gradient_accumulation_steps=2)
    assert total_steps(two, plan) == 6
    assert total_steps(replace(two, num_train_epochs=1.5), plan) == 5
    assert total_steps(replace(two, num_train_epochs=0.01), plan) == 1
    assert total_steps(replace(two, max_steps=40), plan) == 40


def test_epochs_are_whole_and_all_rows_are_seen(tmp_path):
    seen: list[int] = []
    rows = toy_rows(9)

    def collate(numbers: list[int]) -> dict[str, Tensor]:
        seen.extend(numbers)
        return toy_collate(rows, numbers)

    two = replace(SETTINGS, gradient_accumulation_steps=2)
    outcome = toy_fit(tmp_path, ToyAdapted(), Data(Plan(BATCHES, True), collate), two)
    assert sorted(seen[:9]) == sorted(seen[9:]) == list(range(9))
    assert seen[:9] != seen[9:]
    assert (outcome.stopped, outcome.epochs, outcome.counters.examples) == ("finished", 2.0, 18)
    tokens = 2 * sum(len(row["input_ids"]) for row in rows)
    assert outcome.counters.tokens == tokens
    assert outcome.padding_share == pytest.approx(1 - tokens / outcome.counters.positions)
    assert 0 < outcome.padding_share < 0.5


def test_gradient_is_clipped(tmp_path):
    sgd = replace(SETTINGS, max_steps=1, max_grad_norm=0.1)
    adapted = ToyAdapted()
    toy_fit(tmp_path, adapted, toy_data(BATCHES), sgd)
    moments = read_checkpoint(tmp_path / "checkpoints/step-000001").optimizer
    first = [value for name, value in moments.items() if name.endswith("exp_avg")]
    # AdamW's first moment after one step is 0.1 of the gradient it was given.
    assert torch.cat([m.flatten() for m in first]).norm().item() == pytest.approx(0.01, rel=1e-4)
    assert read_lines(tmp_path)[0]["grad_norm"] > 0.1


# Losses, rates, groups


class Outputs(nn.Module):
    """A model whose logits are given."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.logits)


def loss_of(
    logits: torch.Tensor, labels: torch.Tensor, kind: type[TaskLoss] = LanguageLoss
) -> torch.Tensor:
    """The loss of a batch under given logits, divided by the number of its targets."""
    batch = {"input_ids": torch.zeros(labels.shape[0], 1), "labels": labels}
    targets = max(1, kind.count_targets(labels))
    return kind(Outputs(logits), torch.device("cpu"))(batch, targets)


def test_causal_loss_is_transformers():
    logits, labels = torch.randn(3, 7, 11), torch.randint(0, 11, (3, 7))
    labels[0, :4] = -100
    labels[2, 5:] = -100
    mean = ForCausalLMLoss(logits, labels, vocab_size=11)
    assert LanguageLoss.count_targets(labels) == 3 * 6 - 3 - 2
    torch.testing.assert_close(loss_of(logits, labels), mean)


def test_losses_of_rows_and_of_low_precision_logits():
    logits = torch.randn(4, 3).bfloat16()
    labels = torch.tensor([0, 2, 1, 1])
    value = loss_of(logits, labels, ClassLoss)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, F.cross_entropy(logits.float(), labels))
    targets = torch.tensor([0.5, 1.0, 5.0, 2.5])
    expected = ((logits[:, 0].float() - targets) ** 2).mean()
    torch.testing.assert_close(loss_of(logits[:, :1], targets, ScoreLoss), expected)


def test_a_batch_without_targets_costs_nothing():
    logits = torch.randn(2, 4, 11, requires_grad=True)
    value = loss_of(logits, torch.full((2, 4), -100))
    value.backward()
    assert value.item() == 0.0
    assert logits.grad is not None
    assert not logits.grad.any()


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 4])
def test_rates_are_transformers(kind, warmup):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    name = "constant_with_warmup" if kind == "constant" else kind
    schedule = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=15)
    for step in range(15):
        ours = optim.rate_factor(step, kind=kind, total=15, warmup=warmup)
        assert ours == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


def test_logged_rate_follows_the_schedule(tmp_path):
    warm = replace(SETTINGS, warmup_ratio=0.3)
    toy_fit(tmp_path, ToyAdapted(), toy_data(BATCHES), warm)
    rates = [line["lr"] for line in read_lines(tmp_path)]
    assert rates[:4] == pytest.approx([0.0, 0.05 / 3, 0.1 / 3, 0.05])
    assert rates[4:] == pytest.approx([0.05 * (7 - i) / 7 for i in range(1, 7)])


def test_weight_decay_spares_the_named(tmp_path):
    named = {"gates.ffn.weight": nn.Parameter(torch.ones(2)), "a": nn.Parameter(torch.ones(2))}
    settings = Settings(learning_rate=0.1, weight_decay=0.5)
    optimizer = optim.build_optimizer(named, {"gates.ffn.weight"}, settings)
    for parameter in named.values():
        parameter.grad = torch.zeros(2)
    optimizer.step()
    assert named["gates.ffn.weight"].tolist() == [1.0, 1.0]
    assert named["a"].tolist() == pytest.approx([0.95, 0.95])


def test_the_gate_has_a_rate_of_its_own_on_the_same_schedule(tmp_path):
    """AdamW's first step is as long as its rate; the toy's gate is its bias."""
    settings = replace(SETTINGS, weight_decay=0.0, gate_learning_rate=0.002)
    settings = replace(settings, max_steps=2, warmup_steps=1, max_grad_norm=0.0)
    before, adapted, seen = ToyAdapted().state(), ToyAdapted(), []
    observe = lambda report: seen.append(adapted.state())  # noqa: E731
    toy_fit(tmp_path, adapted, toy_data(BATCHES), settings, observe=observe)
    assert all(torch.equal(seen[0][name], before[name]) for name in before)  # the warm-up's first
    for name, rate in (("head.bias", 0.002), ("head.weight", 0.05)):
        assert (seen[1][name] - before[name]).abs().max().item() <= 1.01 * rate, name
        assert (seen[1][name] - before[name]).abs().max().item() >= 0.5 * rate, name
    assert [line["lr"] for line in read_lines(tmp_path)] == [0.0, 0.05]


# Logs


def test_a_line_holds_means_and_its_clock_apart(tmp_path):
    every, third = tmp_path / "every", tmp_path / "third"
    toy_fit(every, ToyAdapted(), toy_data(BATCHES), SETTINGS)
    toy_fit(third, ToyAdapted(), toy_data(BATCHES), replace(SETTINGS, logging_steps=4))
    losses = [line["loss"] for line in read_lines(every)]
    lines = read_lines(third)
    assert [line["step"] for line in lines] == [4, 8, 10]
    assert lines[0]["loss"] == pytest.approx(sum(losses[:4]) / 4)
    assert lines[1]["loss"] == pytest.approx(sum(losses[4:8]) / 4)
    assert lines[2]["loss"] == pytest.approx(sum(losses[8:]) / 2)
    assert set(lines[0]) == {
        *("step", "epoch", "loss", "balance_loss", "lr", "grad_norm", "examples", "tokens"),
        MEASURED,
    }
    clock = lines[1][MEASURED]
    speed = (lines[1]["examples"] - lines[0]["examples"]) / (
        clock["seconds"] - lines[0][MEASURED]["seconds"]
    )
    assert clock["examples_per_second"] == pytest.approx(speed)
    assert clock["memory"] > 2**20
    assert losses[-1] < losses[0] - 0.5


def test_lines_beyond_the_checkpoint_are_cut_on_resume(tmp_path):
    settings = replace(SETTINGS, save_strategy="steps", save_steps=3)
    toy_fit(tmp_path, ToyAdapted(), toy_data(BATCHES), settings)
    whole = comparable(tmp_path)
    third = read_checkpoint(tmp_path / "checkpoints/step-000003")
    assert third.counters.log_lines < len(whole)
    toy_fit(tmp_path, ToyAdapted(), toy_data(BATCHES), settings, resume=third)
    assert comparable(tmp_path) == whole


def test_missing_tracker_is_named():
    require_trackers([])
    with refused(MocError):
        require_trackers(["no_such_tracker"])


def test_the_peak_of_training_is_not_that_of_an_evaluation(tmp_path, monkeypatch):
    """Peaks on a device that answers as told: steps take 5 and then 7, evaluations 90."""
    peak = [0]

    def use(size):
        peak[0] = max(peak[0], size)

    monkeypatch.setattr(memory, "peak_bytes", lambda device: peak[0])
    monkeypatch.setattr(memory, "reset_peak", lambda device: peak.__setitem__(0, 0))
    train_step = Loop.train_step

    def step(self):
        use(5 if self.counters.step < 2 else 7)
        return train_step(self)

    monkeypatch.setattr(Loop, "train_step", step)
    settings = replace(SETTINGS, eval_strategy="steps", eval_steps=2, max_steps=4)

    def evaluate():
        use(90)
        return {"loss": 1.0}

    outcome = toy_fit(tmp_path, ToyAdapted(), toy_data(BATCHES), settings, evaluate=evaluate)
    assert (outcome.memory.peak, outcome.memory.evaluation_peak) == (7, 90)
    shown = [
        (set(line) & {"loss", "eval"}, line[MEASURED]["memory"]) for line in read_lines(tmp_path)
    ]
    assert shown == [({"loss"}, 5)] * 2 + [({"eval"}, 90)] + [({"loss"}, 7)] * 2 + [({"eval"}, 90)]


def test_peak_memory_sees_what_was_taken_and_given_back():
    """In a process of its own: one that has freed much takes 64 MB without growing."""
    code = """if True:
        import torch
        from moc_cli.training import memory

        device = torch.device("cpu")
        memory.reset_peak(device)
        before = memory.peak_bytes(device)
        held = torch.ones(64 * 2**20 // 4)
        del held
        print(memory.peak_bytes(device) - before)
    """
    done = run_program(code)
    assert 50 * 2**20 < int(done.stdout) < 100 * 2**20


# A loss that is not finite


def poisoned(bad_row: int) -> Data:
    """Toy data in which one row holds a token that the model answers with NaN."""
    rows = toy_rows(9)
    rows[bad_row]["input_ids"][-2] = POISON
    return Data(Plan(BATCHES), lambda numbers: toy_collate(rows, numbers))


def poisoned_model() -> ToyAdapted:
    adapted = ToyAdapted(dropout=0.3)
    adapted.model.embedding.weight[POISON] = math.nan
    return adapted


def test_nan_names_its_batch_and_keeps_the_state_before(tmp_path):
    two = replace(SETTINGS, gradient_accumulation_steps=2)
    good, bad = tmp_path / "good", tmp_path / "bad"
    rows = toy_rows(9)
    for row in rows:
        row["input_ids"] = row["input_ids"][:2] * 3
        row["labels"] = list(row["input_ids"])
    safe = Data(Plan(BATCHES), lambda numbers: toy_collate(rows, numbers))
    toy_fit(good, ToyAdapted(dropout=0.3), safe, replace(two, max_steps=1))

    poisonous = [dict(row) for row in rows]
    poisonous[7] = {"input_ids": [POISON] * 6, "labels": [5] * 6}
    data = Data(Plan(BATCHES), lambda numbers: toy_collate(poisonous, numbers))
    with refused(MocError):
        toy_fit(bad, poisoned_model(), data, replace(two, max_steps=1 + 1), command="moc train r")
    assert Checkpoints(bad / "checkpoints").steps() == [1]
    for part in ("trainables", "optimizer", "rng"):
        name = f"checkpoints/step-000001/{part}.safetensors"
        assert (bad / name).read_bytes() == (good / name).read_bytes(), part


def test_nan_comes_back_at_the_same_place_after_a_resume(tmp_path):
    messages = []
    resume = None
    for _ in range(2):
        with refused(MocError) as caught:
            toy_fit(tmp_path, poisoned_model(), poisoned(5), SETTINGS, resume=resume)
        messages.append(caught.value.message)
        resume = read_checkpoint(tmp_path / "checkpoints/step-000002")
    assert messages[0] == messages[1]


class Exploding(torch.autograd.Function):
    """The identity, with an infinite gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * math.inf


def test_infinite_gradient_stops_the_run_too(tmp_path):
    adapted = ToyAdapted()
    adapted.model.dropout.forward = lambda x: x
    adapted.model.head.register_forward_hook(lambda m, i, out: Exploding.apply(out))
    before = adapted.state()
    with refused(MocError, value="(?<=norm is )(nan|inf)"):
        toy_fit(tmp_path, adapted, toy_data(BATCHES), SETTINGS)
    assert all(torch.equal(value, before[name]) for name, value in adapted.state().items())


# Evaluation, best, patience


def scripted(values: list[float], name: str = "accuracy"):
    left = list(values)

    def evaluate() -> dict[str, float]:
        torch.rand(3)  # an evaluation that draws must not change the training
        return {name: left.pop(0)}

    return evaluate


EVALUATED = replace(SETTINGS, eval_strategy="steps", eval_steps=2, metric="accuracy")


def test_evaluation_leaves_no_trace_in_the_training(tmp_path):
    plain, watched = ToyAdapted(dropout=0.5), ToyAdapted(dropout=0.5)
    modes = []

    def evaluate() -> dict[str, float]:
        modes.append((watched.model.training, torch.is_grad_enabled()))
        return {"accuracy": torch.rand(()).item()}

    toy_fit(tmp_path / "a", plain, toy_data(BATCHES), SETTINGS)
    toy_fit(tmp_path / "b", watched, toy_data(BATCHES), EVALUATED, evaluate=evaluate)
    assert modes == [(False, False)] * 5
    for name, value in plain.state().items():
        assert torch.equal(watched.state()[name], value)


def test_best_and_last_survive_the_limit(tmp_path):
    values = [0.2, 0.9, 0.4, 0.9, 0.5]
    every = replace(EVALUATED, save_strategy="steps", save_steps=1)
    outcome = toy_fit(
        tmp_path, ToyAdapted(), toy_data(BATCHES), every, evaluate=scripted(values), limit=2
    )
    assert Checkpoints(tmp_path / "checkpoints").steps() == [4, 10]
    assert (outcome.counters.best_step, outcome.counters.best_value) == (4, 0.9)
    lines = [line for line in read_lines(tmp_path) if "eval" in line]
    assert [line["best"] for line in lines] == [True, True, False, False, False]
    assert [line["eval"]["accuracy"] for line in lines] == values


def test_the_best_checkpoint_holds_the_best_step_s_weights(tmp_path):
    adapted, seen = ToyAdapted(), {}

    def observe(report: StepReport) -> None:
        seen[report.step] = adapted.state()

    toy_fit(
        tmp_path,
        adapted,
        toy_data(BATCHES),
        EVALUATED,
        evaluate=scripted([0.1, 0.2, 0.9, 0.3, 0.4]),
        observe=observe,
    )
    best = read_checkpoint(tmp_path / "checkpoints/step-000006").trainables
    assert all(torch.equal(best[name], value) for name, value in seen[6].items())


@pytest.mark.parametrize("metric", ["loss", "perplexity"])
def test_loss_is_better_when_lower_and_nan_is_never_best(metric):
    counters = Counters()
    verdicts = []
    for step, value in enumerate([math.nan, 2.0, 1.5, 1.5, math.nan, 1.0], 1):
        counters.step = step
        verdicts.append(update_best(counters, {metric: value}, metric))
    assert verdicts == [False, True, True, False, False, True]
    assert (counters.best_value, counters.best_step, counters.bad_evaluations) == (1.0, 6, 0)
    with refused(MocError):
        update_best(counters, {"loss": 1.0}, "f1")


def test_patience_stops_the_run(tmp_path):
    patient = replace(EVALUATED, patience=2)
    values = [0.5, 0.4, 0.6, 0.6, 0.1]
    longer = replace(patient, num_train_epochs=4)
    outcome = toy_fit(tmp_path, ToyAdapted(), toy_data(BATCHES), longer, evaluate=scripted(values))
    assert (outcome.stopped, outcome.counters.step, outcome.counters.best_step) == ("early", 10, 6)
    assert Checkpoints(tmp_path / "checkpoints").steps()[-1] == 10
    assert not out_of_patience(outcome.counters, None)


def test_epoch_strategy_evaluates_and_saves_at_epochs_ends(tmp_path):
    by_epoch = replace(SETTINGS, eval_strategy="epoch", save_strategy="epoch", max_steps=12)
    toy_fit(tmp_path, ToyAdapted(), toy_data(BATCHES), by_epoch, evaluate=scripted([0.1] * 3))
    lines = [line for line in read_lines(tmp_path) if "eval" in line]
    assert [(line["step"], line["epoch"]) for line in lines] == [(5, 1.0), (10, 2.0), (12, 2.4)]
    assert Checkpoints(tmp_path / "checkpoints").steps() == [5, 10, 12]


# Stopping and going on


def stopping(step: int, number: int = signal.SIGTERM):
    def observe(report: StepReport) -> None:
        if report.step == step:
            os.kill(os.getpid(), number)

    return observe


def run_with_stops(folder, stops: list[int], settings: Settings, values: list[float]):
    """Run, stopped by a signal after each of `stops`, resumed each time from the newest."""
    data = toy_data(BATCHES, shuffled=True)
    checkpoints = Checkpoints(folder / "checkpoints")
    for stop in [*stops, None]:
        found = checkpoints.newest(pytest.fail)
        done = found[1].counters.evaluated_step // 2 if found else 0
        rng.seed_everything(1234 + len(stops))  # what a new process would have: anything
        stopped = refused(Interrupted) if stop else None
        with stopped or contextlib.nullcontext() as caught, Interrupt() as interrupt:
            toy_fit(
                folder,
                ToyAdapted(dropout=0.5),
                data,
                settings,
                evaluate=scripted(values[done:]),
                resume=found[1] if found else None,
                interrupt=interrupt,
                observe=stopping(stop) if stop else None,
            )
        assert caught is None or caught.value.exit_code == 128 + signal.SIGTERM


@pytest.mark.parametrize("stops", [[1], [2], [3], [2, 3, 5], [6]])
def test_resumed_equals_uninterrupted_bit_for_bit(tmp_path, stops):
    settings = replace(
        EVALUATED,
        gradient_accumulation_steps=2,
        gate_learning_rate=0.2,
        logging_steps=4,
        warmup_steps=2,
        save_strategy="steps",
        save_steps=3,
    )
    values = [0.3, 0.7, 0.2]
    run_with_stops(tmp_path / "whole", [], settings, values)
    run_with_stops(tmp_path / "parts", stops, settings, values)
    assert comparable(tmp_path / "parts") == comparable(tmp_path / "whole")
    for part in ("trainables", "optimizer", "rng"):
        name = f"checkpoints/step-000006/{part}.safetensors"
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_signal_during_an_evaluation_leaves_it_for_the_resume(tmp_path):
    def interrupted_evaluation() -> dict[str, float]:
        raise Interrupted(signal.SIGINT)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    data, values = toy_data(BATCHES), [0.3, 0.7, 0.2, 0.1, 0.1]
    toy_fit(whole, ToyAdapted(0.5), data, EVALUATED, evaluate=scripted(values))
    with refused(Interrupted) as caught:
        toy_fit(parts, ToyAdapted(0.5), data, EVALUATED, evaluate=interrupted_evaluation)
    assert caught.value.exit_code == 130
    found = Checkpoints(parts / "checkpoints").newest(pytest.fail)
    toy_fit(parts, ToyAdapted(0.5), data, EVALUATED, evaluate=scripted(values), resume=found[1])
    assert comparable(parts) == comparable(whole)


def test_second_ctrl_c_aborts_at_once():
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.signal == signal.SIGINT
        with refused(Interrupted):
            interrupt.check()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_more_epochs_go_on_from_the_end(tmp_path):
    toy_fit(tmp_path, ToyAdapted(), toy_data(BATCHES), SETTINGS)
    end = read_checkpoint(tmp_path / "checkpoints/step-000010")
    more = replace(SETTINGS, num_train_epochs=3)
    outcome = toy_fit(tmp_path, ToyAdapted(), toy_data(BATCHES), more, resume=end)
    assert outcome.counters.step == 15
    assert [line["step"] for line in read_lines(tmp_path)] == list(range(1, 16))


def test_resume_of_a_finished_run_takes_no_step(tmp_path):
    adapted = ToyAdapted()
    toy_fit(tmp_path, adapted, toy_data(BATCHES), SETTINGS)
    end = read_checkpoint(tmp_path / "checkpoints/step-000010")
    again = ToyAdapted()
    lines = (tmp_path / "metrics.jsonl").read_bytes()
    outcome = toy_fit(tmp_path, again, toy_data(BATCHES), SETTINGS, resume=end)
    assert outcome.counters.step == 10
    assert all(torch.equal(again.state()[n], value) for n, value in adapted.state().items())
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines


@pytest.mark.parametrize("changes", [{}, {"group_by_length": True}, {"group_by_length": False}])
def test_a_step_that_does_not_fit_in_memory_keeps_the_state_before(changes, tmp_path, monkeypatch):
    settings = replace(SETTINGS, per_device_train_batch_size=9, gradient_accumulation_steps=1)
    settings = replace(settings, activation_checkpointing="full" if changes else "none", **changes)
    rows = toy_rows(9)
    data = Data(Plan(BATCHES), lambda numbers: toy_collate(rows, numbers))
    good, bad = tmp_path / "good", tmp_path / "bad"
    toy_fit(good, ToyAdapted(dropout=0.3), data, replace(settings, max_steps=1))
    task_loss, calls = TaskLoss.__call__, []

    def short(self, batch, targets):
        calls.append(batch["input_ids"].shape)
        value = task_loss(self, batch, targets)
        if len(calls) == 2:
            value.backward()
            raise torch.OutOfMemoryError("CUDA out of memory")
        return value

    monkeypatch.setattr(TaskLoss, "__call__", short)
    with refused(MocError):
        toy_fit(
            bad,
            ToyAdapted(dropout=0.3),
            data,
            replace(settings, max_steps=2),
            command="moc train r --resume auto",
        )
    for part in ("trainables", "optimizer", "rng"):
        name = f"checkpoints/step-000001/{part}.safetensors"
        assert (bad / name).read_bytes() == (good / name).read_bytes(), part
