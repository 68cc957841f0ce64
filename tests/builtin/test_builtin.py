"""The built-in world: no leak, files that the code makes, a model that knows its facts."""

import gzip
import hashlib
import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from builtin import world
from builtin.pretrain import batches, build_model, train_tokenizer
from builtin.words import RELATIONS
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import moc_cli.builtin

HERE = Path(moc_cli.builtin.__file__).parent
MODEL = HERE / "world-llama"
PARTS = world.make_parts()
DOCUMENTS = list(islice(world.documents(), 3000))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(MODEL)


def questions(*parts: str) -> set[str]:
    return {line for part in parts for fact in PARTS[part] for line in fact.questions()}


def test_every_word_has_one_use() -> None:
    subjects = {word for relation in RELATIONS for word in relation.subjects}
    words = [*subjects, *(word for relation in RELATIONS for word in relation.objects)]
    sentences = " ".join(
        line for relation in RELATIONS for line in (*relation.statements, *relation.questions)
    )
    assert len(words) == len(set(words)) == 240
    assert not set(words) & set(re.findall(r"\w+", sentences))


def test_parts_share_no_fact_and_leave_none_out() -> None:
    pairs = [(f.relation.name, f.subject) for part in PARTS.values() for f in part]
    assert len(pairs) == len(set(pairs)) == 480
    assert {name: len(facts) for name, facts in PARTS.items()} == {
        "asked": 160,
        "train": 128,
        "validation": 48,
        "test": 144,
    }


def test_the_world_is_a_function_of_its_seed() -> None:
    assert world.make_parts() == PARTS
    assert list(islice(world.documents(), 200)) == DOCUMENTS[:200]
    assert world.make_rows("test") == world.make_rows("test")
    assert world.make_parts(1) != PARTS
    assert list(islice(world.documents(1), 200)) != DOCUMENTS[:200]


def test_pretraining_asks_only_its_own_facts() -> None:
    put = set(re.findall(r"(?:Question|question): ([^?\n]*\?)", "\n".join(DOCUMENTS)))
    assert put <= questions("asked")
    assert len(put) > 400  # of 480: the pattern does find them
    marks = sum(text.count("?") for text in DOCUMENTS)
    found = sum(len(re.findall(r"(?:Question|question): ", text)) for text in DOCUMENTS)
    assert marks == found  # and there is no question that it misses
    assert not put & questions("train", "validation", "test")


def test_pretraining_never_shows_the_form_of_the_task() -> None:
    text = "\n".join(DOCUMENTS)
    assert "Options" not in text
    assert "the correct answer is" not in text
    objects = "|".join(word for relation in RELATIONS for word in relation.objects)
    assert not re.search(rf"\b({objects}), ({objects})\b", text)


def test_frame_documents_speak_of_asked_facts_only() -> None:
    told = {line for fact in PARTS["asked"] for line in fact.statements()}
    responses = [text.rsplit("\n", 1)[1].strip() for text in DOCUMENTS if "### Response" in text]
    said = [text.removeprefix("the answer: ") for text in responses]
    said = [text for text in said if not text.startswith("the sentence is")]
    assert len(said) > 200
    assert set(said) <= told


def test_every_fact_is_stated() -> None:
    text = "\n".join(DOCUMENTS)
    untold = [
        fact
        for part in PARTS.values()
        for fact in part
        if not any(line in text for line in fact.statements())
    ]
    assert untold == []


@pytest.mark.parametrize("split", world.SPLITS)
def test_rows_are_well_formed_and_ask_their_own_facts(split: str) -> None:
    answers = {line: fact.object for fact in PARTS[split] for line in fact.questions()}
    pools = [set(relation.objects) for relation in RELATIONS]
    rows = world.make_rows(split)
    for row in rows:
        assert list(row) == ["instruction", "input", "output", "answer", "candidates"]
        question = re.search(r"question: (.*\?)\n\nOptions: ", row["instruction"])[1]
        assert answers[question] == row["answer"]
        assert row["output"] == f"the correct answer is {row['answer']}"
        assert row["input"] == ""
        assert row["answer"] in row["candidates"]
        assert len(set(row["candidates"])) == 4
        assert any(set(row["candidates"]) <= pool for pool in pools)
        assert row["instruction"].endswith("Options: " + ", ".join(row["candidates"]))
    assert {row["instruction"].split("\n")[0].split("question: ")[1] for row in rows} == set(
        answers
    )


