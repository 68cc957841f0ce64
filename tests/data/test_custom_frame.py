"""`data.template`: the prompt of instruction rows, the same in training, scoring and generation."""

import json
from pathlib import Path

import pytest
from support.messages import refused
from support.models import make_byte_tokenizer

from moc_cli.data.custom.frame import frame_hash
from moc_cli.data.examples import InstructionExample
from moc_cli.data.splits import Splits, read_splits
from moc_cli.errors import DataError
from moc_cli.kinds import make_kind
from moc_cli.kinds.instruction import make_requests
from moc_cli.recipe.sections import DataSection
from moc_cli.serving.prompts import encode

TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
ROW = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be exact"}
OWN = '{system}\nJSON: {"task": "{instruction}"}\n{input}\nA: '


def read(folder: Path, row: dict, template: str) -> tuple[DataSection, Splits]:
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    section = {"suite": "custom", "path": str(path), "held_out": 0, "template": template}
    return read_splits(DataSection.model_validate(section))


def test_prompts_of_a_template(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(OWN)
    prompts = {
        "alpaca": "Be exact\n\n### Instruction:\nAdd\n\n### Input:\n1 2\n\n### Response:\n",
        "plain": "Be exact\nAdd\n1 2\n",
        str(own): 'Be exact\nJSON: {"task": "Add"}\n1 2\nA: ',
    }
    for template, prompt in prompts.items():
        (example,) = read(tmp_path, ROW, template)[1].train
        assert isinstance(example, InstructionExample)
        assert (example.prompt, example.output) == (prompt, "3")
    bare = {"instruction": "Use {input}", "output": "y"}
    assert read(tmp_path, bare, "plain")[1].train[0].prompt == "Use {input}\n"
    assert read(tmp_path, bare, str(own))[1].train[0].prompt == 'JSON: {"task": "Use {input}"}\nA: '


def test_the_text_of_a_template_goes_into_the_run(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text(OWN)
    data, splits = read(tmp_path, ROW, str(own))
    assert data.template == OWN
    assert splits.fingerprints()["template"] == {"sha256": frame_hash(OWN)}
    own.write_text(OWN, encoding="utf-8-sig")
    assert read(tmp_path, ROW, str(own))[0].template == OWN
    own.unlink()
    assert read(tmp_path, ROW, data.template)[1].train == splits.train


def test_the_chat_template_writes_instructions(tmp_path):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    data, splits = read(tmp_path, ROW | {"history": [["Hi", "Ho"]]}, "chat")
    kind = make_kind(data.task)
    encoded = kind.encode(splits.train, tokenizer, max_length=200, train_on_inputs=False)
    (row,) = encoded.rows
    first = "<s>system:Be exact</s><s>user:Hi</s><s>assistant:Ho</s>"
    prompt = f"{first}<s>user:Add\n\n1 2</s><s>assistant:"
    assert tokenizer.decode(row["input_ids"]) == f"{prompt}3</s>"
    assert tokenizer.decode([token for token in row["labels"] if token >= 0]) == "3</s>"
    (asked,) = make_requests(tokenizer, splits.train)
    assert (tokenizer.decode(asked.prompt), asked.output, asked.new) == (prompt, "3", 2)
    _, splits = read(tmp_path, {"instruction": "Add", "output": "3"}, "chat")
    (asked,) = make_requests(tokenizer, splits.train)
    assert data.frame == "chat"
    assert encode(tokenizer, "chat", [{"role": "user", "content": "Add"}]) == asked.prompt


def test_generation_asks_in_the_frame_of_the_run():
    tokenizer = make_byte_tokenizer()
    ids = encode(tokenizer, "instruction", [{"role": "user", "content": "Add"}], OWN)
    assert tokenizer.decode(ids, skip_special_tokens=True) == 'JSON: {"task": "Add"}\nA: '


@pytest.mark.parametrize(
    ("template", "row"),
    [
        ("plane", ROW),
        ("{instrution}", ROW),
        ("{input}", ROW),
        ("{instruction}{input}", ROW),
        ("plain", ROW | {"history": [["a", "b"]]}),
    ],
)
def test_templates_that_cannot_be_used_are_refused(tmp_path, template, row):
    with refused(DataError):
        read(tmp_path, row, template)
