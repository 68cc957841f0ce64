"""lm-evaluation-harness: only contexts vote, batches and padding decide nothing, its own counts."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import manager
from support.kept_routes import watching
from support.messages import refused
from support.models import VOCABULARY, make_byte_tokenizer, make_tiny_model, train_controls
from support.processes import run_program
from support.questions import MIXED, question
from tokenizers import processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast as Tokenizer

from moc_cli.cli import run
from moc_cli.data.batches import Side
from moc_cli.errors import DataError, MocError
from moc_cli.evaluation.lm_eval_model import MocLM, Stops
from moc_cli.evaluation.lm_eval_tasks import load_tasks
from moc_cli.evaluation.options import EvalOptions
from moc_cli.methods import Adapted, TextModel, attach, bare
from moc_cli.recipe.methods import MocMethod
from moc_cli.results import main_score
from moc_cli.scoring import forward, generate, likelihood
from moc_cli.scoring.likelihood import Query
from moc_cli.scoring.rank import query_of, rank

MARGIN = 1e-3
CLOSE = 3e-4  # float32 sums of log-probabilities, in different orders of the same products
ANSWERS = (" red", " the blue house", " green", " a")
CONTEXTS = [
    f"Item {number}: {'word ' * (number * 7 % 11)}{'x' * (number % 5)}?" for number in range(40)
]


def make_routed(**routing: str) -> Adapted:
    """A model of six sites whose rows take different routes, each changing the outcome."""
    method = MocMethod(rank=4, alpha=0.5, gate={"projection_dim": 8}, routing=routing)
    found = attach(make_tiny_model("llama", num_hidden_layers=3), method, seed=3)
    train_controls(found.named_trainables())
    return found


@pytest.fixture(scope="module")
def routed() -> Adapted:
    torch.set_num_threads(1)
    return make_routed()


def asked(found: Adapted, batch_size: int = 8) -> MocLM:
    return MocLM(TextModel(found, make_byte_tokenizer()), batch_size=batch_size)


def requests(*args: tuple) -> list[SimpleNamespace]:
    return [SimpleNamespace(args=arg) for arg in args]


def score(model: MocLM, tokens: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
    """Score the second tokens of each pair after its first, through what lm_eval asks a subclass
    to define: no text need have such tokens.
    """
    return model._loglikelihood_tokens([(None, *pair) for pair in tokens])


def pairs(contexts: list[str], answers: tuple[str, ...] = ANSWERS) -> list[SimpleNamespace]:
    return requests(*((context, answer) for context in contexts for answer in answers))


def split(model: MocLM, context: str, answer: str) -> tuple[list[int], list[int]]:
    """The tokens of a context and of its answer; blanks at its end belong to the answer."""
    begin = model.tokenizer(context.rstrip())["input_ids"]
    return begin, model.tokenizer(context + answer)["input_ids"][len(begin) :]


def by_full_forward(found: Adapted, context: list[int], answer: list[int]) -> tuple[float, bool]:
    """Score one answer on its whole text, without cache or padding; its context votes."""
    ids = context + answer
    voters = torch.zeros(1, len(ids), dtype=torch.long)
    voters[:, : len(context)] = 1
    with torch.no_grad(), found.voting(voters):
        logits = found.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    log_probs = logits.log_softmax(-1)
    places = range(len(context), len(ids))
    return (
        sum(log_probs[place - 1, ids[place]].item() for place in places),
        all(int(log_probs[place - 1].argmax()) == ids[place] for place in places),
    )


# Likelihoods


@pytest.mark.parametrize("routing", [None, {}, {"decode": "running"}, {"level": "token"}])
def test_likelihoods_are_those_of_plain_forwards(routing: dict | None) -> None:
    """In batches of different lengths; answers of one token and of many."""
    found = bare(make_tiny_model("llama")) if routing is None else make_routed(**routing)
    me = asked(found)
    wanted = pairs(CONTEXTS[:9])
    scores = me.loglikelihood(wanted)
    for request, (total, greedy) in zip(wanted, scores, strict=True):
        expected = by_full_forward(found, *split(me, *request.args))
        assert total == pytest.approx(expected[0], abs=CLOSE)
        assert greedy == expected[1]


def by_step(found: Adapted, ids: list[int], count: int) -> list[int]:
    """The likeliest `count` tokens after a context, by whole forwards in which it votes."""
    more: list[int] = []
    for _ in range(count):
        voters = torch.zeros(1, len(ids) + len(more), dtype=torch.long)
        voters[:, : len(ids)] = 1
        with torch.no_grad(), found.voting(voters):
            logits = found.model(torch.tensor([ids + more]), use_cache=False).logits
        more.append(int(logits[0, -1].argmax()))
    return more


def test_greedy_answers_are_known(routed: Adapted) -> None:
    """Of different lengths in one batch: what pads the shorter is no part of an answer."""
    me = asked(routed)
    greedy, other = [], []
    for place, context in enumerate(CONTEXTS[:6]):
        ids = me.tok_encode(context)
        more = by_step(routed, ids, 1 + place % 3)
        greedy.append((ids, more))
        other.append((ids, [*more[:-1], (more[-1] + 1) % VOCABULARY]))
    assert all(flag for _, flag in score(me, greedy))
    assert not any(flag for _, flag in score(me, other))


def test_likelihoods_equal_those_of_ranking(routed: Adapted, byte_tokenizer: Tokenizer) -> None:
    """The same tokens after the same context."""
    items = [*MIXED, *(question(number) for number in range(13, 20))]
    expected = [
        score
        for item in rank(TextModel(routed, byte_tokenizer), items, batch_size=5)
        for score in item.scores
    ]
    queries = [query_of(byte_tokenizer, item) for item in items]
    tokens = [
        (query.context, query.trunk + branch) for query in queries for branch in query.branches
    ]
    scores = [total for total, _ in score(asked(routed), tokens)]
    assert scores == pytest.approx(expected, abs=CLOSE)


def test_a_bare_model_scores_as_with_lm_evals_own_class() -> None:
    """One request at a time, where its class pads nothing: likelihoods, texts, generations."""
    model, tokenizer = make_tiny_model("llama"), make_byte_tokenizer()
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, device="cpu")
    me = asked(bare(model))
    wanted = pairs([*CONTEXTS[:4], "ends in blanks  ", ""])
    for (total, greedy), other in zip(
        me.loglikelihood(wanted), theirs.loglikelihood(wanted, disable_tqdm=True), strict=True
    ):
        assert total == pytest.approx(other[0], abs=CLOSE)
        assert greedy == other[1]
    texts = requests(*((text,) for text in (*CONTEXTS[:3], "z " * 400)))
    assert me.loglikelihood_rolling(texts) == pytest.approx(
        theirs.loglikelihood_rolling(texts, disable_tqdm=True), abs=0.01
    )
    options = {"until": ["e", "i"], "max_gen_toks": 12, "do_sample": False}
    written = requests(*((context, options) for context in CONTEXTS[:4]))
    assert me.generate_until(written) == theirs.generate_until(written, disable_tqdm=True)


# What may decide nothing


def test_rows_take_at_least_three_routes(routed: Adapted) -> None:
    """Otherwise the laws below would say little."""
    with watching(routed) as seen:
        asked(routed, 64).loglikelihood(pairs(CONTEXTS))
    whole = torch.cat([seen[0][site] for site in sorted(seen[0])], dim=1)
    assert whole.shape == (40, 6)
    assert len(whole.unique(dim=0)) >= 3


@pytest.fixture(scope="module")
def alone(routed: Adapted) -> list[float]:
    """The score of every request on its own."""
    return [asked(routed, 1).loglikelihood([request])[0][0] for request in pairs(CONTEXTS)]


@pytest.mark.parametrize("batch_size", [1, 8, 64])
def test_predictions_depend_on_no_batch(
    routed: Adapted, alone: list[float], batch_size: int
) -> None:
    """Shuffled request by request; near ties are listed and may differ."""
    wanted = pairs(CONTEXTS)
    order = torch.randperm(len(wanted), generator=torch.Generator().manual_seed(1)).tolist()
    shuffled = asked(routed, batch_size).loglikelihood([wanted[place] for place in order])
    together = [0.0] * len(wanted)
    for place, (total, _) in zip(order, shuffled, strict=True):
        together[place] = total
    clear = 0
    for number in range(len(CONTEXTS)):
        one, other = (found[4 * number : 4 * number + 4] for found in (alone, together))
        margin = sorted(one)[-1] - sorted(one)[-2]
        clear += margin > MARGIN
        if one.index(max(one)) != other.index(max(other)):
            print(f"batch {batch_size}: item {number} differs, margin {margin}")
            assert margin <= MARGIN
    assert clear >= 38


def test_every_answer_has_its_contexts_route(routed: Adapted) -> None:
    with watching(routed) as seen:
        asked(routed, 64).loglikelihood(pairs(CONTEXTS))
    contexts, answers = seen
    tokens = [split(asked(routed), CONTEXTS[0], answer) for answer in ANSWERS]
    query = Query.of(tokens[0][0], [continuation for _, continuation in tokens])
    fed = sum(len(branch) > 1 for branch in query.branches)
    assert fed > 2
    for site, ids in contexts.items():
        assert torch.equal(answers[site], ids.repeat_interleave(fed, dim=0))


def test_an_answers_text_changes_no_route(routed: Adapted) -> None:
    found = []
    for answers in (ANSWERS, (" zebra crossing", " zoo", " z", " zzz")):
        with watching(routed) as seen:
            scores = asked(routed, 64).loglikelihood(pairs(CONTEXTS, answers))
        found.append((seen[0], scores))
    assert all(a != b for a, b in zip(found[0][1], found[1][1], strict=True))
    assert all(torch.equal(found[0][0][site], found[1][0][site]) for site in found[0][0])


@pytest.mark.parametrize("routing", [{}, {"decode": "running"}, {"level": "token"}])
def test_masked_tokens_change_nothing(routing: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever stands where there is no token, every score and text is the same."""
    found = make_routed(**routing)
    options = {"until": ["q"], "max_gen_toks": 6, "do_sample": False}
    written = requests(*((context, options) for context in CONTEXTS[:8]))

    def answers() -> tuple[list, list, list]:
        me = asked(found)
        texts = requests(*((text,) for text in CONTEXTS[:8]))
        return (
            me.loglikelihood(pairs(CONTEXTS[:16])),
            me.loglikelihood_rolling(texts),
            me.generate_until(written),
        )

    expected = answers()
    generator = torch.Generator().manual_seed(4)
    filled = 0

    def noisy(pad: Callable) -> Callable:
        def padded(
            rows: list, fill: int, side: Side, device: torch.device
        ) -> tuple[Tensor, Tensor]:
            nonlocal filled
            ids, mask = pad(rows, fill, side, device)
            noise = torch.randint(5, VOCABULARY, ids.shape, generator=generator)
            filled += int((mask == 0).sum())
            return torch.where(mask == 1, ids, noise), mask

        return padded

    monkeypatch.setattr(generate, "pad", noisy(forward.pad))
    monkeypatch.setattr(likelihood, "pad", noisy(forward.pad))
    likelihoods, texts, generated = answers()
    # Of tokens with routes of their own those of equal routes are computed together, padding too.
    close = 1e-5 if routing == {"level": "token"} else 0
    for (total, greedy), other in zip(likelihoods, expected[0], strict=True):
        assert total == pytest.approx(other[0], abs=close, rel=0)
        assert greedy == other[1]
    assert texts == pytest.approx(expected[1], abs=close, rel=0)
    assert generated == expected[2]
    assert filled > 100


