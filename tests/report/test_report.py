"""What the user sees: tables and plain rows say the same; progress goes to stderr, or nowhere."""

import io
from dataclasses import dataclass
from typing import Any

import pytest
from rich.console import Console, RenderableType

from moc_cli.report import numbers, output, progress, score_tables, tables
from moc_cli.report.comparison_tables import difference_cells


def drawn(*renderables: RenderableType, width: int = 100) -> str:
    """Return what a terminal of this width shows."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    for renderable in renderables:
        console.print(renderable)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines()), default=0) <= width
    return text


def cells(text: str, first: str) -> list[str]:
    """Return the words of the line that begins with `first`."""
    return next(line.split() for line in text.splitlines() if line.split()[:1] == [first])


TASKS = {
    "mrpc": {
        "metric": "accuracy",
        "seconds": 1.5,
        "metrics": {
            "accuracy": {
                "value": 0.83123,
                "stderr": 0.019,
                "majority": 0.684,
                "n": 408,
                "before": 0.316,
            },
            "f1": {"value": 0.881, "stderr": None, "majority": 0.812, "n": 408, "before": None},
        },
    }
}


def test_results_stand_beside_the_untrained_and_the_majority() -> None:
    text = drawn(score_tables.results_table(TASKS))
    assert cells(text, "mrpc") == ["mrpc", "accuracy", "31.6", "83.1", "1.9", "68.4", "408"]
    assert ["mrpc", "f1", "–", "88.1", "–", "81.2", "408"] in [
        line.split() for line in text.splitlines()
    ]


def test_a_name_in_brackets_is_no_markup() -> None:
    assert "[red]x[/red]" in drawn(score_tables.results_table({"[red]x[/red]": TASKS["mrpc"]}))
    assert "[b]" in drawn(tables.recipe_table([("[b]", "c")]))


def test_memory_says_what_its_peak_is() -> None:
    memory = {
        "weights": 5_000_000,
        "trainable": 12_300,
        "optimizer": 900,
        "peak": 1_234_000_000,
        "kind": "peak resident of the process",
    }
    text = drawn(tables.memory_table(memory))
    assert cells(text, "weights") == ["weights", "5.0", "MB"]
    assert cells(text, "trainable") == ["trainable", "12.3", "kB"]
    assert cells(text, "optimizer") == ["optimizer", "900", "B"]
    assert cells(text, "peak") == ["peak", "resident", "of", "the", "process", "1.23", "GB"]


def test_parameters_leave_heads_out_of_the_share() -> None:
    counts = {"adapter": 5_000, "modules": 700, "base": 1_000_000, "share": 0.005}
    text = drawn(tables.parameter_table(counts))
    assert cells(text, "controls")[-3:] == ["5,000", "0.500", "%"]
    assert cells(text, "fresh")[-1] == "700"
    assert cells(text, "base,")[-1] == "1,000,000"


@pytest.mark.parametrize("width", [60, 80, 100])
def test_a_table_loses_nothing_at_any_width(width: int) -> None:
    """Names wrap, and columns that do not fit continue below with the first column again."""
    tasks = [f"custom-dataset-{number}-with-a-long-name-of-its-own" for number in range(3)]
    score = {"value": 0.5, "stderr": 0.0149, "majority": 0.4987, "n": 500, "base": 0.2512}
    entry = {
        "metric": "accuracy",
        "metrics": {"accuracy": score, "a_metric_of_26_characters": score},
        "base_source": "before training",
        **{"seconds": 1234.5, "rows": 10042, "limited": True, "batch_size": 32, "halved": 0},
        "unparsed": 17,
    }
    results = {"tasks": dict.fromkeys(tasks, entry), "protocol": "rank", "limited": True}
    results |= {"average": 0.5, "average_of_base": 0.25}
    text = drawn(score_tables.evaluation_table(results), width=width)
    assert "…" not in text
    for name in ("value", "±", "base", "majority", "items", "unparsed", "seconds"):
        assert any(name in line.split() for line in text.splitlines()), name
    assert text.count("500 of 10,042") == 6
    assert text.count("1,23") == 6
    lines = text.splitlines()
    for name in tasks:  # in the first column, of whatever width, over one line or more
        wrapped = ("".join(line[:size].strip() for line in lines) for size in range(24, 50))
        assert any(name in column for column in wrapped), name


def summary(size: int, dead: int = 1) -> dict[str, Any]:
    """A pool whose control i has a share in proportion to i."""
    names = [f"{index // 2}.{'attn' if index % 2 == 0 else 'ffn'}" for index in range(size)]
    use = [index / (size * (size - 1) / 2) for index in range(size)]
    pool = {
        "controls": names,
        "use": use,
        "dead": names[:dead],
        "local_share": 0.125,
        "decisions": 12_800,
    }
    return {"pools": {"shared": pool}}


def test_use_of_64_controls_fits_in_100_columns_and_16_rows() -> None:
    text = drawn(*tables.utilization_tables(summary(64)))
    assert len(text.rstrip().splitlines()) == 17
    assert "Controls of the shared pool" in text
    assert "12,800 decisions, 12.5 % local, 1 of 64 dead" in text
    for index in range(64):
        assert f"{index // 2}.{'attn' if index % 2 == 0 else 'ffn'}" in text
    assert "3.1%" in text  # the busiest: 63 of 2016
    assert drawn(*tables.utilization_tables(summary(64), width=40), width=40).count("%") == 65


def test_the_use_of_a_single_control_is_not_cut() -> None:
    pool = {"controls": ["0.ffn"], "use": [1.0], "dead": [], "local_share": 1.0, "decisions": 8}
    for width in (40, 80):
        text = drawn(*tables.utilization_tables({"pools": {"layer": pool}}, width=width))
        assert "100.0%" in text


def test_a_method_without_a_gate_has_nothing_to_show() -> None:
    assert tables.utilization_tables({}) == []


def test_bars_grow_with_the_share_and_show_every_life() -> None:
    widths = [len(tables.bar(share / 100, 8)) for share in range(101)]
    assert widths == sorted(widths)
    assert (widths[0], widths[100]) == (0, 8)
    assert tables.bar(1e-6, 8) == "▏"
    assert tables.bar(0.5, 8) == "████"


def test_numbers_as_text() -> None:
    assert numbers.duration(3723) == "1:02:03"
    assert numbers.duration(59.6) == "1:00"
    assert numbers.byte_size(999) == "999 B"
    assert numbers.byte_size(16.59e9) == "16.59 GB"
    assert [numbers.byte_size(n) for n in (999.6, 999_960)] == ["1.0 kB", "1.0 MB"]
    assert numbers.hundredths(float("nan")) == numbers.hundredths(None) == "–"
    assert numbers.percent(0.12345, 2) == "12.35 %"
    assert numbers.percent(None) == "–"
    assert numbers.score_text("perplexity", 1234.5) == "1,234.50"
    assert numbers.score_text("word_perplexity (strict)", 30.5) == "30.50"
    assert numbers.score_text("bleu", 27.25) == "27.25"
    assert numbers.score_text("acc_norm", 0.5) == "50.0"
    assert numbers.short_count(6_738_415_616) == "6.74B"
    shorts = [numbers.short_count(n) for n in (999, 999_499, 999_500, 999_999, 999_700_000)]
    assert shorts == ["999", "999k", "1M", "1M", "1B"]


def test_a_difference_of_perplexities_is_not_in_hundredths() -> None:
    entry = {"metric": "perplexity", "low": 0.25, "high": 1.5}
    assert [*map(str, difference_cells(entry, 0.5))] == ["+0.50", "+0.25 to +1.50"]
    assert [*map(str, difference_cells({"low": None, "high": None}, -1e-5))] == ["0.0", "–"]


@dataclass(frozen=True)
class Step:
    step: int
    loss: float
    examples: int
    tokens: int
    seconds: float
    memory: int = 2_000_000


def run(bar: progress.TrainProgress, steps: int) -> None:
    with bar:
        for n in range(1, steps + 1):
            bar.observe_step(Step(n, 1 / n, examples=16 * n, tokens=1000 * n, seconds=0.5 * n))


def test_progress_off_a_terminal_is_a_line_now_and_then(capsys: pytest.CaptureFixture) -> None:
    run(progress.TrainProgress(25, interval=10, memory_kind="peak resident"), 25)
    captured = capsys.readouterr()
    assert captured.out == ""
    told = captured.err.splitlines()
    assert [line.split()[1] for line in told] == ["10/25", "20/25", "25/25"]
    # 20 steps of half a second: 32 examples/s, 2,000 tokens/s, 5 steps left.
    assert "32.0 examples/s  2,000 tokens/s  2.0 MB peak resident  0:03 left" in told[1]
    assert told[2].endswith("2.0 MB peak resident  in 0:12")


def test_progress_after_a_resume_counts_only_what_it_saw(capsys: pytest.CaptureFixture) -> None:
    """The run so far may have been on another machine."""
    bar = progress.TrainProgress(100, interval=1)
    with bar:
        for step, seconds in ((50, 900.0), (51, 901.0)):
            bar.observe_step(Step(step, 1.0, examples=8 * step, tokens=step, seconds=seconds))
    first, second = capsys.readouterr().err.splitlines()
    assert "examples/s" not in first
    assert "8.0 examples/s" in second
    assert "0:49 left" in second


def test_silent_progress_says_nothing(capsys: pytest.CaptureFixture) -> None:
    run(progress.TrainProgress(5, silent=True, interval=1), 5)
    with progress.WorkProgress("score", 10, silent=True) as work:
        work.observe(10, 10)
    assert capsys.readouterr() == ("", "")


def test_work_in_batches_is_told_in_quarters(capsys: pytest.CaptureFixture) -> None:
    with progress.WorkProgress("score", 100) as work:
        for done in (*range(7, 100, 7), 100):
            work.observe(done, 100)
    told = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert told == ["28/100", "56/100", "77/100", "100/100"]


def test_progress_on_a_terminal_draws_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setattr(output, "err", lambda: Console(file=screen, force_terminal=True, width=120))
    run(progress.TrainProgress(20), 20)
    shown = screen.getvalue()
    assert "20/20" in shown
    assert "2,000 tokens/s" in shown


def test_notes_cannot_move_the_cursor(capsys: pytest.CaptureFixture) -> None:
    output.say("a\x1b[31m[bold]b\nc\x07")
    assert capsys.readouterr().err == "a\\x1b[31m[bold]b\nc\\x07\n"


def test_a_recipes_purpose_is_not_cut_in_a_narrow_terminal() -> None:
    name, purpose = (
        "commonsense/mistral-7b-instruct-v0.3/moc",
        "Mistral-7B-Instruct-v0.3: eight tasks",
    )
    text = drawn(tables.recipe_table([(name, purpose)]), width=60)
    assert name in text
    assert "…" not in text
