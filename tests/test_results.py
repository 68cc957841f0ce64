"""results.json: folders of format 1 are read as format 2, and tell the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support.messages import refused

from moc_cli.evaluation.base_scores import earlier_evaluation
from moc_cli.evaluation.results_folder import ResultsFolder
from moc_cli.report.score_tables import evaluation_table
from moc_cli.results import FORMAT, main_score, read_results

TRAINED = {
    "status": "finished",
    "tasks": {
        "mrpc": {
            **{"metric": "accuracy", "before": 0.3, "value": 0.8, "n": 40, "stderr": 0.06},
            **{"majority": 0.7, "seconds": 1.5},
            "also": [
                {
                    **{"metric": "f1", "before": None, "value": 0.9, "n": 40, "stderr": 0.05},
                    "majority": 0.8,
                }
            ],
        }
    },
    "average": 0.8,
}
EVALUATED = {
    "format": 1,
    **{"run": None, "suite": "commonsense", "protocol": "generate", "limit": None},
    "tasks": {
        "boolq": {
            **{"metric": "accuracy", "value": 0.5, "stderr": 0.1, "majority": 0.6, "n": 20},
            **{"seconds": 2.0, "unparsed": 3, "rows": 20, "limited": False},
            **{"rows_sha256": "0" * 64, "batch_size": 8, "halved": 0},
            "base": {
                **{"metric": "accuracy", "value": 0.25, "stderr": 0.2, "majority": 0.6},
                **{"n": 20, "seconds": 9.0, "unparsed": 5, "source": "scored with it"},
            },
        },
    },
    **{"average": 0.5, "average_of_base": 0.25, "limited": False},
}


def test_training_results_of_format_1_become_format_2() -> None:
    results = read_results(TRAINED)
    assert results == {
        "format": FORMAT,
        "status": "finished",
        "tasks": {
            "mrpc": {
                "metric": "accuracy",
                "metrics": {
                    "accuracy": {
                        **{"value": 0.8, "stderr": 0.06, "majority": 0.7},
                        **{"n": 40, "before": 0.3},
                    },
                    "f1": {
                        **{"value": 0.9, "stderr": 0.05, "majority": 0.8},
                        **{"n": 40, "before": None},
                    },
                },
                "seconds": 1.5,
            }
        },
        "average": 0.8,
    }
    assert read_results(results) == results
    assert main_score(results["tasks"]["mrpc"])["value"] == 0.8


def test_evaluations_of_format_1_become_format_2() -> None:
    entry = read_results(EVALUATED)["tasks"]["boolq"]
    score = {"value": 0.5, "stderr": 0.1, "majority": 0.6, "n": 20, "base": 0.25}
    assert entry == {
        "metric": "accuracy",
        "metrics": {"accuracy": score},
        **{"seconds": 2.0, "unparsed": 3, "rows": 20, "limited": False},
        **{"rows_sha256": "0" * 64, "batch_size": 8, "halved": 0},
        "base_source": "scored with it",
    }


def test_results_of_an_unfinished_run_have_no_tasks() -> None:
    running = {"status": "running", "before": {"mrpc": {"accuracy": 0.3}}}
    assert read_results(running) == running | {"format": FORMAT}


@pytest.mark.parametrize("tasks", [[], {"a": 3}, {"a": {"value": 1}}, {"a": None}])
def test_other_content_is_refused(tasks: Any) -> None:
    with refused(ValueError):
        read_results({"tasks": tasks})


def test_an_evaluation_of_format_1_is_continued_and_found_as_a_base(tmp_path: Path) -> None:
    samples = '{"task": "boolq", "row": 0, "prompt": "a"}\n'
    digest = hashlib.sha256(samples.encode()).hexdigest()
    (tmp_path / "samples.jsonl").write_text(samples)
    file = tmp_path / "results.json"
    file.write_text(json.dumps(EVALUATED | {"samples_sha256": digest}))
    conditions = {"suite": "commonsense", "protocol": "generate"}
    entry = read_results(EVALUATED)["tasks"]["boolq"]
    assert ResultsFolder(tmp_path, conditions).tasks == {"boolq": entry}
    (known,) = earlier_evaluation(file, conditions)
    assert (known.task, known.values) == ("boolq", {"accuracy": 0.5})


def test_an_evaluation_of_format_1_is_shown() -> None:
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(evaluation_table(read_results(EVALUATED)))
    row = next(line.split() for line in capture.get().splitlines() if line.startswith("boolq"))
    assert row == ["boolq", "50.0", "10.0", "25.0", "60.0", "20", "3", "2"]


@pytest.mark.parametrize("version", [{}, {"format": FORMAT}])
def test_the_former_name_of_a_key_is_read(version: dict[str, int]) -> None:
    results = read_results({**version, "truncated": 3, "answerless": 2})
    assert results == {"format": FORMAT, "truncated": 3, "answers_cut_off": 2}
