"""recipes/RESULTS.md and its pictures show what the kept runs say."""

import re

import pytest
from support.results_tables import BLOCK, DOCUMENT, document, draw, picture_file

TEXT = DOCUMENT.read_text(encoding="utf-8")
NUMBER = re.compile(r"-?\d+\.\d+")
HASH = re.compile(r"\b[mp][0-9a-f]{10}\b")  # names of what is drawn several times


def test_every_table_is_made_from_the_kept_runs() -> None:
    """Write it again: PYTHONPATH=tests:. python -m support.results_tables."""
    assert BLOCK.search(TEXT)
    assert document(TEXT) == TEXT


@pytest.mark.parametrize("name", [block[1] for block in BLOCK.findall(TEXT) if not block[2]])
def test_every_picture_is_drawn_from_the_kept_runs(name: str) -> None:
    """Another processor may round a resampled score differently: a line may move by a hair."""
    files = (draw(name), picture_file(name).read_bytes())
    pictures = [HASH.sub("", file.decode()) for file in files]
    first, second = (NUMBER.sub("", picture) for picture in pictures)
    assert first == second
    drawn, kept = (list(map(float, NUMBER.findall(picture))) for picture in pictures)
    assert drawn == pytest.approx(kept, abs=0.05)  # of 72 to an inch
