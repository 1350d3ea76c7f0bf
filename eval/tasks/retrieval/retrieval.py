"""Long-context retrieval for lm-eval: generated from a seed and the prose that ships with Python, no download.

Four kinds, each of a given length in tokens of the evaluated model:

    needle             one odd sentence in a long text; give its number
    multi_needle       three of them; give all three numbers
    variable_tracking  assignments along a chain, and a second chain beside it; name all variables of the first
    passages           many passages, each with author and editor; who wrote the one that a given person edited

An answer scores the share of the wanted strings that it holds. The depth of what is asked for runs evenly from
the beginning of the text to its end over the examples.
"""

from __future__ import annotations

import itertools
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from llm_variator.errors import VariatorError
from llm_variator.sources.corpora import EMBEDDED, read_documents
from llm_variator.sources.models import load_tokenizer

EXAMPLES = 16
SHORTEST_PARAGRAPH = 80  # characters
PASSAGE = 600  # characters
PLACES = """
Aarhus Basel Bergen Bilbao Brno Cadiz Derby Eger Faro Ghent Graz Jena Kazan Leiden Linz Lugano Malmo Modena Nantes
Narvik Odense Oulu Parma Pisa Porto Riga Split Tartu Turin Turku Umea Vaasa Varna Vigo Zadar
"""
FIRST_NAMES = (
    "Ada Amir Bela Carla Dario Edda Femi Greta Hugo Ines Jonas Kira Lars Mona Nuno Olga Piet Rosa Selma Timo"
)
LAST_NAMES = """
Abel Brandt Costa Dahl Engel Falk Gomez Holm Ibsen Jansen Klein Lund Moran Nagy Olsen Pohl Quist Rossi Silva Toth
"""


class Item(NamedTuple):
    """What one example says and asks, before it is hidden in text."""

    facts: tuple[str, ...]
    """Sentences, in the order in which they stand in the text."""
    question: str
    cue: str
    """The beginning of the answer, given to the model."""
    answers: tuple[str, ...]
    asked: int = 0
    """The fact whose depth is set by the example's number."""


def documents(
    kind: str,
    tokens: int,
    examples: int = EXAMPLES,
    seed: int = 0,
    tokenizer: str | None = None,
    pretrained: str | None = None,
    **_: Any,
) -> dict[str, Dataset]:
    """The examples of one kind and length, the same for the same seed, tokenizer and version of Python.

    Args:
        kind: one of `KINDS`.
        tokens: most tokens of a prompt; at least four fifths of them are used.
        examples: how many.
        seed: of everything that is drawn.
        tokenizer: name of the model whose tokenizer measures the length.
        pretrained: the same, as lm-eval hands it on from --model_args; `tokenizer` goes before it.

    Raises:
        VariatorError: no such kind, or no tokenizer to measure lengths with.
    """
    if kind not in KINDS:
        raise VariatorError(f"unknown kind {kind!r} of retrieval task; known are {', '.join(KINDS)}")
    name = tokenizer or pretrained
    if not isinstance(name, str):
        raise VariatorError(
            "retrieval tasks measure their length in tokens of the model: name it, with --model_args "
            "pretrained=NAME or --metadata tokenizer=NAME"
        )
    text = Text(load_tokenizer(name))
    rows = []
    for number in range(examples):
        rng = random.Random(f"{seed} {kind} {tokens} {number}")
        rows.append(KINDS[kind](text, rng, tokens, (number + 0.5) / examples))
    return {"test": Dataset.from_list(rows)}


