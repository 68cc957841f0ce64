"""A small invented world: its facts, a text to pre-train on, and questions to fine-tune on.

Every fact is stated in the pre-training text, but only some are also *asked* there. The task asks
about the others, so that it can be answered only by someone who has read the text and has learnt,
from fine-tuning, to answer in the form of the task. The four parts share no fact:

    asked        questions in the pre-training text, without options
    train        the task's training rows
    validation   rows to choose settings on
    test         rows that nothing is chosen on

Objects are dealt evenly and at random, so no answer follows from another fact or from how often a
word occurs. Everything is a pure function of a seed; only `random.Random` is used.
"""

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace

from .words import RELATIONS, Relation

SEED = 2606
SPLITS = ("train", "validation", "test")
OPTIONS = 4
# Facts of each relation in each part, and how often each question about a fact is put with newly
# drawn options. 60 facts a relation; a large test part keeps the bounds of its accuracy tight.
PARTS = {"asked": 20, "train": 16, "validation": 6, "test": 18}
REPEATS = {"train": 4, "validation": 1, "test": 1}

# Shares of the kinds of pre-training documents; the remainder are profiles of one subject.
NEWS_SHARE, QUIZ_SHARE, REQUEST_SHARE = 0.35, 0.20, 0.20
HEADER = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request."
)
INDENT = " " * 16


@dataclass(frozen=True)
class Fact:
    """`object` stands in `relation` to `subject`, as in (home, Anna, harbor)."""

    relation: Relation
    subject: str
    object: str

    def statements(self) -> list[str]:
        """Every sentence that states this fact."""
        return [line.format(s=self.subject, o=self.object) for line in self.relation.statements]

    def questions(self) -> list[str]:
        """Every question that this fact answers."""
        return [line.format(s=self.subject) for line in self.relation.questions]


def make_parts(seed: int = SEED) -> dict[str, list[Fact]]:
    """Deal objects to subjects and split the facts, relation by relation, into the four parts."""
    rng = random.Random(f"{seed} facts")
    parts: dict[str, list[Fact]] = {name: [] for name in PARTS}
    for relation in RELATIONS:
        copies = len(relation.subjects) // len(relation.objects)
        objects = list(relation.objects) * copies
        rng.shuffle(objects)
        facts = [Fact(relation, s, o) for s, o in zip(relation.subjects, objects, strict=True)]
        rng.shuffle(facts)
        start = 0
        for name, count in PARTS.items():
            parts[name] += facts[start : start + count]
            start += count
    return parts


def make_rows(split: str, seed: int = SEED) -> list[dict[str, object]]:
    """Build the task's rows of one split; the right option is equally often in each place."""
    rng = random.Random(f"{seed} rows {split}")
    asked = [
        (fact, question)
        for fact in make_parts(seed)[split]
        for question in fact.questions()
        for _ in range(REPEATS[split])
    ]
    places = [index % OPTIONS for index in range(len(asked))]
    rng.shuffle(places)
    rows = [
        _row(fact, question, place, rng)
        for (fact, question), place in zip(asked, places, strict=True)
    ]
    rng.shuffle(rows)
    return rows


def _row(fact: Fact, question: str, place: int, rng: random.Random) -> dict[str, object]:
    others = [word for word in fact.relation.objects if word != fact.object]
    options = rng.sample(others, OPTIONS - 1)
    options.insert(place, fact.object)
    return {
        "instruction": f"Please choose the correct answer to the question: {question}\n\n"
        f"Options: {', '.join(options)}",
        "input": "",
        "output": f"the correct answer is {fact.object}",
        "answer": fact.object,
        "candidates": options,
    }


def rows_text(rows: list[dict[str, object]]) -> str:
    """Write rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def documents(seed: int = SEED) -> Iterator[str]:
    """Yield the pre-training text without end, one document at a time.

    News are sentences on any facts, a profile is what there is to say about one subject, a quiz is
    questions with their answers, a request is a question, an order or a claim to check in the frame
    of instruction data. The last two take facts from the part `asked` only, and no document ever
    offers options to choose from or answers in the words of the task.
    """
    parts = make_parts(seed)
    everything = [fact for part in parts.values() for fact in part]
    subjects: dict[str, list[Fact]] = {}
    for fact in everything:
        subjects.setdefault(fact.subject, []).append(fact)
    names = sorted(subjects)
    rng = random.Random(f"{seed} documents")
    while True:
        kind = rng.random()
        if kind < NEWS_SHARE:
            yield _telling(rng.sample(everything, 6), rng)
        elif kind < NEWS_SHARE + QUIZ_SHARE:
            yield "\n".join(_quiz(fact, rng) for fact in rng.sample(parts["asked"], 4))
        elif kind < NEWS_SHARE + QUIZ_SHARE + REQUEST_SHARE:
            yield _request(rng.choice(parts["asked"]), parts["asked"], rng)
        else:
            chosen = subjects[rng.choice(names)]
            yield _telling(rng.sample(chosen, len(chosen)), rng)


def _telling(facts: list[Fact], rng: random.Random) -> str:
    return " ".join(rng.choice(fact.statements()) for fact in facts)


def _quiz(fact: Fact, rng: random.Random) -> str:
    return f"Question: {rng.choice(fact.questions())} Answer: {fact.object}"


def _request(fact: Fact, others: list[Fact], rng: random.Random) -> str:
    question, statement = rng.choice(fact.questions()), rng.choice(fact.statements())
    kind = rng.randrange(3)
    if kind == 0:
        asked, told = f"Please answer the question: {question}", f"the answer: {statement}"
    elif kind == 1:
        name = fact.subject if fact.subject[0].isupper() else f"the {fact.subject}"
        asked, told = f"Please choose a sentence about {name}.", statement
    else:
        same = [other for other in others if other.relation is fact.relation]
        claim = replace(fact, object=rng.choice((fact, rng.choice(same))).object)
        verdict = "correct" if claim == fact else "not correct"
        asked, told = rng.choice(claim.statements()), f"the sentence is {verdict}"
        asked = f"Please say whether this sentence is correct: {asked}"
    gap = rng.choice((" ", "  "))
    return (
        f"{HEADER}{gap}\n\n{INDENT}### Instruction:\n{INDENT}{asked}\n\n"
        f"{INDENT}### Response:\n{INDENT}{told}"
    )
