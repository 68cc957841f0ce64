"""Commands print and write what is frozen in tests/frozen; see support/freeze.py.

Other processors round in another way, and nearly equal votes then choose other controls: so keys,
types, lengths, strings and whole numbers are compared exactly, scores with a wide tolerance, and
what follows from choices by its shape. MOC_FROZEN=exact compares every number, to 1e-6, on the
machine that froze them. What changes on purpose is written again, with its reason:

    python tests/support/freeze.py --write "results.json has format 2"
"""

import json
import os
from typing import Any

import pytest
from support.freeze import FROZEN, collect, differences, read

EXACT = os.environ.get("MOC_FROZEN") == "exact"


@pytest.fixture(scope="module")
def outputs() -> dict[str, Any]:
    return collect()


def test_commands_print_and_write_what_is_frozen(outputs: dict[str, Any]) -> None:
    lines = [
        line
        for name, output in outputs.items()
        for line in differences(read(name), output, name, exact=EXACT)
    ]
    assert not lines, "\n".join(lines)


def test_every_frozen_file_is_compared_and_says_why_it_is_so(outputs: dict[str, Any]) -> None:
    files = {file.stem: json.loads(file.read_text()) for file in FROZEN.glob("*.json")}
    assert files.keys() == outputs.keys()
    assert all(all(content["changed"]) for content in files.values())


def test_a_difference_is_seen() -> None:
    frozen = {"name": "a", "tasks": {"t": {"value": 0.5, "n": 4}}, "counts": [[2, 2]]}
    frozen["metrics"] = {"f1": {"value": 0.4}}
    cases: list[tuple[dict[str, Any], int, int]] = [  # changes, seen roughly, seen exactly
        ({}, 0, 0),
        ({"name": "b"}, 1, 1),
        ({"name": None}, 1, 1),
        ({"more": 1}, 1, 1),
        ({"tasks": {"t": {"value": 0.4, "n": 4}}}, 0, 1),
        ({"tasks": {"t": {"value": "0.5", "n": 5}}}, 2, 2),
        ({"metrics": {"f1": {"value": 0.5}}}, 0, 1),
        ({"metrics": {"f1": {"value": 0.9}}}, 1, 1),
        ({"counts": [[3, 1]]}, 0, 2),
        ({"counts": [[3, 2]]}, 1, 1),
        ({"counts": [[2, 2, 0]]}, 1, 1),
    ]
    for changes, roughly, exactly in cases:
        now = frozen | changes
        assert len(list(differences(frozen, now, "", exact=False))) == roughly, changes
        assert len(list(differences(frozen, now, "", exact=True))) == exactly, changes