# Contexts, texts and stops


def test_contexts_and_answers_are_split_as_lm_eval_does() -> None:
    """Blanks at the end belong to the answer; an empty context is the token that begins a text."""
    me = asked(bare(make_tiny_model("llama")))
    tokenizer = me.tokenizer
    texts = [("a b", " c"), ("a b  ", "c"), ("a ", " the cat")]
    for text, (total, _) in zip(texts, me.loglikelihood(requests(*texts)), strict=True):
        expected, _ = by_full_forward(me.text_model.adapted, *split(me, *text))
        assert total == pytest.approx(expected, abs=CLOSE)
    first = tokenizer.bos_token_id
    begun = make_byte_tokenizer()
    begun.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", first)]
    )
    with_first = MocLM(TextModel(me.text_model.adapted, begun))
    letters = tokenizer("abc")["input_ids"]
    adapted = me.text_model.adapted
    expected, _ = by_full_forward(adapted, [first, letters[0]], letters[1:])
    for total, _ in with_first.loglikelihood(requests(("a", "bc"), ("<s>a", "bc"))):
        assert total == pytest.approx(expected, abs=CLOSE)
    empty = [("", "abc"), ("  ", "abc"), ("", "<s>abc")]
    (total, _), blank, begun_twice = me.loglikelihood(requests(*empty))
    expected, _ = by_full_forward(me.text_model.adapted, [first], tokenizer("abc")["input_ids"])
    assert total == begun_twice[0] == pytest.approx(expected, abs=CLOSE)
    expected, _ = by_full_forward(me.text_model.adapted, [first], tokenizer("  abc")["input_ids"])
    assert blank[0] == pytest.approx(expected, abs=CLOSE)