def scores(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Share of the wanted strings that the answer holds."""
    return {"found": sum(answer in results[0] for answer in doc["answers"]) / len(doc["answers"])}


class Text:
    """Paragraphs to hide facts in, and the tokenizer that measures them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        parts = (part for document in read_documents(EMBEDDED) for part in document.split("\n\n"))
        self.paragraphs = [" ".join(part.split()) for part in parts if len(part) >= SHORTEST_PARAGRAPH]
        self.sizes: dict[str, int] = {}

    def size(self, text: str) -> int:
        """Tokens of a paragraph, with the empty line after it."""
        if text not in self.sizes:
            ids = self.tokenizer(f"{text}\n\n", add_special_tokens=False, verbose=False)["input_ids"]
            self.sizes[text] = len(ids) + 1  # a joint between paragraphs may cost one more
        return self.sizes[text]

    def fill(self, rng: random.Random, tokens: int) -> Iterator[str]:
        """Consecutive paragraphs from a random place on, the last one cut, of `tokens` tokens at most."""
        start = rng.randrange(len(self.paragraphs))
        for paragraph in itertools.cycle(self.paragraphs[start:] + self.paragraphs[:start]):
            if not (part := self.cut("", paragraph, tokens)):
                return
            yield part
            if part != paragraph:
                return
            tokens -= self.size(part)

    def cut(self, opening: str, paragraph: str, tokens: int) -> str:
        """A paragraph behind its opening, without as many of its last words as must go; empty if all must."""
        words = paragraph.split(" ")
        while words and self.size(part := f"{opening}{' '.join(words)}") > tokens:
            words = words[: len(words) * 9 // 10]
        return part if words else ""


def _hidden(text: Text, rng: random.Random, tokens: int, depth: float, item: Item) -> dict[str, Any]:
    """A document whose facts stand between paragraphs, the one asked for at `depth` (0 to 1) of the text."""
    opening = "Read the text and answer the question at its end."
    around = (opening, *item.facts, item.question, item.cue)
    paragraphs = list(text.fill(rng, tokens - sum(map(text.size, around))))
    places = [round(depth * len(paragraphs))]
    before = sorted(rng.randint(0, places[0]) for _ in item.facts[: item.asked])
    after = sorted(rng.randint(places[0], len(paragraphs)) for _ in item.facts[item.asked + 1 :])
    for place, fact in reversed(list(zip([*before, *places, *after], item.facts, strict=True))):
        paragraphs.insert(place, fact)
    return _document([opening, *paragraphs, item.question], item.cue, item.answers, depth)


def _document(parts: Sequence[str], cue: str, answers: Sequence[str], depth: float) -> dict[str, Any]:
    return {"prompt": "\n\n".join(parts), "cue": cue, "answers": list(answers), "depth": depth}


def _needles(rng: random.Random, count: int) -> tuple[list[str], list[str], tuple[str, ...]]:
    places = rng.sample(PLACES.split(), count)
    numbers = [str(rng.randint(10_000, 99_999)) for _ in places]
    facts = [
        f"The secret number of {place} is {number}." for place, number in zip(places, numbers, strict=True)
    ]
    return places, numbers, tuple(facts)


def _needle(text: Text, rng: random.Random, tokens: int, depth: float) -> dict[str, Any]:
    (place,), numbers, facts = _needles(rng, 1)
    item = Item(
        facts,
        f"Question: What is the secret number of {place}?",
        f"The secret number of {place} is",
        tuple(numbers),
    )
    return _hidden(text, rng, tokens, depth, item)


def _multi_needle(text: Text, rng: random.Random, tokens: int, depth: float) -> dict[str, Any]:
    places, numbers, facts = _needles(rng, 3)
    names = f"{places[0]}, {places[1]} and {places[2]}"
    item = Item(
        facts,
        f"Question: What are the secret numbers of {names}?",
        f"The secret numbers of {names} are",
        tuple(numbers),
        asked=1,
    )
    return _hidden(text, rng, tokens, depth, item)


def _variable_tracking(text: Text, rng: random.Random, tokens: int, depth: float) -> dict[str, Any]:
    names: list[str] = []
    while len(names) < 6:
        name = "".join(rng.choices(string.ascii_uppercase, k=4))
        if name not in names:
            names.append(name)
    chain, other = names[:3], names[3:]
    value, wrong = rng.sample(range(10_000, 100_000), 2)
    facts = []
    for place in range(3):
        for variables, number in ((chain, value), (other, wrong)):
            source = str(number) if place == 0 else f"VAR {variables[place - 1]}"
            facts.append(f"VAR {variables[place]} = {source}.")
    item = Item(
        tuple(facts),
        f"Question: Which three variables have the value {value}, directly or through another variable?",
        f"The variables with the value {value} are",
        tuple(chain),
        asked=2,
    )
    return _hidden(text, rng, tokens, depth, item)


def _passages(text: Text, rng: random.Random, tokens: int, depth: float) -> dict[str, Any]:
    people = [f"{first} {last}" for first in FIRST_NAMES.split() for last in LAST_NAMES.split()]
    rng.shuffle(people)
    opening = "Read the passages and answer the question at their end."
    question, cue = (
        "Question: Who wrote the passage that {} edited?",
        "The passage that {} edited was written by",
    )
    longest = max(people, key=len)
    left = tokens - sum(map(text.size, (opening, question.format(longest), cue.format(longest))))
    passages: list[tuple[str, str]] = []  # with author and editor
    parts = [opening]
    start = rng.randrange(len(text.paragraphs))
    paragraphs = itertools.cycle(text.paragraphs[start:] + text.paragraphs[:start])
    for number, paragraph in zip(range(1, len(people) // 2 + 1), paragraphs, strict=False):
        author, editor = people[2 * number - 2], people[2 * number - 1]
        opening = f"Passage {number}, written by {author} and edited by {editor}. "
        if not (passage := text.cut(opening, paragraph[:PASSAGE], left)):
            break
        left -= text.size(passage)
        parts.append(passage)
        passages.append((author, editor))
        if not passage.endswith(paragraph[:PASSAGE]):
            break
    author, editor = passages[int(depth * len(passages))]
    return _document([*parts, question.format(editor)], cue.format(editor), [author], depth)


KINDS: dict[str, Callable[[Text, random.Random, int, float], dict[str, Any]]] = {
    "needle": _needle,
    "multi_needle": _multi_needle,
    "variable_tracking": _variable_tracking,
    "passages": _passages,
}
