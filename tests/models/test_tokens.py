"""A tokenizer and a model agree on padding, end tokens and positions."""

import pytest
import torch
from support.models import VOCABULARY, make_byte_tokenizer, make_pair_tokenizer, make_tiny_model
from tokenizers import processors

from moc_cli.data.batches import pad_batch
from moc_cli.data.custom.chat import answer_ends
from moc_cli.models.tokens import (
    compare_tokens,
    end_tokens,
    match_tokens,
    max_positions,
    pad_token_id,
    prompt_ids,
    token_problems,
)

CHATML = (
    "{% for m in messages %}{{'<mask>'+m['role']+'\n'+m['content']+'<unk>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<mask>assistant\n'}}{% endif %}"
)


def closing_tokenizer():
    """A tokenizer that puts its end token after every text."""
    tokenizer = make_byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_a_prompt_to_be_continued_is_not_closed():
    tokenizer = closing_tokenizer()
    closed = tokenizer(["where", ""])["input_ids"]
    assert prompt_ids(tokenizer, ["where", ""]) == [closed[0][:-1], [1]]
    assert prompt_ids(tokenizer, []) == []


@pytest.mark.parametrize("ids", [(None, None), (0, 2), (2, 0), (2, None), (None, 0), (1, 1)])
def test_a_decoder_pools_the_same_token_in_any_batch(ids):
    """Whatever pad token config and tokenizer have, and however rows end."""
    config_pad, tokenizer_pad = ids
    model = make_tiny_model("llama", num_labels=2, perturbed=True, pad_token_id=config_pad)
    tokenizer = make_byte_tokenizer()
    tokenizer.pad_token = None if tokenizer_pad is None else ["<pad>", "<s>", "</s>"][tokenizer_pad]
    notes = match_tokens(model, tokenizer)
    assert notes or config_pad == pad_token_id(tokenizer)
    rows = [[1, 5, 9, 7], [1, 8], [6, 5, 9, 7, 11, 2], [1, 2, 2], [9, 0, 0], [1]]

    def logits(part):
        encoded = [{"input_ids": row, "labels": 0} for row in part]
        batch = pad_batch(encoded, tokenizer, side="right")
        return model(**batch).logits.detach()

    alone = torch.cat([logits([row]) for row in rows])
    torch.testing.assert_close(logits(rows), alone, atol=1e-5, rtol=1e-5)


def test_a_pad_token_without_an_embedding_is_not_used():
    model, tokenizer = make_tiny_model("llama", num_labels=2), make_byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == VOCABULARY
    first, *_ = match_tokens(model, tokenizer)
    assert "'[PAD]'" in first
    assert "'</s>' (2)" in first
    assert pad_token_id(tokenizer) == model.config.pad_token_id == 2


def test_vocabularies_of_other_sizes_and_a_missing_end_are_said():
    model, tokenizer = make_tiny_model("llama"), make_byte_tokenizer()
    assert compare_tokens(model, tokenizer) == []
    tokenizer.add_tokens(["[new]"])
    tokenizer.eos_token = None
    larger, endless = compare_tokens(model, tokenizer)
    assert f"{VOCABULARY + 1} tokens" in larger
    assert "no end token" in endless
    (problem,) = token_problems(model, tokenizer, [[5], tokenizer("a [new] one")["input_ids"]])
    assert f"'[new]' ({VOCABULARY})" in problem
    wide = make_tiny_model("llama", vocab_size=VOCABULARY + 9)
    assert "no text uses" in compare_tokens(wide, make_byte_tokenizer())[0]


def test_the_end_that_a_chat_template_teaches_ends_a_generation():
    model, tokenizer = make_tiny_model("llama"), make_byte_tokenizer()
    tokenizer.add_special_tokens({"unk_token": "<unk>"})
    assert answer_ends(tokenizer) == []  # no template
    tokenizer.chat_template = CHATML
    assert answer_ends(tokenizer) == [3]
    (note,) = match_tokens(model, tokenizer, answer_ends(tokenizer))
    assert "'<unk>' (3)" in note
    assert end_tokens(model, tokenizer) == [2, 3] == model.generation_config.eos_token_id
    tokenizer.chat_template = CHATML.replace("<unk>", "")
    assert answer_ends(tokenizer) == []


@pytest.mark.parametrize(
    ("family", "changes", "positions"),
    [
        ("llama", {}, 512),
        ("bert", {"max_position_embeddings": 128}, 128),
        ("roberta", {"pad_token_id": 1}, 512),
        ("roberta", {"pad_token_id": 0}, 513),
        ("gpt2", {"n_positions": 64, "max_position_embeddings": 64}, 64),
    ],
)
def test_positions_are_those_that_a_forward_takes(family, changes, positions):
    labels = 2 if family in ("bert", "roberta") else None
    model = make_tiny_model(family, num_labels=labels, **changes)
    assert max_positions(model) == positions
    row = torch.full((1, positions), 7)
    model(input_ids=row)
    if family != "llama":  # rotations have no end
        with pytest.raises((RuntimeError, IndexError)):
            model(input_ids=torch.full((1, positions + 1), 7))


def test_an_encoders_pair_of_texts_keeps_its_end():
    tokenizer = make_pair_tokenizer()
    model = make_tiny_model("bert", num_labels=2)
    assert match_tokens(model, tokenizer) == []
    assert tokenizer("a", "b")["input_ids"][-1] == 2