def test_long_contexts_lose_their_beginning(routed: Adapted) -> None:
    """A model of 512 positions is made one of 12; the last token of an answer needs none."""
    me = asked(routed)
    me.max_length = 12
    context, answer = "The quick brown fox jumps", "abcdefgh"
    ids = me.tokenizer(context + answer)["input_ids"]
    (found,) = me.loglikelihood(requests((context, answer)))
    assert me.cut == 1
    expected, _ = by_full_forward(routed, ids[-8 - 5 : -8], ids[-8:])
    assert found[0] == pytest.approx(expected, abs=CLOSE)
    me.max_length = 512
    with refused(DataError):
        me.loglikelihood(requests(("a", "b" * 513)))
    with refused(DataError):
        score(me, [([5], [])])
    with refused(DataError):
        me.loglikelihood(requests(("", "")))
    with refused(DataError):
        me.generate_until(requests(("a", {"max_gen_toks": 600})))


def test_a_long_text_is_scored_token_by_token_once(routed: Adapted) -> None:
    """In windows of six tokens; what comes before a window's scored tokens votes on its route."""
    me = asked(routed)
    me.max_length = 6
    text = "abcdefghijklmnop"
    ids = me.tok_encode(text)
    first = me.tokenizer.bos_token_id
    windows = [([first], ids[:6]), ([ids[5]], ids[6:12]), (ids[9:12], ids[12:])]
    expected = sum(by_full_forward(routed, before, after)[0] for before, after in windows)
    assert me.loglikelihood_rolling(requests((text,))) == pytest.approx([expected], abs=CLOSE)
    assert me.loglikelihood_rolling(requests(("",), ("ab",)))[0] == 0


