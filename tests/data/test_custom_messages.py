"""Conversations as others write them: their roles, parts, tools, weights and templates."""

import json
from pathlib import Path

import pytest
from support.messages import refused
from support.models import make_byte_tokenizer

from moc_cli.data.custom.chat import CHATML, chat_tokens, check_chats, set_template
from moc_cli.data.custom.frame import instruction_prompt
from moc_cli.data.custom.messages import turns_of
from moc_cli.data.custom.rows import read_custom
from moc_cli.data.examples import ChatExample, InstructionExample
from moc_cli.errors import DataError
from moc_cli.recipe.sections import DataSection

REWRITING = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.last %}<s>A:think {{ m.content }}"
    "</s>{% elif m.role == 'assistant' %}<s>A:{{ m.content }}</s>{% else %}<s>U:{{ m.content }}</s>"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<s>A:{% endif %}"
)
PLAIN = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
ASKED, ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}


def read(folder: Path, row: dict, **keys: object) -> list:
    """Return the training examples of one row, read beside another one."""
    path = folder / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    section = {"suite": "custom", "path": str(path), "held_out": 0, **keys}
    return read_custom(DataSection.model_validate(section)).train


def refuse(folder: Path, row: dict) -> None:
    with refused(DataError):
        read(folder, row)


def learned(examples: list[ChatExample], template: str) -> list[str]:
    """Return the learned text of each conversation."""
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = template
    return [
        tokenizer.decode([token for token, mark in zip(*row, strict=True) if mark])
        for row in chat_tokens(examples, tokenizer)
    ]


