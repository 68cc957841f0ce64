"""A two-parameter language model with dropout, behind the interface that the loop trains."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from moc_cli.training import rng
from moc_cli.training.checkpoint import Checkpoints, Counters, Snapshot
from moc_cli.training.log import MetricsLog
from moc_cli.training.loop import Loop
from moc_cli.training.loop_types import Data, Outcome, Settings

VOCABULARY = 11
WIDTH = 6
POISON = VOCABULARY - 1  # a token that no toy row holds


class ToyModel(nn.Module):
    """Frozen embedding -> dropout -> trained linear layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.embedding.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(WIDTH, VOCABULARY)
        with torch.no_grad():
            self.head.weight.copy_(torch.randn(VOCABULARY, WIDTH, generator=generator))
            self.head.bias.zero_()

    def forward(self, input_ids: Tensor, use_cache: bool, **masks: object) -> object:
        return SimpleNamespace(logits=self.head(self.dropout(self.embedding(input_ids))))


class ToyAdapted:
    """What the loop needs to know of an adapted model."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.model = ToyModel(dropout)
        self.scales: list[float] = []

    def named_trainables(self) -> dict[str, nn.Parameter]:
        return {"head.weight": self.model.head.weight, "head.bias": self.model.head.bias}

    def no_decay(self, name: str) -> bool:
        return name.endswith("bias")

    def in_gate(self, name: str) -> bool:
        return name.endswith("bias")

    def state(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_trainables().items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.named_trainables().items():
                parameter.copy_(state[name])

    def set_loss_scale(self, scale: float) -> None:
        self.scales.append(scale)

    def balance_loss(self) -> float | None:
        return None

    def recorder(self, *, detailed: bool) -> None:
        return None


class Plan:
    """Micro-batches given by hand, or shuffled by epoch."""

    def __init__(self, batches: list[list[int]], shuffled: bool = False) -> None:
        self.batches = batches
        self.shuffled = shuffled

    def epoch(self, e: int) -> list[list[int]]:
        if not self.shuffled:
            return self.batches
        order = torch.randperm(len(self.batches), generator=torch.Generator().manual_seed(e))
        return [self.batches[i] for i in order]


def toy_rows(count: int) -> list[dict[str, list[int]]]:
    """Rows of 3 to 7 random tokens; the first third of each has no target."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for index in range(count):
        tokens = torch.randint(1, POISON, (3 + index % 5,), generator=generator).tolist()
        hidden = len(tokens) // 3
        rows.append({"input_ids": tokens, "labels": [-100] * hidden + tokens[hidden:]})
    return rows


def toy_collate(rows: list[dict[str, list[int]]], numbers: list[int]) -> dict[str, Tensor]:
    """Left-padded tensors of the rows with these numbers."""
    chosen = [rows[number] for number in numbers]
    width = max(len(row["input_ids"]) for row in chosen)

    def pad(key: str, filler: int) -> Tensor:
        return torch.tensor([[filler] * (width - len(r[key])) + r[key] for r in chosen])

    mask = [[0] * (width - len(r["input_ids"])) + [1] * len(r["input_ids"]) for r in chosen]
    ids, labels = pad("input_ids", 0), pad("labels", -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.tensor(mask)}


def toy_data(batches: list[list[int]], shuffled: bool = False) -> Data:
    """Toy rows under these micro-batches."""
    rows = toy_rows(1 + max(number for batch in batches for number in batch))
    return Data(Plan(batches, shuffled), lambda numbers: toy_collate(rows, numbers))


def toy_fit(folder, adapted: ToyAdapted, data: Data, settings: Settings, **more) -> Outcome:
    """The loop on the CPU with checkpoints and metrics in `folder`."""
    folder.mkdir(exist_ok=True)
    limit = more.pop("limit", None)
    run = {name: more.pop(name) for name in ("resume", "observe") if name in more}
    return Loop(
        adapted,
        data,
        settings,
        accelerator=Accelerator(cpu=True),
        checkpoints=Checkpoints(folder / "checkpoints", limit),
        log=MetricsLog(folder / "metrics.jsonl"),
        **more,
    ).run(**run)


def snapshot(step: int = 4, best: int | None = None) -> Snapshot:
    """What a checkpoint holds, in small: every value follows from `step`."""
    generator = torch.Generator().manual_seed(step)
    return Snapshot(
        counters=Counters(step=step, loss_sum=1 / 3, best_step=best, seconds=0.1),
        trainables={"a": torch.randn(3, 5, generator=generator)},
        optimizer={"a.exp_avg": torch.randn(3, 5, generator=generator), "a.step": torch.ones(())},
        rng=rng.capture(),
        identity={"recipe": {"seed": 1}, "threads": 1},
    )
