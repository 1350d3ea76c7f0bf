"""`python -m llm_variator.evaluate frontier`: quality against cost, for plugins and for what they compete with."""

from __future__ import annotations

import dataclasses
import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_variator.cli import REQUIRED, flag, flags
from llm_variator.cli.values import Natural, OutputFile, OutputPlot, PositiveInt
from llm_variator.config import WEIGHTS_FILE, VariatorConfig
from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.evaluate import alternatives, questions
from llm_variator.evaluate.exchange import ExternalResult, export, read_external
from llm_variator.evaluate.rows import TextRow, answer_row, pair_rows, text_row
from llm_variator.evaluate.show import markdown, plot, print_tables
from llm_variator.measures.conditions import Condition, Dense, NoContext, WithPlugin, mean_merge
from llm_variator.measures.loading import load_variator
from llm_variator.measures.operations import Stack
from llm_variator.measures.quality import (
    Answers,
    Continuation,
    Question,
    answer,
    continue_windows,
    time_reading,
)
from llm_variator.measures.results import scrub_paths, write_result
from llm_variator.measures.store import Store
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_tokenizer, plugin_folder
from llm_variator.sources.tasks import Example

WORK = Path("runs/frontier")
_SHORT_PROMPT = 512
_log = Console(stderr=True, highlight=False)


@dataclasses.dataclass(frozen=True)
class Text:
    """One set of windows, and how much of each is prompt."""

    data: str
    context: int
    windows: Tensor
    """(rows, tokens)."""


