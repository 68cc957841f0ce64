"""The next window is collated while the device works on this one, and each window once."""

from pathlib import Path

import pytest
import torch
from support.toy import Plan, ToyAdapted, toy_collate, toy_fit, toy_rows
from torch import Tensor

from moc_cli.data.batches import pad_rows
from moc_cli.training.loop_types import Data, Settings


def test_a_window_is_made_before_the_losses_of_the_one_before_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, events = toy_rows(8), []
    clip = torch.nn.utils.clip_grad_norm_

    def collate(numbers: list[int]) -> dict[str, Tensor]:
        events.append(numbers[0])
        return toy_collate(rows, numbers)

    def launched(*args: object) -> Tensor:
        events.append("launched")
        return clip(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", launched)
    data = Data(Plan([[0, 1], [2, 3], [4, 5], [6, 7], [1]]), collate)
    settings = Settings(gradient_accumulation_steps=2, num_train_epochs=2)
    toy_fit(
        tmp_path, ToyAdapted(), data, settings, observe=lambda step: events.append(f"{step.step}")
    )
    for first in (1, 4):  # the first step of each epoch
        steps = [f"{first + step}" for step in range(3)]
        epoch = [0, 2, "launched", 4, 6, steps[0], "launched", 1, steps[1], "launched", steps[2]]
        assert events[:11] == epoch
        del events[:11]
    assert events == []


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_alike_as_lists_and_as_tensors(side: str) -> None:
    rows = [[5, 6, 7], [8], [49_151, 0]]
    padded = {
        "left": [[5, 6, 7], [-100, -100, 8], [-100, 49_151, 0]],
        "right": [[5, 6, 7], [8, -100, -100], [49_151, 0, -100]],
    }[side]
    for given in (rows, [torch.tensor(row, dtype=torch.int32) for row in rows]):
        result = pad_rows(given, -100, side)
        assert result.dtype == torch.long
        assert result.tolist() == padded
