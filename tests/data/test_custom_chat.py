"""Conversations: which tokens are learned, by templates of several kinds, and what they refuse."""

import re

from support.messages import refused
from support.models import make_byte_tokenizer
from transformers import AutoTokenizer

from moc_cli.data.custom.chat import chat_tokens, check_chats
from moc_cli.data.encode import IGNORED, encode_chats
from moc_cli.data.examples import ChatExample
from moc_cli.errors import DataError

HEADERS = (
    "{% for m in messages %}<s>{{ m['role'] }}:{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant:{% endif %}"
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "A:{% generation %}{{ m['content'] }}</s>{% endgeneration %}{{ '\\n' }}"
    "{% else %}U:{{ m['content'] }}\n{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ALTERNATING = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "[{{ m['content'] }}]{% endfor %}"
)
FORGETFUL = "{% for m in messages[-2:] %}[{{ m['content'] }}]{% endfor %}"
TURNS = (("user", "Hi"), ("assistant", "Hello\n\nyou "), ("user", "Bye"), ("assistant", "See you"))


def tokenizer(template: str):
    made = make_byte_tokenizer()
    made.chat_template = template
    return made


def conversation(*turns: tuple[str, str], line: int = 1) -> ChatExample:
    return ChatExample("custom", turns, ("chat.jsonl", "line", line))


def learned(template: str, *turns: tuple[str, str]) -> str:
    """The whole chat, with what is learned in double brackets."""
    made = tokenizer(template)
    ((ids, marks),) = chat_tokens([conversation(*turns)], made)
    pairs = zip(ids, marks, strict=True)
    pieces = "".join(f"[[{made.decode([i])}]]" if m else made.decode([i]) for i, m in pairs)
    return pieces.replace("]][[", "")


def test_only_the_assistant_and_its_end_token_are_learned():
    assert learned(HEADERS, *TURNS) == (
        "<s>user:Hi</s>\n<s>assistant:[[Hello\n\nyou </s>]]\n"
        "<s>user:Bye</s>\n<s>assistant:[[See you</s>]]\n"
    )
    assert learned(HEADERS, ("system", "Be kind"), *TURNS[:2]) == (
        "<s>system:Be kind</s>\n<s>user:Hi</s>\n<s>assistant:[[Hello\n\nyou </s>]]\n"
    )


def test_a_template_may_mark_its_answers_itself():
    assert learned(MARKED, *TURNS) == "U:Hi\nA:[[Hello\n\nyou </s>]]\nU:Bye\nA:[[See you</s>]]\n"


def test_a_check_has_the_template_write_no_more_than_the_tokens_need(monkeypatch):
    made, written = tokenizer(HEADERS), []
    apply = made.apply_chat_template
    monkeypatch.setattr(
        made, "apply_chat_template", lambda *a, **b: (written.append(a), apply(*a, **b))[1]
    )
    chat_tokens([conversation(*TURNS)], made)
    needed = len(written)
    assert check_chats([conversation(*TURNS)] * 3, made) == []
    assert len(written) == 2 * needed > 0


def test_without_an_end_token_the_line_break_ends_a_turn():
    assert learned(NO_END, *TURNS[:2]) == "user: Hi\nassistant: [[Hello\n\nyou \n]]"


def test_labels_are_the_learned_tokens_and_what_comes_before_them_may_vote():
    made, example = tokenizer(HEADERS), conversation(*TURNS)
    ((ids, marks),) = chat_tokens([example], made)
    encoded = encode_chats([example], made, max_length=500, train_on_inputs=False)
    (row,) = encoded.rows
    assert row["input_ids"] == ids
    assert row["labels"] == [i if m else IGNORED for i, m in zip(ids, marks, strict=True)]
    assert encoded.prompt_lengths == [marks.index(True)]
    (row,) = encode_chats([example], made, max_length=500, train_on_inputs=True).rows
    assert row["labels"] == [IGNORED, *ids[1:]]
    cut = encode_chats([example, example], made, max_length=10, train_on_inputs=False)
    assert (cut.truncated, cut.answers_cut_off) == (2, 2)
    assert cut.prompt_lengths == [10, 10]
    assert cut.ids == [ids[:10]] * 2


def test_refused_chats_are_named_all_at_once():
    good, twice = conversation(("user", "a"), ("assistant", "b")), (("user", "a"), ("user", "b"))
    bad = [conversation(*twice, ("assistant", "c"), line=n) for n in range(9, 1, -1)]
    with refused(DataError):
        chat_tokens([good, *bad], tokenizer(ALTERNATING))


def test_templates_that_do_not_tell_their_answers_are_refused():
    with refused(DataError):
        chat_tokens([conversation(*TURNS)], tokenizer(FORGETFUL))
    with refused(DataError):
        chat_tokens(
            [conversation(*TURNS)], tokenizer(MARKED.replace("== 'assistant'", "== 'nobody'"))
        )
    with refused(DataError):
        chat_tokens([conversation(*TURNS)], make_byte_tokenizer())


def test_learned_tokens_of_a_real_template(real_weights):
    """Against the markers of the written chat, found by a search in its text."""
    made = AutoTokenizer.from_pretrained(real_weights("smollm2-135m"))
    turns = (("system", "Be brief."), *TURNS, ("user", "One more?"), ("assistant", "No."))
    ((ids, marks),) = chat_tokens([conversation(*turns)], made)
    text = made.apply_chat_template(
        [{"role": role, "content": content} for role, content in turns], tokenize=False
    )
    pattern = r"(?<=<\|im_start\|>assistant\n).*?<\|im_end\|>"
    wanted = [match.span() for match in re.finditer(pattern, text, flags=re.DOTALL)]
    places = made(text, return_offsets_mapping=True, add_special_tokens=False)
    assert places["input_ids"] == ids
    expected = [
        any(start <= first and last <= end for start, end in wanted)
        for first, last in places["offset_mapping"]
    ]
    assert marks == expected
    answers = made.decode([token for token, mark in zip(ids, marks, strict=True) if mark])
    assert answers == "Hello\n\nyou <|im_end|>See you<|im_end|>No.<|im_end|>"
    assert sum(made.convert_tokens_to_ids("<|im_end|>") == token for token in ids) == 7
