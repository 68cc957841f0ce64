"""Several processes score what one does, item for item, and stop together."""

import os
import signal
from collections.abc import Callable, Collection
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from support.group import alone, run_together
from support.models import make_byte_tokenizer, make_pair_tokenizer, make_tiny_model
from support.questions import MIXED, PAIRS, adapted, question
from support.short_memory import room_for
from torch.distributed.fsdp import fully_shard

from moc_cli.data.encode import encode_texts
from moc_cli.data.examples import InstructionExample, PairExample
from moc_cli.errors import MocError
from moc_cli.kinds import Choice, Instruction, Pairs
from moc_cli.methods import TextModel, bare
from moc_cli.processes import Elsewhere, Processes
from moc_cli.scoring import batch_size as sizing
from moc_cli.scoring.batch_size import BatchSize, RowCost, row_bytes, run_batches
from moc_cli.scoring.loss import lm_loss
from moc_cli.scoring.rank import rank
from moc_cli.scoring.results import ScoringOptions
from moc_cli.training.interrupt import Interrupt, Interrupted

WRITTEN = [
    InstructionExample("t", "say " * (number * 3 % 5 + 1), "ja" * (number % 3 + 1))
    for number in range(7)
]
RATED = [PairExample("stsb", pair.text_a, pair.text_b, 0.5 * pair.label) for pair in PAIRS]
QUESTIONS = [question(number) for number in range(7)]

Score = Callable[[], Any]


def scores() -> dict[str, Score]:
    """Of each way to score: what it finds, with what `moc eval` writes of it but for the time."""
    bytes_, pairs = make_byte_tokenizer(), make_pair_tokenizer()
    language = TextModel(adapted(make_tiny_model("llama")), bytes_)
    bert = {"type_vocab_size": 2}
    classifier = TextModel(adapted(make_tiny_model("bert", num_labels=2, **bert)), pairs)
    rater = TextModel(adapted(make_tiny_model("bert", num_labels=1, **bert)), pairs)

    def evaluation(model: TextModel, kind: Any, rows: list, protocol: Any, size: int = 2) -> Score:
        def score() -> Any:
            done = kind.score(model, rows, ScoringOptions(size, 64, protocol))
            return done.items, done.metrics, done.batch

        return score

    encoded = encode_texts(MIXED, bytes_, max_length=64)
    return {
        "rank": evaluation(language, Choice(), QUESTIONS, "rank"),
        "generate": evaluation(language, Choice(), QUESTIONS[:2], "generate", 1),
        "classify": evaluation(classifier, Pairs(("accuracy",), 2), PAIRS, "classify"),
        "regression": evaluation(rater, Pairs(("pearson",), 1), RATED, "classify"),
        "written": evaluation(language, Instruction(), WRITTEN, "texts"),
        "loss": lambda: lm_loss(language, encoded, batch_size=3),
        "fewer batches than processes": lambda: rank(language, MIXED[:2], batch_size=8),
        "no items": lambda: run_batches(language.adapted, [], lambda items: items, size=2),
    }


def score_what_one_scores(group: Processes, names: Collection[str] = ()) -> None:
    """In all ways, or in those named."""
    for name, score in scores().items():
        if names and name not in names:
            continue
        with alone():
            expected = score()
        assert score() == expected, name


def count_what_one_counts(group: Processes) -> None:
    """Also where the last process has to halve its batches."""
    model = TextModel(adapted(make_tiny_model("llama")), make_byte_tokenizer())
    records = []
    encoded = encode_texts(MIXED, model.tokenizer, max_length=64)
    rows = 1 if group.rank == group.world - 1 else 2
    short = room_for(model.adapted.model, rows)
    for around in (alone(), nullcontext(), short):
        with around, model.adapted.recorder() as recorder:
            lm_loss(model, encoded, batch_size=2)
            records.append(recorder.record())
    one, several, halved = records
    assert one.choices() == several.choices() == halved.choices()
    for a, b in zip(one.sums.arrays, several.sums.arrays, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)  # added up in another order


