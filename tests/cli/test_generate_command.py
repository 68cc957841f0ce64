"""`moc generate`: prompts reach the model framed as trained, and what comes back is whole."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.messages import refused
from support.models import make_byte_tokenizer, make_pair_tokenizer, make_tiny_model, train_controls
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moc_cli.cli import run
from moc_cli.data.custom.frame import instruction_prompt
from moc_cli.data.encode import prompt_tokens
from moc_cli.data.suites import load_examples
from moc_cli.errors import DataError, MocError
from moc_cli.methods import Adapted, attach, bare
from moc_cli.models.load import load_tokenizer
from moc_cli.recipe.methods import MocMethod
from moc_cli.recipe.tasks import find_task
from moc_cli.serving.chat import Chat
from moc_cli.serving.options import Sampling
from moc_cli.serving.prompts import choose_frame, encode, read_prompts, split_prompts
from moc_cli.serving.text import AnswerStreamer, Writer, decode, harmless

MANY_BYTES = "a é 漢字 👩‍🚀 \u2028 z"
MESSAGES = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="module")
def adapted() -> Adapted:
    """A tiny Llama whose controls change what it says."""
    method = MocMethod(rank=4, alpha=0.5, gate={"projection_dim": 8})
    found = attach(make_tiny_model("llama"), method, seed=3)
    train_controls(found.named_trainables())
    return found


def writer(found: Adapted, **sampling: object) -> Writer:
    options = {"max_new_tokens": 12} | sampling
    return Writer(found, make_byte_tokenizer(), sampling=Sampling(**options))  # type: ignore[arg-type]


# Pieces of text


def blank_joining_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece's: blanks begin a token, and letters unknown to it come as single bytes."""
    words = ["<unk>", "</s>", "▁", "▁a", "b", "▁bc"] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {word: index for index, word in enumerate(words)}
    bpe = models.BPE(
        vocab=vocabulary,
        merges=[("▁", "a")] if "a" in vocabulary else [],
        unk_token="<unk>",
        byte_fallback=True,
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


TOKENIZERS = {"bytes": make_byte_tokenizer, "pieces": blank_joining_tokenizer}


def streamed(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[str]:
    got: list[str] = []
    pieces = AnswerStreamer(tokenizer, got.append)
    pieces.put(torch.tensor([[7, 8, 9]]))  # the prompt
    for token in ids:
        pieces.put(torch.tensor([token]))
    pieces.end()
    return got


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [MANY_BYTES, "a bc  b a", "a\n b\n\n  bc\n", "\n", ""])
def test_pieces_are_the_text(name: str, text: str) -> None:
    """Nothing is lost, doubled or shown before it is whole, though a letter takes four tokens."""
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    got = streamed(tokenizer, [*ids, tokenizer.eos_token_id])
    assert "".join(got) == decode(tokenizer, ids) == text
    assert not any("\ufffd" in piece for piece in got)


def test_pieces_come_word_by_word() -> None:
    """A line break and an ideograph end a piece, too."""
    tokenizer = make_byte_tokenizer()
    ids = tokenizer("aé👩 b\n漢字!")["input_ids"]
    assert streamed(tokenizer, ids) == ["aé👩 ", "b\n", "漢", "字", "!"]


def test_any_tokens_at_all_are_streamed_whole() -> None:
    """Random bytes: such that are no character too, in the middle and at the end."""
    tokenizer = make_byte_tokenizer()
    generator = torch.Generator().manual_seed(0)
    broken = 0
    for _ in range(60):
        ids = torch.randint(len(tokenizer), (20,), generator=generator).tolist()
        text = decode(tokenizer, ids)
        broken += "\ufffd" in text
        assert "".join(streamed(tokenizer, ids)) == text
    assert broken > 30


def test_what_could_steer_a_terminal_is_shown_instead() -> None:
    assert harmless("a\x1b]0;x\x07\r\x9b1m\u202eb") == "a\\x1b]0;x\\x07\\r\\x9b1m\\u202eb"
    assert harmless(MANY_BYTES.replace("\u2028", "")) == MANY_BYTES.replace("\u2028", "")
    assert harmless("one\n\ttwo\xa0three\u3000four") == "one\n\ttwo\xa0three\u3000four"


# Answers


def test_an_answer_is_the_models_own(adapted: Adapted) -> None:
    """Greedy: every token is the likeliest after all before it; the base has no controls."""
    tokenizer = make_byte_tokenizer()
    prompt = tokenizer("Say: ")["input_ids"]
    plain = make_tiny_model("llama")
    for base in (False, True):
        got: list[str] = []
        me = writer(adapted)
        answer = me.answer(me.messages("Say: "), got.append, base=base)
        ids = list(prompt)
        for _ in range(answer.tokens):
            with torch.no_grad():
                if base:
                    logits = plain(torch.tensor([ids])).logits
                else:
                    voters = torch.zeros(1, len(ids), dtype=torch.long)
                    voters[:, : len(prompt)] = 1  # the prompt alone votes
                    with adapted.voting(voters):
                        logits = adapted.model(torch.tensor([ids]), use_cache=False).logits
            ids.append(int(logits[0, -1].argmax()))
        assert answer.text == decode(tokenizer, ids[len(prompt) :]) == "".join(got)
        assert (answer.prompt_tokens, answer.tokens) == (len(prompt), 12)
    assert adapted.model.training is False


def test_an_answer_comes_in_pieces(adapted: Adapted) -> None:
    got: list[str] = []
    me = writer(adapted, max_new_tokens=200, temperature=3.0)
    assert me.answer(me.messages("Say: "), got.append).text == "".join(got)
    assert len(got) > 1


def test_answers_differ_from_the_bases(adapted: Adapted) -> None:
    me = writer(adapted)
    messages = me.messages("Say: ")
    assert me.answer(messages).text != me.answer(messages, base=True).text
    assert (
        me.answer(messages, base=True).text
        == writer(bare(make_tiny_model("llama"))).answer(messages).text
    )


def test_a_seed_beyond_the_last_one_is_refused_at_once(capsys) -> None:
    call = ["generate", "--model", "builtin:world-llama", "--prompt", "a", "--seed"]
    assert run([*call, str(2**64)]) == 2
    assert "4294967295" in capsys.readouterr().err


def test_a_seed_gives_an_answer_and_leaves_the_rest_alone(adapted: Adapted) -> None:
    messages = writer(adapted).messages("Say: ")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = writer(adapted, temperature=1.5, seed=1).answer(messages).text
    assert torch.equal(torch.rand(1), expected)
    assert first == writer(adapted, temperature=1.5, seed=1).answer(messages).text
    others = {writer(adapted, temperature=1.5, seed=n).answer(messages).text for n in range(4)}
    assert len(others) == 4
    coolest = writer(adapted, temperature=1e-4, seed=3).answer(messages).text
    nucleus = writer(adapted, temperature=1.5, top_p=1e-6, seed=3).answer(messages).text
    assert coolest == nucleus == writer(adapted).answer(messages).text


def test_a_checkpoints_own_defaults_do_not_change_the_choice(adapted: Adapted) -> None:
    me = writer(adapted)
    messages = me.messages("Say: ")
    expected = me.answer(messages).text
    config = adapted.model.generation_config
    before = config.to_dict()
    try:
        config.update(do_sample=True, temperature=3.0, top_k=2, repetition_penalty=9.0)
        config.update(num_beams=3, max_length=7)
        assert writer(adapted).answer(messages).text == expected
        letter = me.tokenizer(expected)["input_ids"][0]
        config.update(suppress_tokens=[letter], no_repeat_ngram_size=1)
        assert writer(adapted).answer(messages).text == expected
    finally:
        config.update(**before)


def test_a_beam_search_gives_its_text_at_once(adapted: Adapted) -> None:
    got: list[str] = []
    me = writer(adapted, num_beams=3)
    answer = me.answer(me.messages("Say: "), got.append)
    assert got == [answer.text]


def test_an_end_token_ends_it(adapted: Adapted) -> None:
    """Both the checkpoint's and the tokenizer's; the end token itself is no text."""
    me = writer(adapted)
    messages = me.messages("Say: ")
    whole = me.answer(messages)
    assert not whole.ended
    first, got = me.tokenizer(whole.text)["input_ids"][0], []
    before = adapted.model.generation_config.eos_token_id
    try:
        adapted.model.generation_config.eos_token_id = [250, first]
        cut = me.answer(messages, got.append)
    finally:
        adapted.model.generation_config.eos_token_id = before
    assert (cut.ended, cut.tokens, cut.text, got) == (True, 1, "", [])


@pytest.mark.parametrize("options", [{"num_beams": 2, "temperature": 0.5}, {"top_p": 0.5}])
def test_contradicting_settings(options: dict) -> None:
    with refused(MocError):
        Sampling(**options).check()


def test_a_prompt_must_leave_room(adapted: Adapted) -> None:
    """The model has 512 positions; the answer takes what is left of them."""
    me = writer(adapted)
    assert me.answer(me.messages("x" * 505)).tokens == 7
    with refused(DataError):
        me.answer(me.messages("x" * 512))
    with refused(DataError):
        me.answer(me.messages(" \n"))


# Frames


def test_a_commonsense_run_is_asked_as_in_its_evaluation() -> None:
    """To the token, on a row of the built-in task."""
    tokenizer = load_tokenizer("builtin:world-llama")
    example = load_examples("builtin", "world", "test")[0]
    frame, _ = choose_frame("auto", find_task("builtin", "world", None).kind.frame, tokenizer)
    instruction = example.eval_prompt.split("### Instruction:\n")[1].split("\n\n" + " " * 16)[0]
    messages = writer(bare(make_tiny_model("llama"))).messages(
        "before", "then", instruction.strip()
    )
    assert encode(tokenizer, frame, messages) == prompt_tokens(tokenizer, example)[0]


def test_the_frame_follows_the_run_and_the_tokenizer() -> None:
    plain, templated = make_byte_tokenizer(), make_byte_tokenizer()
    templated.chat_template = MESSAGES
    assert choose_frame("auto", "commonsense", templated)[0] == "commonsense"
    assert choose_frame("auto", None, templated)[0] == "chat"
    assert find_task("commonsense", "boolq", None).kind.frame == "commonsense"
    formats = ("instruction", "chat", "text", None)
    frames = [find_task("custom", "custom", format).kind.frame for format in formats]
    assert frames == ["instruction", "chat", "raw", None]
    assert choose_frame("auto", None, plain)[0] == "raw"
    assert choose_frame("raw", "commonsense", templated)[0] == "raw"
    with refused(MocError):
        choose_frame("chat", None, plain)


def test_conversations_in_each_frame() -> None:
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = MESSAGES
    me = Writer(None, tokenizer, "chat")
    messages = me.messages("Hi", "Hello", "Who?")
    text = "[user]Hi[assistant]Hello[user]Who?[assistant]"
    assert tokenizer.decode(encode(tokenizer, "chat", messages)) == text
    assert tokenizer.decode(encode(tokenizer, "raw", messages)) == "Hi\nHello\nWho?"
    assert tokenizer.decode(encode(tokenizer, "instruction", messages)) == instruction_prompt(
        "Who?"
    )
    told = Writer(None, tokenizer, "chat", system="Be brief").messages("Hi")
    with refused(MocError):
        encode(tokenizer, "chat", told)


# Prompts


def test_prompts_of_a_file(tmp_path: Path) -> None:
    lines = tmp_path / "p.txt"
    lines.write_bytes("one\r\n\n  two\u2028still two \nthree".encode())
    assert read_prompts(lines) == ["one", "  two\u2028still two ", "three"]
    lines.write_text("one\n", encoding="utf-8-sig")
    assert read_prompts(lines) == ["one"]
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"prompt": "a\\nb", "more": 1}\n\n{"prompt": "c"}\n')
    assert read_prompts(rows) == ["a\nb", "c"]


