"""Conversations in the rows of a custom dataset, as OpenAI and ShareGPT write them.

Role and content, or from and value. Content may be a text, null, or parts of text. What a message
holds beside them (tool_calls, reasoning_content, name) and the tools of the row are kept for the
chat template.
"""

import json
from collections.abc import Mapping
from typing import Any

from moc_cli.data.examples import ChatExample, Place
from moc_cli.data.source import BadRow, Fields, check_utf8, column_of_row, shown
from moc_cli.recipe.sections import ChatTurns
from moc_cli.recipe.suggest import did_you_mean

ROLES = ("system", "developer", "user", "assistant", "tool")
ALIASES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
_LEARNED = ("weight", "train", "loss")  # 0 or false: this answer is not learned
Turn = dict[str, Any]


class NothingToLearn(Exception):
    """A row is left out and counted; the message says why."""


def read_chat(
    fields: Fields, columns: Mapping[str, str], task: str, place: Place, *, merge_system: bool
) -> ChatExample:
    """Return the conversation of a row; raises BadRow or NothingToLearn.

    `columns` names those of `messages`, and of `tools` and `system` where there are any. With
    `merge_system` system messages become the beginning of the first user message.
    """
    column = columns["messages"]
    value = column_of_row(fields, column)
    if not isinstance(value, list):
        raise BadRow(f"'{column}' is {shown(value)}, not a list of messages")
    turns = [_turn(item, f"{column}[{index}]") for index, item in enumerate(value)]
    system = fields.get(columns.get("system", ""))
    if system and any(turn["role"] == "system" for turn in turns):
        raise BadRow("a column 'system' beside a system message")
    if system:
        turns.insert(0, {"role": "system", "content": check_utf8(str(system), "system")})
    if merge_system:
        turns = _merged(turns)
    answers = [index for index, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers:
        raise BadRow(f"'{column}' has no message of the assistant to learn")
    unlearned = tuple(index for index in answers if not _is_learned(turns[index]))
    for turn in turns:
        for key in _LEARNED:
            turn.pop(key, None)
    if all(not turns[index]["content"].strip() and len(turns[index]) == 2 for index in answers):
        raise NothingToLearn("an empty answer")
    if len(unlearned) == len(answers):
        raise NothingToLearn("no answer of a weight above 0")
    tools = _tools(fields.get(columns.get("tools", "")))
    return _example(task, turns, tools, place, unlearned)


def split_chats(examples: list[ChatExample], turns: ChatTurns) -> list[ChatExample]:
    """Return each conversation once for each answer (`split`) or up to its last (`last`)."""
    if turns == "all":
        return examples
    parts = []
    for example in examples:
        messages, tools = turns_of(example)
        answers = [n for n, turn in enumerate(messages) if turn["role"] == "assistant"]
        learned = [
            n
            for n in answers
            if n not in example.unlearned
            and (messages[n]["content"].strip() or len(messages[n]) > 2)
        ]
        for last in learned if turns == "split" else learned[-1:]:
            earlier = tuple(n for n in answers if n < last)
            parts.append(
                _example(example.task, messages[: last + 1], tools, example.place, earlier)
            )
    return parts


def turns_of(example: ChatExample) -> tuple[list[Turn], list[Any] | None]:
    """Return the messages and the tools of a conversation as a chat template takes them."""
    if example.record:
        record = json.loads(example.record)
        return record["messages"], record["tools"]
    return [{"role": role, "content": content} for role, content in example.messages], None


def _example(
    task: str, turns: list[Turn], tools: list[Any] | None, place: Place, unlearned: tuple[int, ...]
) -> ChatExample:
    messages = tuple((turn["role"], turn["content"]) for turn in turns)
    record = ""
    if tools or any(len(turn) > 2 for turn in turns):
        try:
            record = json.dumps({"messages": turns, "tools": tools}, default=str)
        except (RecursionError, ValueError):
            raise BadRow("a message that is nested too deeply") from None
    return ChatExample(task, messages, place, record, unlearned)


def _turn(item: Any, place: str) -> Turn:
    """Return a message with role, content and all that it holds beside them but null."""
    if not isinstance(item, dict):
        raise BadRow(f"{place} is {shown(item)}, not an object with role and content")
    role_key, content_key = ("from", "value") if "from" in item else ("role", "content")
    called = item.get("tool_calls")
    for key in (role_key, content_key):
        if key not in item and not (key == content_key and called):
            raise BadRow(f"{place} has no '{key}'{did_you_mean(key, item)}")
    name = item[role_key]
    role = ALIASES.get(name, name) if isinstance(name, str) else name
    if role not in ROLES:
        allowed = (*ROLES, *ALIASES) if role_key == "from" else ROLES
        raise BadRow(f"{place}.{role_key} is {shown(name)}; allowed: {', '.join(allowed)}")
    content = _content(item.get(content_key), f"{place}.{content_key}")
    extra = {key: value for key, value in item.items() if value is not None}
    for key in (role_key, content_key):
        extra.pop(key, None)
    if name == "function_call" and (call := _parsed(content)):
        content, extra = "", extra | {"tool_calls": [{"type": "function", "function": call}]}
    if called:
        if not isinstance(called, list):
            raise BadRow(f"{place}.tool_calls is {shown(called)}, not a list of calls")
        extra["tool_calls"] = [_call(call, f"{place}.tool_calls") for call in called]
    return {"role": role, "content": content} | extra


def _content(value: Any, place: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return "".join(_part(part, place) for part in value)
    if not isinstance(value, str):
        raise BadRow(f"{place} is {shown(value)}, not a text")
    return check_utf8(value, place)


def _part(part: Any, place: str) -> str:
    text = part.get("text") if isinstance(part, dict) else part
    if isinstance(part, dict) and part.get("type", "text") != "text":
        raise BadRow(f"{place} has a part of type {shown(part['type'])}; only text is read")
    return _content(text, place)


def _call(call: Any, place: str) -> Any:
    """Return a tool call with its arguments as an object, which templates want, not as its JSON."""
    if not isinstance(call, dict):
        raise BadRow(f"{place} holds {shown(call)}, not an object")
    function = call.get("function")
    if isinstance(function, dict) and isinstance(function.get("arguments"), str):
        arguments = _parsed(function["arguments"])
        if arguments is not None:
            return call | {"function": function | {"arguments": arguments}}
    return call


def _parsed(text: str) -> Any:
    """Return the object or list that a text writes as JSON; None where it writes none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def _tools(value: Any) -> list[Any] | None:
    if isinstance(value, str) and value.strip():
        tools = _parsed(value)
        if not isinstance(tools, list):
            raise BadRow(f"'tools' is {shown(value)}, not a list of tools")
        return tools
    return value if isinstance(value, list) and value else None


def _is_learned(turn: Turn) -> bool:
    for key in _LEARNED:
        value = turn.get(key, 1)
        if value not in (0, 1):
            raise BadRow(f"a message has '{key}' {shown(value)}; allowed: 0, 1")
        if not value:
            return False
    return True


def _merged(turns: list[Turn]) -> list[Turn]:
    systems = [turn["content"] for turn in turns if turn["role"] in ("system", "developer")]
    other_turns = [dict(turn) for turn in turns if turn["role"] not in ("system", "developer")]
    if not systems:
        return turns
    first = next((turn for turn in other_turns if turn["role"] == "user"), None)
    if first is None:
        return [{"role": "user", "content": "\n\n".join(systems)}, *other_turns]
    first["content"] = "\n\n".join([*systems, first["content"]])
    return other_turns