def take_the_smallest_size(group: Processes) -> None:
    """Each finds other free memory, which all share, and all must cut the same batches."""
    model, seen = bare(make_tiny_model("llama")), []
    cost = RowCost(3)

    def work(items: list[int]) -> list[int]:
        seen.append(len(items))
        return items

    size = BatchSize()
    with pytest.MonkeyPatch.context() as patch:
        rows = 2 * group.world * (5 - group.rank)  # the half of it is used
        patch.setattr(sizing, "free_bytes", lambda device: rows * row_bytes(model.model, cost) + 1)
        assert run_batches(model, [cost] * 24, work, size=size) == list(range(24))
    smallest = 6 - group.world
    assert (size.used, set(seen)) == (smallest, {smallest})


def halve_on_one(group: Processes) -> None:
    """The last process has less memory; the others keep their batches."""
    model, seen, progress = bare(make_tiny_model("llama")), [], []
    last = group.rank == group.world - 1

    def work(items: list[int]) -> list[int]:
        if last and len(items) > 2:
            raise MemoryError
        seen.append(len(items))
        return items

    size = BatchSize(4)
    count = 4 * group.world * 2
    found = run_batches(
        model,
        [RowCost(3)] * count,
        work,
        size=size,
        on_progress=lambda *done: progress.append(done),
    )
    assert found == list(range(count))
    assert seen == ([2, 2, 2, 2] if last else [4, 4])
    assert (size.used, size.halved) == (2, 1)
    rounds = group.gather(progress)
    assert all(each == rounds[0] for each in rounds)
    assert (len(progress), progress[-1]) == (4, (count, count))


def fail_on_one(group: Processes) -> None:
    """One row does not fit in one process: all end with that sentence."""
    last = group.world - 1

    def work(items: list[int]) -> list[int]:
        if group.rank == last:
            raise MemoryError
        return items

    with pytest.raises(MocError, match=f"process {last} on .*: one row of 3 tokens") as caught:
        run_batches(bare(make_tiny_model("llama")), [RowCost(3)] * 12, work, size=2)
    assert isinstance(caught.value, Elsewhere) == (not group.main)


def stop_by_a_signal_to_one(group: Processes) -> None:
    done: list[int] = []

    def work(items: list[int]) -> list[int]:
        if group.rank == 1 and done:
            os.kill(os.getpid(), signal.SIGTERM)
        return items

    with Interrupt() as interrupt:

        def observe(count: int, total: int) -> None:
            done.append(count)
            interrupt.check()

        with pytest.raises(Interrupted, match="SIGTERM"):
            run_batches(
                bare(make_tiny_model("llama")), [RowCost(3)] * 99, work, size=2, on_progress=observe
            )
    assert done == [2 * group.world, 4 * group.world]


def score_with_split_weights(group: Processes) -> None:
    """Each forward needs all processes: every one does all of the work, and it counts once."""
    model = TextModel(adapted(make_tiny_model("llama")), make_byte_tokenizer())
    kind, options = Instruction(), ScoringOptions(2, 64, "texts")
    with alone(), model.adapted.recorder(detailed=False) as recorder:
        expected = kind.score(model, WRITTEN[:3], options).items
        counted = recorder.record().choices()
    network: Any = model.adapted.model
    for layer in network.model.layers:
        fully_shard(layer, ignored_params=set(model.adapted.named_trainables().values()))
    with model.adapted.recorder(detailed=False) as recorder:
        assert kind.score(model, WRITTEN[:3], options).items == expected
    assert recorder.record().choices() == counted


def all_of_it(group: Processes) -> None:
    score_what_one_scores(group)
    count_what_one_counts(group)
    take_the_smallest_size(group)
    halve_on_one(group)
    fail_on_one(group)
    stop_by_a_signal_to_one(group)
    score_with_split_weights(group)


def test_two_processes_score_what_one_scores_and_stop_together() -> None:
    run_together(all_of_it, 2)


def test_three_processes_score_what_one_scores() -> None:
    run_together(score_what_one_scores, 3, ("rank", "classify", "written"))