def test_every_bad_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "p.jsonl"
    file.write_text('{"prompt": ""}\n{"prompt": "fine"}\nxx\n{"q": 1}\n["a"]\n{"prompt": 3}\n{}\n')
    with refused(DataError):
        read_prompts(file)
    with refused(DataError):
        split_prompts("\n \n", "stdin")
    file.write_bytes(b'{"prompt": "\xff"}')
    with refused(DataError):
        read_prompts(file)
    with refused(DataError):
        read_prompts(tmp_path / "none.txt")


# Conversations


def converse(
    me: Writer, lines: list[str | BaseException], **options: bool
) -> tuple[Chat, str, list[str]]:
    """Hold a conversation: what was written, and the notes."""
    pending, written, notes = iter(lines), [], []

    def read() -> str:
        line = next(pending, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    chat = Chat(me, read=read, write=written.append, say=notes.append, **options)
    chat.run()
    return chat, "".join(written), notes


def test_a_conversation_goes_on_from_what_was_said(adapted: Adapted) -> None:
    me = writer(adapted)
    first = me.answer(me.messages("Say: ".strip())).text
    second = me.answer(me.messages("Say:", first, "And?")).text
    alone = me.answer(me.messages("And?")).text
    assert second != alone
    chat, written, notes = converse(me, ["Say:", "", "And?", "/reset", "And?"])
    assert written == f"{first}\n{second}\n{alone}\n\n"
    assert chat.texts == ["And?", alone]
    assert "cleared" in notes
    assert converse(me, ["/exit", "Say:"])[1] == ""
    assert converse(me, [KeyboardInterrupt()])[1] == "\n"
    assert "no command /rest" in converse(me, ["/rest"])[2][-1]


def test_single_questions_stand_alone(adapted: Adapted) -> None:
    me = Writer(adapted, make_byte_tokenizer(), "commonsense", sampling=Sampling(4))
    alone = me.answer(me.messages("And?")).text
    assert converse(me, ["Say:", "And?"])[1].splitlines()[1] == alone
    assert "/reset" not in converse(me, ["Say:", "x" * 600])[2][-1]


def test_the_base_answers_the_same_conversation(adapted: Adapted) -> None:
    me = writer(adapted)
    messages = me.messages("Say:")
    expected = f"{me.answer(messages).text}\nbase: {me.answer(messages, base=True).text}\n\n"
    assert converse(me, ["Say:"], base=True)[1] == expected


def test_a_turn_that_fails_leaves_no_trace(
    adapted: Adapted, monkeypatch: pytest.MonkeyPatch
) -> None:
    me = writer(adapted)
    chat, _, notes = converse(me, ["Say:", "x" * 600])
    assert len(chat.texts) == 2
    assert notes[-1].endswith("the model takes 512 with its answer; /reset starts over")

    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, "answer", stopped)
    chat, _, notes = converse(me, ["Say:"])
    assert chat.texts == []
    assert "stopped" in notes[-1]


