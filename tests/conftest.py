"""What tests share: tiny random models and tokenizers, real data and real weights.

Real things that are absent skip a test, with the reason; where CI is set they fail it instead.
The process that only hands tests to others reads this file too: heavy libraries are imported where
they are used.
"""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from support.machine import ROOT, absent, seed_torch

pytest_plugins = ["support.messages"]

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

# A shell that starts tests in the background lets them ignore Ctrl-C, and all their children too.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The longest files: several processes begin with them, so that none is left with one at the end.
LONGEST = (
    "test_quickstart.py",
    "test_compiled_generation.py",
    "test_real_training.py",
    "test_plans.py",
    "test_contract.py",
    "test_compiled.py",
    "test_ways.py",
    "test_eval_command.py",
    "test_families.py",
    "test_documents.py",
    "test_train_command.py",
    "test_molex.py",
    "test_figures.py",
    "test_tenants.py",
    "test_every_key.py",
    "test_results.py",
    "test_fuzz.py",
    "test_resume.py",
    "test_generation.py",
    "test_page.py",
    "test_evaluation.py",
    "test_quantized_runs.py",
    "test_frozen.py",
    "test_joint_loop.py",
    "test_low_rank.py",
    "test_export.py",
    "test_inspect.py",
    "test_harness.py",
    "test_eval_rows.py",
    "test_bootstrap.py",
    "test_generate_command.py",
    "test_dry_run.py",
    "test_custom_runs.py",
    "test_quantization.py",
    "test_bench.py",
    "test_recipe.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, in that order; the others stay in theirs."""
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection() -> None:
    """What tests import stays: to look through it for garbage takes a fifth of the collection."""
    gc.disable()


def pytest_collection_finish() -> None:
    """From here on garbage is looked for among what tests make."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module", autouse=True)
def imports_are_no_garbage() -> Iterator[None]:
    """What tests have imported stays too; a collection that looks through it takes a second."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, on one thread."""
    import numpy as np
    import torch

    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    seed_torch(0)


@pytest.fixture
def tiny_model() -> Callable[..., "PreTrainedModel"]:
    """`tiny_model(family, seed=0, num_labels=None, **config)`, see `make_tiny_model`."""
    from support.models import make_tiny_model

    return make_tiny_model


@pytest.fixture(scope="session")
def byte_tokenizer() -> "PreTrainedTokenizerFast":
    """See `make_byte_tokenizer`."""
    from support.models import make_byte_tokenizer

    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def pair_tokenizer() -> "PreTrainedTokenizerFast":
    """See `make_pair_tokenizer`."""
    from support.models import make_pair_tokenizer

    return make_pair_tokenizer()


@pytest.fixture
def same_process() -> Iterator[None]:
    """See `in_this_process`."""
    from support.processes import in_this_process

    with in_this_process():
        yield


@pytest.fixture
def clean_process() -> Iterator[None]:
    """See `in_a_clean_process`."""
    from support.processes import in_a_clean_process

    with in_a_clean_process():
        yield


@pytest.fixture
def new_objects() -> None:
    """`gc.get_objects` gives what a test makes; to look through all objects takes a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """`moc inspect-routing` writes its numbers alone; tests/inspection draws the pictures."""
    monkeypatch.setattr("moc_cli.inspection.results.write_figures", lambda routing, folder: [])


@pytest.fixture
def choices(tmp_path: Path) -> list[str]:
    """See `choices_run`; all lies below `tmp_path`."""
    from support.tiny_runs import choices_run

    return choices_run(tmp_path)


@pytest.fixture
def pairs(tmp_path: Path) -> list[str]:
    """See `pairs_run`; all lies below `tmp_path`."""
    from support.tiny_runs import pairs_run

    return pairs_run(tmp_path)


@pytest.fixture
def real_data() -> Path:
    """The folder of real benchmark rows beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        absent("no real benchmark rows at ../shared/data")
    return folder


@pytest.fixture
def real_weights() -> Callable[[str], Path]:
    """`real_weights(name)`: the folder of `smollm2-135m` or `minilm`, see support/weights.py."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("MOC_WEIGHTS") or ROOT / ".weights") / name
        if not (folder / "config.json").is_file():
            absent(f"no weights at {folder}; get them: python tests/support/weights.py .weights")
        return folder

    return find


@pytest.fixture
def recipes_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The recipe files that are read and validated from here on."""
    from moc_cli.recipe.catalog import find_recipe

    read: list[Path] = []

    def find(name: str | Path) -> Path:
        read.append(find_recipe(name))
        return read[-1]

    monkeypatch.setattr("moc_cli.recipe.load.find_recipe", find)
    return read