def test_texts_end_at_the_first_stop(routed: Adapted) -> None:
    """Each row for itself, wherever the stop's letters are cut into tokens, in any batch."""
    me = asked(routed)
    whole = {"until": [], "max_gen_toks": 20, "do_sample": False}
    texts = me.generate_until(requests(*((context, whole) for context in CONTEXTS[:12])))
    for context, text in zip(CONTEXTS[:5], texts, strict=False):
        ids = me.tok_encode(context)
        expected = me.tokenizer.decode(by_step(routed, ids, 20), skip_special_tokens=True)
        assert text == expected
    letters = [char for text in texts[:6] for char in text[3:] if char.isascii()]
    pair = next(
        text[place : place + 2]
        for text in texts
        for place in range(3, 16)
        if text[place : place + 2].isascii()
    )
    stops = [pair, letters[-1]]
    cut = {"until": stops, "max_gen_toks": 20, "do_sample": False}
    for batch_size in (1, 8, 64):
        found = asked(routed, batch_size).generate_until(
            requests(*((context, cut) for context in CONTEXTS[:12]))
        )
        assert found == [min((text.split(stop)[0] for stop in stops), key=len) for text in texts]
    assert sum(a != b for a, b in zip(found, texts, strict=True)) >= 2


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_ends_the_work(routed: Adapted, length: int) -> None:
    """A row that has met its stop, of one token or several, is not computed to the limit."""
    me = asked(routed)
    whole = {"until": [], "max_gen_toks": 30, "do_sample": False}
    texts = me.generate_until(requests(*((context, whole) for context in CONTEXTS[:8])))
    context, stop = next(
        (context, text[place : place + length])
        for context, text in zip(CONTEXTS, texts, strict=False)
        for place in range(10)
        if text[place : place + length].isascii()
    )
    with watching(routed) as seen:
        me.generate_until(requests((context, whole | {"until": [stop]})))
    assert len(seen) < 25