# The command


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("runs") / "quick"
    short = ("train.max_steps=2", "eval.before=false", "eval.max_samples=4")
    sets = [word for value in short for word in ("--set", value)]
    torch.set_num_threads(1)
    assert run(["train", "quickstart", "--json", "--output-dir", str(folder), *sets]) == 0
    return str(folder)


@pytest.fixture
def generate(trained: str, capfd: pytest.CaptureFixture) -> Callable[..., tuple[str, str]]:
    """`generate(*arguments)`: what `moc generate RUN` writes to stdout and stderr."""

    def call(*arguments: str, code: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        assert run(["generate", trained, "--device", "cpu", *arguments]) == code
        return capfd.readouterr()

    return call


def test_one_prompt_as_text_and_as_json(generate: Callable, trained: str) -> None:
    asked = ("--prompt", "Where is the cup?", "--max-new-tokens", "6")
    text, told = generate(*asked)
    assert "template: commonsense" in told
    found = json.loads(generate(*asked, "--json")[0])
    assert text == found["text"] + "\n"
    assert found["base"] is None
    assert found["model"] == trained
    assert found["tokens_per_second"] == pytest.approx(found["tokens"] / found["seconds"])
    raw, told = generate(*asked, "--raw")
    assert raw != text
    assert "template: raw" in told


def test_the_base_stands_below(generate: Callable) -> None:
    asked = ("--prompt", "Where is the cup?", "--max-new-tokens", "6", "--base")
    found = json.loads(generate(*asked, "--json")[0])
    assert generate(*asked)[0] == f"run: {found['text']}\nbase: {found['base']['text']}\n"


def test_a_file_of_prompts(generate: Callable, tmp_path: Path) -> None:
    """Each is answered as if it were alone; progress goes to stderr."""
    file = tmp_path / "p.txt"
    file.write_text("Where is the cup?\nWho is Ann?\n")
    limit = ("--max-new-tokens", "6")
    out, told = generate("--file", str(file), *limit, "--json")
    answers = json.loads(out)["answers"]
    for prompt, answer in zip(("Where is the cup?", "Who is Ann?"), answers, strict=True):
        assert answer["prompt"] == prompt
        assert generate("--prompt", prompt, *limit)[0] == answer["text"] + "\n"
    assert "generate 2/2" in told
    texts = [answer["text"] for answer in answers]
    expected = f"[1] Where is the cup?\n{texts[0]}\n\n[2] Who is Ann?\n{texts[1]}\n"
    assert generate("--file", str(file), *limit)[0] == expected


@pytest.mark.parametrize("arguments", [(), ("--prompt", "-"), ("--file", "-")])
def test_a_prompt_from_stdin(
    generate: Callable, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    limit = ("--max-new-tokens", "4")
    expected = generate("--prompt", "Where is Ann?", *limit)[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Where is Ann?\n"))
    assert generate(*arguments, *limit)[0].endswith(expected)


def test_steering_characters_never_reach_the_terminal(
    generate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moc_cli.serving.text.decode", lambda *_: "red \x1b[31m")
    out, _ = generate("--prompt", "x", "--num-beams", "2", "--max-new-tokens", "2")
    assert out == "red \\x1b[31m\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt", " "), "the prompt is empty"),
        (("--prompt", "x " * 999), "and the model takes 256"),
        (("--prompt", "x", "--file", "y"), "--prompt and --file are both given"),
        (("--file", "nowhere.txt"), "nowhere.txt cannot be read: No such file or directory"),
        (("--prompt", "x", "--template", "rwa"), "did you mean 'raw'?"),
        (("--prompt", "x", "--template", "chat"), "no chat template"),
        (("--prompt", "x", "--raw", "--template", "chat"), "contradict"),
        (("--prompt", "x", "--system", "y"), "--system has no place"),
        (("--prompt", "x", "--model", "y"), "either a run folder or --model"),
        (("--prompt", "x", "--temperature", "1", "--num-beams", "2"), "cannot be combined"),
    ],
)
def test_mistakes_are_sentences(
    generate: Callable, arguments: tuple[str, ...], message: str
) -> None:
    out, told = generate(*arguments, code=2)
    assert message in told
    assert "Error: " in told
    assert out == ""
    assert message in json.loads(generate(*arguments, "--json", code=2)[0])["error"]


def test_all_long_prompts_are_named_at_once(generate: Callable, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text(f"{'x ' * 999}\nWho?\n{'y ' * 999}\n")
    out, told = generate("--file", str(file), code=2)
    assert ["prompt 1: " in told, "prompt 2: " in told, "prompt 3: " in told] == [True, False, True]
    assert out == ""


def test_a_conversation_on_a_terminal(generate: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["Where is the cup?", "/exit"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    out, _ = generate("--max-new-tokens", "4")
    assert out == generate("--prompt", "Where is the cup?", "--max-new-tokens", "4")[0]
    assert "has no --json" in json.loads(generate("--json", code=2)[0])["error"]


def test_a_bare_model(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    make_tiny_model("llama").save_pretrained(tmp_path)
    make_byte_tokenizer().save_pretrained(tmp_path)
    asked = ["generate", "--model", str(tmp_path), "--prompt", "Say", "--max-new-tokens", "5"]
    assert run([*asked, "--device", "cpu", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["template"] == "raw"
    assert found["tokens"] == 5
    assert run([*asked, "--base"]) == 2


def test_a_classifier_has_no_text(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Said from the recipe alone, before weights are read."""
    make_pair_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "recipe.yaml").write_text(
        f"""
model: {{model_name_or_path: {tmp_path}/model}}
method: moc
data: {{suite: glue, tasks: mrpc}}
output: {{output_dir: {tmp_path}}}
"""
    )
    assert run(["generate", str(tmp_path), "--prompt", "x"]) == 2
    assert "is a classifier (mrpc): it has no text to give" in capfd.readouterr().err