@dataclasses.dataclass(frozen=True)
class Quiz:
    """Questions as token ids, with their passages and without."""

    examples: list[Example]
    asked: dict[str, list[Question]]
    """By the place of the question: "seen" in the prompt, or "hidden" from whoever reads the prompt."""
    bare: list[Question]
    """Without passages."""
    stop: frozenset[int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(flags.Stored, flags.LocalData, flags.BaseModel):
    """Quality against cost: plugins beside dropped tokens, skipped layers and untrained merging.

    The text after a prompt and answers to questions, with the prompt dense, absent, compressed by plugins, and made
    cheaper in ways that need no training.
    """

    model: str = flag(REQUIRED, "decoder: alias, local folder or hub id")
    plugin: tuple[str, ...] = flag((), "shipped names, folders or hub ids", metavar="[NAME=]PLUGIN")
    untrained: bool = flag(False, "also means and copies in place of each plugin's weights")
    also: tuple[str, ...] = flag(
        ("drop:2", "late-skip", "mean:2"),
        "untrained competitors; no word: none; drop:K (read every K-th token), late-skip:LAYER (from there on "
        "prompt tokens give keys and values only), mean:K (merge without training)",
        metavar="WAY",
        may_be_empty=True,
    )
    dense_head: Natural = flag(4, "first prompt tokens that --also leaves alone")
    dense_tail: Natural = flag(64, "last prompt tokens that --also leaves alone")
    data: tuple[str, ...] = flag(
        ("wikitext2/test", questions.ARTICLES),
        f"texts, named as in llm_variator.train, or {questions.ARTICLES}: SQuAD's development articles; no word: none",
        metavar="SOURCE",
        may_be_empty=True,
    )
    context: tuple[PositiveInt, ...] = flag((512,), "prompt lengths, in tokens")
    continuation: PositiveInt = flag(128, "tokens scored after the prompt")
    generate: PositiveInt = flag(32, "greedy tokens compared with the dense model's")
    windows: PositiveInt = flag(16, "stretches of each text, evenly spread over it")
    batch_size: PositiveInt = flag(
        4,
        "windows of at most 512 prompt tokens in one forward pass; fewer of longer ones, to the same memory",
    )
    questions: Natural = flag(50, "SQuAD questions to answer; 0: none")
    question_form: Literal["text", "chat"] = flag("text", "how they are asked")
    question_place: tuple[Literal["seen", "hidden"], ...] = flag(
        ("seen", "hidden"),
        "seen: the prompt ends with the question; hidden: the question comes after the prompt",
    )
    question_context: PositiveInt | None = flag(
        None,
        "ask all of them on one passage: as many paragraphs of one article as make prompts of so many tokens "
        "(default: each on its own paragraph)",
    )
    shots: Natural = flag(3, "answered examples before each question")
    repetitions: Natural = flag(5, "timings of reading a prompt, in turns; 0: none")
    work: Path = flag(
        WORK, "what is measured is kept here for the next run; a base changed in place needs --fresh"
    )
    fresh: bool = flag(False, "measure all of it again")
    export: OutputFile | None = flag(
        None, "write windows and questions for another environment", metavar="FILE"
    )
    elsewhere: tuple[Path, ...] = flag((), "add what was measured there", metavar="FILE")
    markdown: OutputFile | None = flag(None, "write the tables", metavar="FILE")
    plot: OutputPlot | None = flag(
        None, "draw quality against prefill and KV bytes (.png, .svg)", metavar="FILE"
    )

    def __post_init__(self) -> None:
        if self.plot and not self.data:
            raise VariatorError("--plot draws a row for each text: give --data")
        if not self.data and not self.questions:
            raise VariatorError("nothing to measure: give --data, --questions, or both")


def run(settings: Settings, argv: Sequence[str]) -> dict[str, Any]:
    """Measure, print, store; returns the figures."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    texts = [
        _text(settings, tokenizer, data, context) for context in settings.context for data in settings.data
    ]
    quiz = _quiz(settings, tokenizer) if settings.questions else None
    model = load_variator(settings)
    model.decoder_only("frontier", "it measures what follows a prompt")
    conditions = gather(model, settings)
    store = Store.of(model, None if settings.fresh else settings.work, settings.work)

    others = [
        one
        for file in settings.elsewhere
        for one in read_external(file, model, texts, quiz, settings.generate)
    ]
    measured = [_measure_text(model, conditions, text, settings, store) for text in texts]
    if settings.export:
        export(settings.export, model, texts, quiz, measured, settings.generate)
    answers = (
        {place: _measure_answers(model, conditions, place, quiz, store) for place in quiz.asked}
        if quiz
        else {}
    )

    rows = [
        _text_rows(model, conditions, text, found, others, number, settings.repetitions)
        for number, (text, found) in enumerate(zip(texts, measured, strict=True))
    ]
    figures: dict[str, Any] = {
        "model": settings.model,
        "continuation": settings.continuation,
        "generate": settings.generate,
        "dense_head": settings.dense_head,
        "dense_tail": settings.dense_tail,
        "texts": [
            {
                "data": text.data,
                "context": text.context,
                "windows": len(text.windows),
                "rows": [dataclasses.asdict(row) for row in found],
                "pairs": _pairs(conditions, whole, {one.label: one.texts[number] for one in others}),
            }
            for number, (text, found, whole) in enumerate(zip(texts, rows, measured, strict=True))
        ],
        "configs": {c.label: c.config.to_dict() for c in conditions if isinstance(c, WithPlugin)},
        "read_from_cache": store.found,
    }
    for place, found in answers.items():
        assert quiz is not None
        origin, asked = quiz.examples[0].origin, quiz.asked[place]
        theirs = {one.label: one.answers[place] for one in others if place in one.answers}
        figures["questions" if place == "seen" else "hidden_questions"] = {
            "data": f"{origin.name}: {origin.describe(len(quiz.examples))}"
            + ", on one passage" * (settings.question_context is not None),
            "form": settings.question_form,
            "shots": settings.shots,
            "mean_prompt_tokens": statistics.fmean(len(question.prompt) for question in asked),
            "mean_answer_tokens": statistics.fmean(len(question.gold) for question in asked),
            "rows": _answer_rows(quiz.examples, found | theirs, found[conditions[0].label], tokenizer),
            "pairs": _pairs(conditions, found, theirs),
        }
    print_tables(figures)
    if settings.json:
        command = ["llm_variator.evaluate", *argv]
        write_result(settings.json, figures, command=command, seed=settings.seed, started=started)
    if settings.markdown:
        write_atomically(settings.markdown, markdown(figures))
    if settings.plot:
        plot(settings.plot, figures)
    return figures


def gather(model: VariatorModel, settings: Settings) -> list[Condition]:
    """The conditions that the flags ask for, dense first; plugins are loaded into the model.

    Raises:
        VariatorError: two conditions of one name, or one that does not fit the model.
    """
    conditions: list[Condition] = [Dense(), NoContext()]

    def attach(label: str, digest: str = "") -> None:
        name = f"plugin{len(model.plugins) - 1}"
        conditions.append(WithPlugin(label, name, model.plugins[name], digest))

    for text in settings.plugin:
        label, named, source = text.partition("=")
        label = scrub_paths(label)
        folder = plugin_folder(source if named else text)
        loaded = model.load_plugin(folder, f"plugin{len(model.plugins)}")
        attach(label, hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest())
        if settings.untrained:
            model.add_plugin(f"plugin{len(model.plugins)}", _bare(loaded.config))
            attach(f"{label} (untrained)")
    for text in settings.also:
        name, _, number = text.partition(":")
        if name == "mean" and (number.isdecimal() or not number):
            k = int(number or 2)
            model.add_plugin(
                f"plugin{len(model.plugins)}", mean_merge(k, settings.dense_head, settings.dense_tail)
            )
            attach(f"mean:{k}")
        else:
            conditions.append(
                alternatives.parse(text, model.config, settings.dense_head, settings.dense_tail)
            )
    labels = [condition.label for condition in conditions]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise VariatorError(
            f"two conditions are called {', '.join(twice)}: name plugins, as in --plugin a=DIR"
        )
    return conditions


def _bare(config: VariatorConfig) -> VariatorConfig:
    """The same without anything learned: means, copies, and the first tokens of every block."""
    compressor: str | dict[str, str] = "mean"
    if config.selects:
        compressor = {site: "select" if site == "kv" else "mean" for site in config.sites}
    return dataclasses.replace(config, compressor=compressor, decompressor="copy")


def _text(settings: Settings, tokenizer: PreTrainedTokenizerBase, data: str, context: int) -> Text:
    windows = questions.read_text(
        data,
        tokenizer,
        seq_length=context + settings.continuation,
        count=settings.windows,
        data_dir=settings.data_dir,
    )
    return Text(data, context, windows)


def _quiz(settings: Settings, tokenizer: PreTrainedTokenizerBase) -> Quiz:
    shots = questions.load_shots(settings.data_dir, settings.shots) if settings.shots else []
    encode = partial(questions.encode_question, tokenizer, form=settings.question_form, shots=shots)
    most = settings.question_context
    if most is None:
        examples = questions.load_questions(settings.data_dir, settings.questions)
    else:
        examples = questions.load_joined(
            settings.data_dir,
            settings.questions,
            lambda example: len(encode(example, hidden=True).prompt) <= most,
        )
    return Quiz(
        examples,
        {
            place: [encode(example, hidden=place == "hidden") for example in examples]
            for place in settings.question_place
        },
        [encode(example, passage=False) for example in examples],
        questions.stop_tokens(tokenizer),
    )


def _measure_text(
    model: VariatorModel, conditions: Sequence[Condition], text: Text, settings: Settings, store: Store
) -> dict[str, Continuation]:
    found: dict[str, Continuation] = {}
    for condition in conditions:
        dense = found[conditions[0].label].greedy if found else None
        measure = partial(
            continue_windows, model, condition, text.windows, text.context,
            generate=settings.generate, batch_size=rows_at_once(settings.batch_size, text.context), dense=dense,
        )  # fmt: skip
        about = {"windows": text.windows.tolist(), "context": text.context, "generate": settings.generate}
        what = f"{text.data}, {text.context} tokens: {condition.label}"
        found[condition.label] = _logged(what, store, condition, about, measure, Continuation)
    return found


def rows_at_once(batch_size: int, context: int) -> int:
    """Windows in one forward pass: `batch_size` as long as prompts have at most 512 tokens, then fewer."""
    return max(1, min(batch_size, batch_size * _SHORT_PROMPT // context))


def _measure_answers(
    model: VariatorModel,
    conditions: Sequence[Condition],
    place: str,
    quiz: Quiz,
    store: Store,
) -> dict[str, Answers]:
    found = {}
    for condition in conditions:
        absent = isinstance(condition, NoContext)
        reader, asking = (Dense(), quiz.bare) if absent else (condition, quiz.asked[place])
        measure = partial(answer, model, reader, asking, tokens=questions.ANSWER_TOKENS, stop=quiz.stop)
        about = {"asked": [dataclasses.asdict(one) for one in asking], "tokens": questions.ANSWER_TOKENS}
        what = f"{len(asking)} questions, {place}: {condition.label}"
        found[condition.label] = _logged(what, store, condition, about, measure, Answers)
    return found


def _logged(
    what: str,
    store: Store,
    condition: Condition,
    about: Mapping[str, Any],
    measure: Callable[[], Any],
    kind: type,
) -> Any:
    started, before = time.perf_counter(), store.found
    result = store.get(condition, about, measure, kind)
    taken = "kept from before" if store.found > before else f"{time.perf_counter() - started:.0f} s"
    _log.print(f"{what}: {taken}", style="dim")
    return result


def _text_rows(
    model: VariatorModel,
    conditions: Sequence[Condition],
    text: Text,
    found: Mapping[str, Continuation],
    others: Sequence[ExternalResult],
    number: int,
    repetitions: int,
) -> list[TextRow]:
    stack, n = Stack.of(model.config), text.context
    seconds = time_reading(model, conditions, text.windows[:1, :n], repetitions) if repetitions else {}
    costs = {condition.label: condition.cost(stack, n) for condition in conditions}
    dense = conditions[0].label
    rows = [
        text_row(
            label,
            found[label],
            found[dense],
            costs[label],
            costs[dense],
            seconds.get(label),
            seconds.get(dense),
        )
        for label in costs
    ]
    # the presses read the prompt densely, then drop entries
    rows += [
        text_row(one.label, one.texts[number], found[dense], costs[dense], costs[dense]) for one in others
    ]
    return rows


def _pairs(
    conditions: Sequence[Condition],
    found: Mapping[str, Continuation] | Mapping[str, Answers],
    theirs: Mapping[str, Continuation] | Mapping[str, Answers],
) -> list[dict[str, Any]]:
    """The plugins beside what was measured elsewhere."""
    plugins = {one.label: found[one.label] for one in conditions if isinstance(one, WithPlugin)}
    return [dataclasses.asdict(row) for row in pair_rows(plugins, theirs, found[conditions[0].label])]


def _answer_rows(
    examples: Sequence[Example],
    found: Mapping[str, Answers],
    dense: Answers,
    tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:
    decode = partial(questions.decode_answer, tokenizer)
    return [
        dataclasses.asdict(answer_row(label, examples, one, dense, decode)) for label, one in found.items()
    ]
