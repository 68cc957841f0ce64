"""A kind that nothing but the tables and its own class knows is trained, watched and planned."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.rows import write_rows
from support.tiny_runs import MOC, save_model

from moc_cli.cli import run
from moc_cli.data.batches import collate
from moc_cli.data.encode import IGNORED
from moc_cli.kinds import KINDS, Pairs
from moc_cli.kinds.loss import TaskLoss
from moc_cli.recipe.tasks import CLASSIFICATION, CLASSIFIER, HEADS, TASKS, HubSplit, Task
from moc_cli.runs import RunFolder
from moc_cli.scoring import metrics
from moc_cli.scoring.forward import evaluating

HEAD = replace(
    CLASSIFIER, name="tags", auto_class="AutoModelForTokenClassification", task_type="TOKEN_CLS"
)
WORDS = ["one", "two", "three", "four", "five", "six"]


class TagLoss(TaskLoss):
    @staticmethod
    def count_targets(labels: torch.Tensor) -> int:
        return int((labels != IGNORED).sum())

    def _loss(self, inputs: Any, labels: torch.Tensor, targets: int) -> torch.Tensor:
        logits = self.model(**inputs).logits.float().flatten(0, 1)
        return F.cross_entropy(logits, self._moved(labels).flatten(), reduction="sum") / targets


@dataclass(frozen=True)
class Tagged:
    label: int
    prediction: int
    loss: float

    def sample(self) -> dict[str, Any]:
        return asdict(self)


class Tags(Pairs):
    """Every token has a class: whether its number is odd."""

    head = HEAD
    loss = TagLoss

    def encode(self, examples: Any, tokenizer: Any, **arguments: Any) -> Any:
        encoded = super().encode(examples, tokenizer, **arguments)
        rows = [row | {"labels": [id % 2 for id in row["input_ids"]]} for row in encoded.rows]
        return replace(encoded, rows=rows)

    def collate(self, rows: Any, tokenizer: Any) -> dict[str, torch.Tensor]:
        return collate(rows, tokenizer, side=self.head.side)

    def made_up_label(self, ids: list[int], rng: Any) -> Any:
        return [id % 2 for id in ids]

    def score_items(self, model: Any, examples: Any, options: Any, observe: Any = None) -> Any:
        encoded = self.encode(
            examples, model.tokenizer, max_length=options.max_length, train_on_inputs=False
        )
        items = []
        for row in encoded.rows:
            batch = self.collate([row], model.tokenizer)
            labels = batch.pop("labels")[0]
            with evaluating(model.adapted.model):
                logits = model.adapted.model(**batch).logits[0].float()
            losses = F.cross_entropy(logits, labels, reduction="none").tolist()
            items += map(Tagged, labels.tolist(), logits.argmax(dim=-1).tolist(), losses)
        return items

    def measure(self, items: Sequence[Any], examples: Any) -> Any:
        labels, predictions = [i.label for i in items], [i.prediction for i in items]
        return {"accuracy": metrics.measure("accuracy", labels, predictions)}

    def watch(self, model: Any, examples: Any, options: Any, observe: Any = None) -> Any:
        items = self.score_items(model, examples, options, observe)
        values = {name: score.value for name, score in self.measure(items, examples).items()}
        return {"loss": sum(item.loss for item in items) / len(items)} | values


def test_a_fourth_kind_is_an_entry_and_a_class(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    splits = {name: HubSplit("nowhere", (None,), name) for name in ("train", "validation")}
    task = Task(
        replace(CLASSIFICATION, name="tags", head=HEAD),
        hub=splits,
        scored=("validation",),
        columns=("sentence",),
        labels=("even", "odd"),
    )
    monkeypatch.setitem(TASKS["glue"], "tags", task)
    monkeypatch.setitem(HEADS, "tags", HEAD)  # type: ignore[arg-type]
    monkeypatch.setitem(KINDS, "tags", Tags)
    save_model(tmp_path / "model", "bert")
    for split, count in (("train", 16), ("validation", 4)):
        rows = [{"sentence": " ".join(WORDS[n % 6 :] + WORDS), "label": 0} for n in range(count)]
        write_rows(tmp_path / "data" / "tags" / f"{split}.jsonl", rows)
    recipe = {
        "model": {"model_name_or_path": str(tmp_path / "model")},
        "method": MOC,
        "data": {"suite": "glue", "tasks": ["tags"], "path": str(tmp_path / "data")},
        "train": {"num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 0.03},
        "eval": {"eval_strategy": "epoch"},
        "output": {"output_dir": str(tmp_path / "run")},
        "launch": {"device": "cpu", "num_threads": 1},
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    assert run(["train", str(file), "--json"]) == 0
    results = RunFolder(tmp_path / "run").read_results()
    score = results["tasks"]["tags"]["metrics"]["accuracy"]
    assert score["value"] > score["before"] + 0.1
    capsys.readouterr()
    assert run(["plan", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["plans"]
