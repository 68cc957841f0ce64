"""Every key of the recipe reaches the run: changing it changes what it is said to change."""

import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from support.key_changes import CHANGES, ELSEWHERE, OTHER, VALUE, Change
from support.key_runs import KeyRun, make_bases

from moc_cli.recipe.reference import keys

Runs = Callable[[str, dict[str, Any]], KeyRun]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """`runs(base, values)`: each run is made once."""
    folder = tmp_path_factory.mktemp("keys")
    make_bases(folder)

    @cache
    def make(base: str, values: str) -> KeyRun:
        number = make.cache_info().misses
        return KeyRun(f"{base}.yaml", folder / f"run-{number}", json.loads(values))

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield lambda base, values: make(base, json.dumps(values))


def seen(entry: Any) -> dict[str, Any]:
    return entry if isinstance(entry, dict) else {"": entry}


def test_the_table_holds_every_key() -> None:
    assert {(key.method, key.key) for key in keys()} == set(CHANGES)


def check(key: str, change: Change, runs: Runs) -> None:
    before = seen(change.see(runs(change.base, change.also)))
    after = seen(change.see(runs(change.base, change.also | {key: change.value} | change.needs)))
    assert before.keys() == after.keys()
    expected = change.value if change.expected is VALUE else change.expected
    for name, entry in after.items():
        assert before[name] != entry, name
        if change.expected is not OTHER:
            assert entry == (pytest.approx(expected) if isinstance(expected, float) else expected)


@pytest.mark.parametrize(("method", "key"), CHANGES)
def test_a_key_reaches_the_run(method: str, key: str, runs: Runs) -> None:
    check(key, CHANGES[method, key], runs)


@pytest.mark.parametrize(("key", "change"), ELSEWHERE)
def test_a_key_reaches_the_rows_of_every_suite(key: str, change: Change, runs: Runs) -> None:
    check(key, change, runs)