@pytest.mark.parametrize("split", world.SPLITS)
def test_no_constant_answer_does_well(split: str) -> None:
    rows = world.make_rows(split)
    places = Counter(row["candidates"].index(row["answer"]) for row in rows)
    words = Counter(row["answer"] for row in rows)
    assert set(places.values()) == {len(rows) // 4}
    assert words.most_common(1)[0][1] / len(rows) < 0.05


def test_words_frequent_in_training_answers_do_not_help_on_test() -> None:
    seen = Counter(row["answer"] for row in world.make_rows("train"))
    rows = world.make_rows("test")
    guesses = [max(row["candidates"], key=lambda word: seen[word]) for row in rows]
    right = sum(guess == row["answer"] for guess, row in zip(guesses, rows, strict=True))
    assert right / len(rows) < 0.3


@pytest.mark.parametrize("split", world.SPLITS)
def test_shipped_rows_are_what_the_generator_makes(split: str) -> None:
    packed = (HERE / "world" / f"{split}.jsonl.gz").read_bytes()
    assert gzip.decompress(packed).decode() == world.rows_text(world.make_rows(split))
    assert packed[4:8] == bytes(4)  # no time stamp


def test_shipped_tokenizer_is_what_the_script_trains() -> None:
    shipped = json.loads((MODEL / "tokenizer.json").read_text(encoding="utf-8"))
    trained = json.loads(train_tokenizer(world.SEED).backend_tokenizer.to_str())
    assert trained["model"] == shipped["model"]
    assert trained["pre_tokenizer"] == shipped["pre_tokenizer"]


def test_tokenizer_keeps_rows_short(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [w for relation in RELATIONS for w in (*relation.subjects, *relation.objects)]
    for ids in tokenizer([f" {word}" for word in words], add_special_tokens=False)["input_ids"]:
        assert len(ids) == 1
    frame = f"{world.HEADER}  \n\n{world.INDENT}### Instruction:\n{world.INDENT}"
    ids = tokenizer([frame + row["instruction"] for row in world.make_rows("test")])["input_ids"]
    assert max(map(len, ids)) < 64
    assert tokenizer.pad_token_id != tokenizer.eos_token_id != tokenizer.unk_token_id
    text = "Naïve zebra — 12 €\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True) == text


def test_an_answer_splits_alike_alone_and_after_its_prompt(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompt = f"### Response:\n{world.INDENT}"
    answer = "the correct answer is kitchen"
    apart = tokenizer(prompt)["input_ids"] + tokenizer(answer, add_special_tokens=False).input_ids
    assert tokenizer(prompt + answer)["input_ids"] == apart


def test_weights_are_the_ones_noted() -> None:
    digest = hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest()
    record = json.loads((MODEL / "pretraining.json").read_text(encoding="utf-8"))
    assert record["weights_sha256"] == digest
    assert digest in (MODEL / "README.md").read_text(encoding="utf-8")
    assert record["loss"][-1]["loss"] < record["loss"][0]["loss"] / 4


def test_model_states_the_facts_that_the_task_asks(tokenizer: PreTrainedTokenizerFast) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.dtype == torch.float32
    right = 0
    for fact in PARTS["test"]:
        line = fact.statements()[0]
        ids = tokenizer(line[: line.index(f" {fact.object}")], return_tensors="pt")["input_ids"]
        words = [f" {word}" for word in fact.relation.objects]
        choices = tokenizer(words, add_special_tokens=False, return_tensors="pt")["input_ids"][:, 0]
        with torch.no_grad():
            best = model(input_ids=ids).logits[0, -1, choices].argmax()
        right += words[best] == f" {fact.object}"
    assert right >= 0.9 * len(PARTS["test"])


def test_pretraining_starts_the_same_each_time(tokenizer: PreTrainedTokenizerFast) -> None:
    first, again = (next(batches(tokenizer, 0)) for _ in range(2))
    assert torch.equal(first, again)
    one, two = build_model(tokenizer, 0), build_model(tokenizer, 0)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    shipped = AutoModelForCausalLM.from_pretrained(MODEL)
    shapes = {name: tensor.shape for name, tensor in shipped.state_dict().items()}
    assert {name: tensor.shape for name, tensor in one.state_dict().items()} == shapes