def test_sharegpt_is_read_like_role_and_content(tmp_path):
    turns = [("system", "S"), ("human", "Hi"), ("gpt", "Ho"), ("observation", "{}"), ("gpt", "Ha")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    (chat,) = read(tmp_path, row)
    roles = [role for role, _ in chat.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert learned([chat], PLAIN) == ["Ho</s>Ha</s>"]
    call = {"from": "function_call", "value": '{"name": "f", "arguments": {}}'}
    (chat,) = read(tmp_path, {"conversations": [row["conversations"][1], call]})
    assert turns_of(chat)[0][1]["tool_calls"][0]["function"]["name"] == "f"


def test_parts_null_tools_and_developers_reach_the_template(tmp_path):
    call = {"function": {"name": "f", "arguments": '{"i": 1}'}}
    turns = [
        {"role": "developer", "content": "D"},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "late"},
        {"role": "assistant", "content": "yes", "reasoning_content": "hm"},
    ]
    (chat,) = read(tmp_path, {"messages": turns, "tools": '[{"name": "f"}]'})
    messages, tools = turns_of(chat)
    assert messages[1]["content"] == "Hi"
    assert messages[2]["content"] == ""
    assert messages[2]["tool_calls"][0]["function"]["arguments"] == {"i": 1}
    assert tools == [{"name": "f"}]
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = PLAIN
    note, _ = check_chats([chat], tokenizer)
    assert note == ("the chat template does not write: tool_calls, name, reasoning_content, tools")
    shown = PLAIN.replace("{{ m['content'] }}", "{{ m.reasoning_content }}{{ m['content'] }}")
    tokenizer.chat_template = "{{ tools }}" + shown
    note, _ = check_chats([chat], tokenizer)
    assert note == "the chat template does not write: tool_calls, name"
    picture = {"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}
    refuse(tmp_path, {"messages": [picture, ANSWERED]})


def test_calls_that_are_no_list_are_refused(tmp_path):
    for calls in (True, {"name": "f"}, "f"):
        refuse(tmp_path, {"messages": [ASKED, ANSWERED | {"tool_calls": calls}]})


def test_answers_of_weight_zero_are_not_learned(tmp_path):
    turns = [ASKED, ANSWERED | {"weight": 0}, ASKED, {"role": "assistant", "content": "Yes"}]
    (chat,) = read(tmp_path, {"messages": turns})
    assert learned([chat], PLAIN) == ["Yes</s>"]
    refuse(tmp_path, {"messages": [ASKED, ANSWERED | {"weight": 0.5}]})
    refuse(tmp_path, {"messages": [ASKED, ANSWERED | {"weight": 0}]})


def test_the_assistant_may_begin(tmp_path):
    (chat,) = read(tmp_path, {"messages": [ANSWERED, ASKED, ANSWERED]})
    assert learned([chat], PLAIN) == ["Ho</s>Ho</s>"]


def test_a_template_that_rewrites_earlier_answers(tmp_path):
    turns = {"messages": [ASKED, ANSWERED, ASKED, {"role": "assistant", "content": "Yes"}]}
    (chat,) = read(tmp_path, turns)
    assert learned([chat], REWRITING) == ["think Yes</s>"]
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = REWRITING
    assert "rewrites earlier answers of 1 conversations" in check_chats([chat], tokenizer)[0]
    split = read(tmp_path, turns, chat_turns="split")
    assert learned(split, REWRITING) == ["think Ho</s>", "think Yes</s>"]
    assert learned(read(tmp_path, turns, chat_turns="last"), PLAIN) == ["Yes</s>"]


def test_system_messages_are_written_merged_or_refused(tmp_path):
    row = {"messages": [ASKED, ANSWERED], "system": "Be kind"}
    (chat,) = read(tmp_path, row)
    assert chat.messages[0] == ("system", "Be kind")
    deaf = PLAIN.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    with refused(DataError):
        learned([chat], deaf)
    (chat,) = read(tmp_path, row, merge_system=True)
    assert chat.messages[0] == ("user", "Be kind\n\nHi")


@pytest.mark.parametrize("code", ["{{ 'a' + 1 }}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}"])
def test_whatever_a_template_raises_is_told_with_its_line(code, tmp_path):
    (chat,) = read(tmp_path, {"messages": [ASKED, ANSWERED]})
    with refused(DataError):
        learned([chat], code)


def test_a_template_of_ones_own(tmp_path):
    tokenizer = make_byte_tokenizer()
    set_template(tokenizer, "chatml")
    assert tokenizer.chat_template == CHATML
    (tmp_path / "mine.jinja").write_text(PLAIN)
    set_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == PLAIN
    (tmp_path / "mine.jinja").write_text(PLAIN, encoding="utf-8-sig")
    set_template(tokenizer, str(tmp_path / "mine.jinja"))
    assert tokenizer.chat_template == PLAIN
    with refused(DataError):
        set_template(tokenizer, "nowhere")


def test_history_and_system_of_an_instruction_are_in_its_prompt(tmp_path):
    row = {"instruction": "b?", "output": "c", "history": [["a?", "b"]], "system": "Be kind"}
    (example,) = read(tmp_path, row)
    assert isinstance(example, InstructionExample)
    assert example.prompt == instruction_prompt("b?", "", "Be kind", [("a?", "b")])
    assert example.prompt == (
        "Be kind\n\n### Instruction:\na?\n\n### Response:\nb\n\n"
        "### Instruction:\nb?\n\n### Response:\n"
    )
    refuse(tmp_path, row | {"history": ["a?"]})


def test_an_answer_of_which_the_template_writes_nothing_is_not_learned(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
    turns = [ASKED, call, {"role": "tool", "content": "{}"}, ANSWERED]
    tokenizer = make_byte_tokenizer()
    marked = PLAIN.replace(
        "{{ m['content'] }}</s>", "{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    )
    for template in (PLAIN, marked):
        tokenizer.chat_template = template
        chats = read(tmp_path, {"messages": turns})
        assert learned(chats, template) == ["Ho</s>"]
        notes = check_chats(chats, tokenizer)
        assert "1 answers are not learned: the chat template writes nothing of them" in notes
    with refused(DataError):
        learned(read(tmp_path, {"messages": turns[:2]}), PLAIN)
    empty = {"role": "assistant", "content": " "}
    chats = read(tmp_path, {"messages": [ASKED, empty, *turns]}, chat_turns="last")
    assert learned(chats, PLAIN) == ["Ho</s>"]
    written = PLAIN.replace("{{ m['content'] }}", "{{ m['content'] }}{{ m['tool_calls'] }}")
    assert learned(read(tmp_path, {"messages": turns[:2]}), written)[0].startswith("[{'function'")