def test_a_stop_may_be_a_special_token(routed: Adapted) -> None:
    """As the end of a turn is for models whose text ends with another token."""
    me = asked(routed)
    context, token = CONTEXTS[0], me.tokenizer.unk_token or me.tokenizer.bos_token
    stop = me.tokenizer.convert_tokens_to_ids(token)
    ids = torch.tensor([[*me.tok_encode(context), stop], [*me.tok_encode(context), 70]])
    ended = Stops(me.tokenizer, [token], ids.shape[1] - 1)(ids, None)
    assert ended.tolist() == [True, False]


def test_options_are_kept_apart(routed: Adapted) -> None:
    options = [{"until": ["\n"], "max_gen_toks": n, "do_sample": False} for n in (3, 9)]
    mixed = requests(*((CONTEXTS[0], options[place % 2]) for place in range(4)))
    found = asked(routed).generate_until(mixed)
    assert found[0] == found[2] == found[1][: len(found[0])]
    assert len(found[1]) > len(found[0])


# Whole tasks

TASK = """
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}, cache_dir: {folder}/cache}}
test_split: test
metadata: {{version: 2.5}}
"""
WHICH = """
task: own_choice
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: answer
doc_to_choice: choices
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
TEXT = """
task: own_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list:
  - {metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
"""
WRITE = """
task: own_writing
output_type: generate_until
doc_to_text: "{{question}} It is"
doc_to_target: "{{choices[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
GROUP = """
group: own_group
task: [own_choice, own_more]
aggregate_metric_list: [{metric: acc, weight_by_size: true}]
metadata: {version: 1}
"""
ROWS = [
    {
        "question": f"Where is {name}{'!' * (place % 4)}?",
        "choices": ["red", "the blue house", "green"],
        "answer": place % 3,
        "text": f"The {name} is red.",
    }
    for place, name in enumerate(["cup", "Ann", "kite", "cat", "box", "tree", "Bob", "lamp"])
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tasks of our own with their rows beside them."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    source = TASK.format(rows=rows, folder=folder)
    more = WHICH.replace("own_choice", "own_more").replace("Question: ", "")
    for name, text in {"a": WHICH, "b": TEXT, "c": WRITE, "d": more}.items():
        (folder / f"{name}.yaml").write_text(text + source)
    (folder / "group.yaml").write_text(GROUP)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "quick"
    short = ("train.max_steps=2", "eval.before=false", "eval.max_samples=4")
    sets = [word for value in short for word in ("--set", value)]
    torch.set_num_threads(1)
    assert run(["train", "quickstart", "--json", "--output-dir", str(folder), *sets]) == 0
    return folder


@pytest.fixture
def evaluate(
    trained: Path, folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture
) -> Callable[..., tuple[str, str]]:
    """`evaluate(*arguments)`: what `moc eval RUN` with our tasks writes to stdout and stderr."""

    def call(*arguments: str, code: int = 0) -> tuple[str, str]:
        capfd.readouterr()
        asked = ["eval", str(trained), "--device", "cpu", "--output-dir", str(tmp_path / "out")]
        assert run([*asked, "--tasks-path", str(folder), *arguments]) == code
        return capfd.readouterr()

    return call


def test_a_task_is_scored_and_written_down(evaluate: Callable, tmp_path: Path) -> None:
    """Every item is kept, and the score is their mean."""
    out, _ = evaluate("--harness", "own_choice,own_text", "--batch-size", "3", "--json")
    told = json.loads(out)
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert told["tasks"] == saved["tasks"]
    choice, text = saved["tasks"]["own_choice"], saved["tasks"]["own_text"]
    score = main_score(choice)
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").open()]
    items = [line for line in lines if line["task"] == "own_choice"]
    assert [item["row"] for item in items] == list(range(len(ROWS)))
    assert [item["doc"] for item in items] == ROWS
    likeliest = [max(range(3), key=lambda i: item["filtered_resps"][i][0]) for item in items]
    right = [place == row["answer"] for place, row in zip(likeliest, ROWS, strict=True)]
    assert [item["correct"] for item in items] == right
    share = sum(right) / len(right)
    assert score["value"] == pytest.approx(share)
    assert score["stderr"] == pytest.approx(math.sqrt(share * (1 - share) / (len(right) - 1)))
    assert (choice["metric"], score["n"], choice["rows"]) == ("acc", 8, 8)
    assert (choice["version"], choice["num_fewshot"], choice["limited"]) == (2.5, 0, False)
    assert list(choice["metrics"]) == ["acc", "acc_norm"]
    assert choice["batch_size"] == 3
    assert len(choice["task_hash"]) == 64
    assert saved["lm_eval_version"] == told["lm_eval_version"]
    assert saved["protocol"] == "harness"
    letters = sum(len(row["text"].encode()) for row in ROWS)
    total = sum(item["filtered_resps"][0] for item in lines if item["task"] == "own_text")
    assert main_score(text)["value"] == pytest.approx(math.exp(-total / letters))
    assert saved["average"] is None  # of an accuracy and a perplexity


QUIET = """
import sys
from huggingface_hub import constants
constants.HF_HUB_OFFLINE = False
asked = []
wanted = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
sys.addaudithook(lambda event, args: event in wanted and asked.append((event, args)))
from moc_cli.cli import run
code = run(sys.argv[1:])
print("ANSWER", code, asked)
"""


def test_local_tasks_ask_nothing_of_the_network(
    trained: Path, folder: Path, tmp_path: Path
) -> None:
    """Though the hub is not switched off."""
    asked = ["eval", str(trained), "--device", "cpu", "--output-dir", str(tmp_path / "out")]
    asked += ["--harness", "own_choice,own_writing", "--tasks-path", str(folder)]
    online = {"HF_HUB_OFFLINE": "0", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = run_program(QUIET, *asked, env=online)
    assert done.stdout.splitlines()[-1] == "ANSWER 0 []"


def test_a_limit_is_said_and_the_base_stands_beside(
    evaluate: Callable, trained: Path, recipes_read: list[Path]
) -> None:
    out, _ = evaluate("--harness", "own_choice,own_writing", "--limit", "5", "--base")
    assert recipes_read == [trained / "recipe.yaml"]
    flat = " ".join(out.split())
    assert "limited: the first 5 rows of each task" in flat
    model, base = flat.split("base model")
    assert all(name in part for part in (model, base) for name in ("own_choice", "own_writing"))
    told = json.loads(evaluate("--harness", "own_choice", "--limit", "5", "--json")[0])
    assert told["limited"] is True
    assert main_score(told["tasks"]["own_choice"])["n"] == 5


def test_the_base_is_the_model_without_controls(
    trained: Path, folder: Path, evaluate: Callable, tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    entry = json.loads(evaluate("--harness", "own_text", "--base", "--json")[0])["tasks"][
        "own_text"
    ]
    asked = ["eval", "--model", "builtin:world-llama", "--device", "cpu", "--json"]
    asked += ["--harness", "own_text", "--tasks-path", str(folder)]
    assert run([*asked, "--output-dir", str(tmp_path / "bare")]) == 0
    bare = json.loads(capfd.readouterr().out)["tasks"]["own_text"]
    score, alone = main_score(entry), main_score(bare)["value"]
    assert score["base"] == pytest.approx(alone, rel=1e-5)
    assert score["value"] != pytest.approx(alone, rel=1e-5)


def test_a_group_counts_its_tasks_together(evaluate: Callable) -> None:
    told = json.loads(evaluate("--harness", "own_group", "--limit", "6", "--json")[0])
    group, one, two = (told["tasks"][name] for name in ("own_group", "own_choice", "own_more"))
    value, *parts = (main_score(entry)["value"] for entry in (group, one, two))
    assert value == pytest.approx(sum(parts) / 2)
    assert (main_score(group)["n"], group["rows"], group["limited"]) == (12, 16, True)
    assert one["part_of"] == two["part_of"] == "own_group"
    assert told["average"] == value
    out, _ = evaluate("--harness", "own_group", "--limit", "6")
    places = [out.index(name) for name in ("own_group", " - own_choice", " - own_more")]
    assert places == sorted(places)


def test_solved_examples_stand_before_the_question(evaluate: Callable) -> None:
    """They change every prompt, and the same ones are drawn each time."""
    found = [
        json.loads(evaluate("--harness", "own_choice", "--json", *shots)[0])["tasks"]["own_choice"]
        for shots in ((), ("--num-fewshot", "2"), ("--num-fewshot", "2"))
    ]
    assert [entry["num_fewshot"] for entry in found] == [0, 2, 2]
    assert found[0]["task_hash"] != found[1]["task_hash"] == found[2]["task_hash"]


def test_later_tasks_join_the_earlier(evaluate: Callable) -> None:
    evaluate("--harness", "own_choice", "--json")
    told = json.loads(evaluate("--harness", "own_more", "--json")[0])
    assert set(told["tasks"]) == {"own_choice", "own_more"}
    assert told["average"] == pytest.approx(
        sum(main_score(entry)["value"] for entry in told["tasks"].values()) / 2
    )


# Mistakes


def test_lm_evals_own_tasks_are_known_and_their_rows_out_of_reach(
    evaluate: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are named at once, before weights are read; the hub is off in tests.

    lm_eval finds two of its tasks here: to read the files of all takes ten seconds.
    """
    for name in ("arc", "piqa"):
        shutil.copytree(Path(manager.__file__).parent / name, tmp_path / "tasks" / name)
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "tasks" / "manager.py"))
    _, told = evaluate("--harness", "arc_easy,own_choice,piqa", code=2)
    assert "--harness: the rows of 'arc_easy' are out of reach: Couldn't reach" in told
    assert "--harness: the rows of 'piqa' are out of reach: Couldn't reach" in told
    assert "Hint: lm_eval reads them from the hub" in told
    assert "Traceback" not in told


def test_unknown_tasks_are_named_with_the_nearest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    whole = TaskManager.__init__

    def own_only(self: TaskManager, include_path: object = None, **_: object) -> None:
        whole(self, include_path=include_path, include_defaults=False)

    monkeypatch.setattr(TaskManager, "__init__", own_only)
    with refused(DataError):
        load_tasks(EvalOptions(harness=("own_chioce", "own_text", "zzz"), tasks_path=folder))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-fewshot", "2"), "--tasks-path and --num-fewshot go with --harness"),
        (("--harness", " , "), "no task is named"),
        (("--harness", "own_text,own_text"), "a task is named twice"),
        (("--harness", "own_text", "--tasks", "world"), "--tasks: cannot be used with --harness"),
        (
            ("--harness", "own_text", "--protocol", "rank"),
            "--protocol: cannot be used with --harness",
        ),
        (("--harness", "own_text", "--tasks-path", "nowhere"), "no folder nowhere"),
    ],
)
def test_mistakes_are_sentences(
    evaluate: Callable, arguments: tuple[str, ...], message: str
) -> None:
    assert message in evaluate(*arguments, code=2)[1]
    assert message in json.loads(evaluate(*arguments, "--json", code=2)[0])["error"]


def test_a_missing_extra_is_said_with_its_command(
    evaluate: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moc_cli.evaluation.lm_eval_tasks.find_spec", lambda name: None)
    _, told = evaluate("--harness", "own_text", code=2)
    assert told.splitlines() == [
        "Error: --harness needs lm-evaluation-harness, which is not installed",
        "Hint: pip install 'moc-cli[harness]'",
    ]


def test_a_classifier_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "recipe.yaml").write_text(
        "model: {model_name_or_path: nowhere}\nmethod: moc\n"
        f"data: {{suite: glue, tasks: mrpc}}\noutput: {{output_dir: {tmp_path}}}\n"
    )
    assert run(["eval", str(tmp_path), "--harness", "own_text"]) == 2
    assert "is a classifier (mrpc)" in capfd.readouterr().err


def test_outputs_that_are_no_numbers_are_refused() -> None:
    model = make_tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    with refused(MocError):
        asked(bare(model)).loglikelihood(pairs(CONTEXTS[:1]))
