"""What tests share: tiny random models and tokenizers, real data and real weights.

Real things that are absent skip a test, with the reason; where CI is set they fail it instead.
"""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

# A shell that starts tests in the background lets them ignore Ctrl-C, and all their children too.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", "<unk>", "<mask>"]
MERGES = [("Ġ", "Ġ"), ("ĠĠ", "ĠĠ"), ("Ġ", "t")]
VOCABULARY = 256 + len(SPECIAL_TOKENS) + len(MERGES)
_SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
_PAIR = {"pad_token": "<pad>", "cls_token": "<s>", "sep_token": "</s>", "unk_token": "<unk>"}


# The longest files, which several processes should begin with.
LONGEST = ("test_quickstart.py", "test_real_training.py", "test_resume.py", "test_standalone.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; the others stay in their order."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


def share_of_the_cores() -> int:
    """Threads for a long training; threads of several test processes on one core spin in vain."""
    processes = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    return max(1, (os.cpu_count() or 1) // processes)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state, on one thread."""
    torch.set_num_threads(1)
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def tiny_config(family: str, **changes: object) -> PreTrainedConfig:
    """A two-layer configuration of `llama`, `bert` or `roberta`, of hidden size 32."""
    shape: dict = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if family == "llama":
        return LlamaConfig(**shape | {"num_key_value_heads": 2} | changes)
    if family == "bert":
        return BertConfig(**shape | changes)
    return RobertaConfig(**shape | {"max_position_embeddings": 514, "type_vocab_size": 1} | changes)


def make_tiny_model(
    family: str, *, seed: int = 0, num_labels: int | None = None, **changes: object
) -> PreTrainedModel:
    """A tiny random model; with `num_labels` a classifier, otherwise a language model.

    Weights are drawn wider than transformers does, so that outputs are far from uniform.
    """
    config = tiny_config(family, initializer_range=0.2, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if num_labels is None:
            model = AutoModelForCausalLM.from_config(config)
        else:
            config.num_labels = num_labels
            model = AutoModelForSequenceClassification.from_config(config)
    return model.eval()


@pytest.fixture
def tiny_model() -> Callable[..., PreTrainedModel]:
    """`tiny_model(family, seed=0, num_labels=None, **config)`, see `make_tiny_model`."""
    return make_tiny_model


def _byte_level() -> Tokenizer:
    """One token a byte, but spaces merge with spaces and with a following t.

    As in real vocabularies, the tokens of a prompt that ends in spaces are then not a prefix of the
    tokens of prompt and answer.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*SPECIAL_TOKENS, *alphabet, *("".join(pair) for pair in MERGES)]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def make_byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for tiny decoders; adds no special tokens by itself."""
    return PreTrainedTokenizerFast(tokenizer_object=_byte_level(), **_SPECIAL)


def make_pair_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer for tiny encoders: `<s> a </s>` and `<s> a </s> b </s>`, typed."""
    tokenizer = _byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> $B:1 </s>:1",
        special_tokens=[("<s>", 1), ("</s>", 2)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        **_PAIR,
    )


@pytest.fixture(scope="session")
def byte_tokenizer() -> PreTrainedTokenizerFast:
    """See `make_byte_tokenizer`."""
    return make_byte_tokenizer()


@pytest.fixture(scope="session")
def pair_tokenizer() -> PreTrainedTokenizerFast:
    """See `make_pair_tokenizer`."""
    return make_pair_tokenizer()


def absent(reason: str) -> NoReturn:
    """Skip the test, or fail it where CI is set."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must have it: {reason}", pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def real_data() -> Path:
    """The folder of real benchmark rows beside the repository."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        absent("no real benchmark rows at ../shared/data")
    return folder


@pytest.fixture
def real_weights() -> Callable[[str], Path]:
    """`real_weights(name)`: the folder of `smollm2-135m` or `minilm`, see tests/weights.py."""

    def find(name: str) -> Path:
        folder = Path(os.environ.get("MOC_WEIGHTS") or ROOT / ".weights") / name
        if not (folder / "config.json").is_file():
            absent(f"no weights at {folder}; get them: python tests/weights.py .weights")
        return folder

    return find
