"""A host that knows its padding: the same numbers, and no masks where none are needed."""

import pytest
import torch
from support.models import make_batch, make_tiny
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

from moc_cli.models.masks import known_padding

KINDS = ("llama", "gemma3_text", "bert", "modernbert")  # also with windows, and both directions


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("padded", [False, True])
def test_outputs_are_the_same_to_the_last_bit(family: str, padded: bool) -> None:
    model, batch = make_tiny(family).eval(), make_batch()
    if not padded:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"])
    with torch.no_grad():
        expected = model(**batch).logits
        with known_padding(batch["attention_mask"]):
            assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_mask
            assert torch.equal(model(**batch).logits, expected)
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask


def test_rows_without_padding_get_no_mask_and_others_one() -> None:
    mask = torch.ones(2, 6, dtype=torch.bool)
    given = {"batch_size": 2, "q_length": 6, "kv_length": 6, "attention_mask": mask}
    for last, wanted in ((True, False), (False, True)):
        mask[1, -1] = last
        with known_padding(mask):
            made = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**given)
        assert (made is not None) == wanted
    with known_padding(None):
        assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is sdpa_mask
