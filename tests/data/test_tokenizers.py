"""Tokenizers that come as a sentencepiece model work with what the package itself installs."""

import io
import json

import pytest
import sentencepiece

from moc_cli.models.load import load_tokenizer

TEXT = [f"the quick brown fox number {n} jumps over lazy dogs and cats" for n in range(300)]
BYTES = {"model_type": "bpe", "byte_fallback": True, "vocab_size": 340}
PIECES = {"model_type": "unigram", "vocab_size": 80, "hard_vocab_limit": False}
# model_type: its tokenizer class, its file, how such a file is made.
KINDS = {
    "llama": ("LlamaTokenizer", "tokenizer.model", BYTES),
    "gemma2": ("GemmaTokenizer", "tokenizer.model", BYTES),
    "xlm-roberta": ("XLMRobertaTokenizer", "sentencepiece.bpe.model", PIECES),
    "camembert": ("CamembertTokenizer", "sentencepiece.bpe.model", PIECES),
    "deberta-v2": ("DebertaV2Tokenizer", "spm.model", PIECES),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_sentencepiece_tokenizer_loads(kind, tmp_path):
    name, file, options = KINDS[kind]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, minloglevel=2, **options
    )
    (tmp_path / file).write_bytes(model.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind}))
    tokenizer = load_tokenizer(str(tmp_path))
    ids = tokenizer("the quick fox")["input_ids"]
    assert len(ids) >= 3
    assert tokenizer.decode(ids, skip_special_tokens=True).strip() == "the quick fox"
