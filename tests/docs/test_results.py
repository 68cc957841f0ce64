"""recipes/RESULTS.md says what the kept runs say."""

from support.results_tables import BLOCK, DOCUMENT, document


def test_every_table_is_made_from_the_kept_runs() -> None:
    """Write it again: PYTHONPATH=tests:. python -m support.results_tables."""
    text = DOCUMENT.read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert document(text) == text
