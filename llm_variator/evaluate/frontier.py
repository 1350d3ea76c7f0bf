"""`python -m llm_variator.evaluate frontier`: quality against cost, for plugins and for what they compete with."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_variator import old_cli as cli
from llm_variator.config import WEIGHTS_FILE
from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.evaluate import alternatives, questions
from llm_variator.evaluate.exchange import ExternalResult, export, read_external
from llm_variator.evaluate.rows import AnswerRow, TextRow, answer_row, text_row
from llm_variator.evaluate.show import markdown, plot, print_tables
from llm_variator.measures.conditions import Condition, Dense, NoContext, WithPlugin, mean_merge
from llm_variator.measures.loading import load_variator
from llm_variator.measures.operations import Stack
from llm_variator.measures.quality import Answers, Continuation, answer, continue_windows, time_reading
from llm_variator.measures.results import scrub_paths, write_result
from llm_variator.measures.store import Store
from llm_variator.model import VariatorModel
from llm_variator.sources.corpora import cut_windows, enough, read_windows, spread, tokenize
from llm_variator.sources.models import load_tokenizer, plugin_folder
from llm_variator.sources.tasks import Example

WORK = Path("runs/frontier")
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
    prompts: list[list[int]]
    bare: list[list[int]]
    stop: frozenset[int]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `evaluate frontier`."""
    add = parser.add_argument
    add("--model", required=True, help="decoder: alias, local folder or hub id")
    add("--plugin", nargs="+", default=[], metavar="[NAME=]PLUGIN", help="shipped names, folders or hub ids")
    add("--untrained", action="store_true", help="also means and copies in place of each plugin's weights")
    add(
        "--also",
        nargs="*",
        default=["drop:2", "late-skip", "mean:2"],
        metavar="WAY",
        help="untrained competitors: drop:K (read every K-th token), late-skip:LAYER (from there on prompt tokens "
        "give keys and values only), mean:K (merge without training)",
    )
    add("--dense-head", type=cli.natural, default=4, help="first prompt tokens that --also leaves alone")
    add("--dense-tail", type=cli.natural, default=64, help="last prompt tokens that --also leaves alone")
    add(
        "--data",
        nargs="*",
        default=["wikitext2/test", questions.ARTICLES],
        metavar="SOURCE",
        help=f"texts, named as in llm_variator.train, or {questions.ARTICLES}: SQuAD's development articles",
    )
    add(
        "--data-dir", type=Path, help="folder of local data sets NAME/SPLIT.parquet (default: $VARIATOR_DATA)"
    )
    add("--context", type=cli.positive_int, nargs="+", default=[512], help="prompt lengths, in tokens")
    add("--continuation", type=cli.positive_int, default=128, help="tokens scored after the prompt")
    add("--generate", type=cli.positive_int, default=32, help="greedy tokens compared with the dense model's")
    add("--windows", type=cli.positive_int, default=16, help="stretches of each text, evenly spread over it")
    add("--batch-size", type=cli.positive_int, default=4, help="windows in one forward pass")
    add("--questions", type=cli.natural, default=50, help="SQuAD questions to answer; 0: none")
    add("--question-form", choices=questions.FORMS, default="text", help="how they are asked")
    add("--shots", type=cli.natural, default=3, help="answered examples before each question")
    add("--repetitions", type=cli.natural, default=5, help="timings of reading a prompt, in turns; 0: none")
    add("--device", default="cpu", help="cpu, cuda, ...")
    add("--dtype", help="of base model and plugins (default: as stored)")
    add("--random-init", action="store_true", help="the model's shape with random weights; no download")
    add("--num-layers", type=cli.positive_int, help="with --random-init: this many layers")
    cli.add_quantize_flag(add)
    add("--seed", type=cli.natural, default=0, help="of random weights (--random-init)")
    add(
        "--work",
        type=Path,
        default=WORK,
        help="what is measured is kept here for the next run; a base changed in place needs --fresh",
    )
    add("--fresh", action="store_true", help="measure all of it again")
    add("--export", type=Path, metavar="FILE", help="write windows and questions for another environment")
    add("--elsewhere", type=Path, nargs="+", default=[], metavar="FILE", help="add what was measured there")
    add("--json", type=Path, metavar="FILE", help="store the figures with command, versions and machine")
    add("--markdown", type=Path, metavar="FILE", help="write the tables")
    add("--plot", type=Path, metavar="FILE", help="draw quality against prefill and KV entries (.png, .svg)")


def run(args: argparse.Namespace, argv: Sequence[str]) -> dict[str, Any]:
    """Measure, print, store; returns the figures."""
    started = time.perf_counter()
    tokenizer = load_tokenizer(args.model, stand_in=args.random_init)
    texts = [_text(args, tokenizer, data, context) for context in args.context for data in args.data]
    quiz = _quiz(args, tokenizer) if args.questions else None
    model = load_variator(args)
    model.decoder_only("frontier", "it measures what follows a prompt")
    conditions = gather(model, args)
    store = Store.of(model, None if args.fresh else args.work, args.work)

    measured = [_measure_text(model, conditions, text, args, store) for text in texts]
    answers = _measure_answers(model, conditions, quiz, store) if quiz else {}
    if args.export:
        export(args.export, model, texts, quiz, measured, args.generate)
    others = [
        one for file in args.elsewhere for one in read_external(file, model, texts, quiz, args.generate)
    ]

    rows = [
        _text_rows(model, conditions, text, found, others, number, args.repetitions)
        for number, (text, found) in enumerate(zip(texts, measured, strict=True))
    ]
    figures: dict[str, Any] = {
        "model": args.model,
        "continuation": args.continuation,
        "generate": args.generate,
        "dense_head": args.dense_head,
        "dense_tail": args.dense_tail,
        "texts": [
            {
                "data": text.data,
                "context": text.context,
                "windows": len(text.windows),
                "rows": [dataclasses.asdict(row) for row in found],
            }
            for text, found in zip(texts, rows, strict=True)
        ],
        "configs": {c.label: c.config.to_dict() for c in conditions if isinstance(c, WithPlugin)},
        "read_from_cache": store.found,
    }
    if quiz:
        origin = quiz.examples[0].origin
        figures["questions"] = {
            "data": f"{origin.name}: {origin.describe(len(quiz.examples))}",
            "form": args.question_form,
            "shots": args.shots,
            "mean_prompt_tokens": sum(map(len, quiz.prompts)) / len(quiz.prompts),
            "rows": [
                dataclasses.asdict(row)
                for row in _answer_rows(model, conditions, quiz, answers, others, tokenizer)
            ],
        }
    print_tables(figures)
    if args.json:
        command = ["llm_variator.evaluate", *argv]
        write_result(args.json, figures, command=command, seed=args.seed, started=started)
    if args.markdown:
        write_atomically(args.markdown, markdown(figures))
    if args.plot:
        plot(args.plot, figures)
    return figures


def gather(model: VariatorModel, args: argparse.Namespace) -> list[Condition]:
    """The conditions that the flags ask for, dense first; plugins are loaded into the model.

    Raises:
        VariatorError: two conditions of one name, or one that does not fit the model.
    """
    conditions: list[Condition] = [Dense(), NoContext()]

    def attach(label: str, digest: str = "") -> None:
        name = f"plugin{len(model.plugins) - 1}"
        conditions.append(WithPlugin(label, name, model.plugins[name], digest))

    for text in args.plugin:
        label, named, source = text.partition("=")
        label = scrub_paths(label)
        folder = plugin_folder(source if named else text)
        loaded = model.load_plugin(folder, f"plugin{len(model.plugins)}")
        attach(label, hashlib.sha256((folder / WEIGHTS_FILE).read_bytes()).hexdigest())
        if args.untrained:
            bare = dataclasses.replace(loaded.config, compressor="mean", decompressor="copy")
            model.add_plugin(f"plugin{len(model.plugins)}", bare)
            attach(f"{label} (untrained)")
    for text in args.also:
        name, _, number = text.partition(":")
        if name == "mean" and (number.isdigit() or not number):
            k = int(number or 2)
            model.add_plugin(f"plugin{len(model.plugins)}", mean_merge(k, args.dense_head, args.dense_tail))
            attach(f"mean:{k}")
        else:
            conditions.append(alternatives.parse(text, model.config, args.dense_head, args.dense_tail))
    labels = [condition.label for condition in conditions]
    if twice := {label for label in labels if labels.count(label) > 1}:
        raise VariatorError(
            f"two conditions are called {', '.join(twice)}: name plugins, as in --plugin a=DIR"
        )
    return conditions


def _text(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase, data: str, context: int) -> Text:
    length = context + args.continuation
    if data == questions.ARTICLES:
        windows = cut_windows(tokenize(questions.read_articles(args.data_dir), tokenizer), length, tokenizer)
    else:
        windows = read_windows(data, tokenizer, seq_length=length, data_dir=args.data_dir)
    return Text(data, context, spread(enough(windows, args.windows, data), args.windows))


def _quiz(args: argparse.Namespace, tokenizer: PreTrainedTokenizerBase) -> Quiz:
    examples = questions.load_questions(args.data_dir, args.questions)
    shots = questions.load_shots(args.data_dir, args.shots) if args.shots else []
    encode = partial(questions.encode_question, tokenizer, form=args.question_form, shots=shots)
    return Quiz(
        examples,
        [encode(example) for example in examples],
        [encode(example, passage=False) for example in examples],
        questions.stop_tokens(tokenizer),
    )


def _measure_text(
    model: VariatorModel, conditions: Sequence[Condition], text: Text, args: argparse.Namespace, store: Store
) -> dict[str, Continuation]:
    found: dict[str, Continuation] = {}
    for condition in conditions:
        dense = found[conditions[0].label].greedy if found else None
        measure = partial(
            continue_windows, model, condition, text.windows, text.context,
            generate=args.generate, batch_size=args.batch_size, dense=dense,
        )  # fmt: skip
        about = {"windows": text.windows.tolist(), "context": text.context, "generate": args.generate}
        what = f"{text.data}, {text.context} tokens: {condition.label}"
        found[condition.label] = _logged(what, store, condition, about, measure, Continuation)
    return found


def _measure_answers(
    model: VariatorModel, conditions: Sequence[Condition], quiz: Quiz, store: Store
) -> dict[str, Answers]:
    found = {}
    for condition in conditions:
        absent = isinstance(condition, NoContext)
        reader, prompts = (Dense(), quiz.bare) if absent else (condition, quiz.prompts)
        measure = partial(answer, model, reader, prompts, tokens=questions.ANSWER_TOKENS, stop=quiz.stop)
        about = {"prompts": prompts, "tokens": questions.ANSWER_TOKENS}
        what = f"{len(prompts)} questions: {condition.label}"
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


def _answer_rows(
    model: VariatorModel,
    conditions: Sequence[Condition],
    quiz: Quiz,
    found: Mapping[str, Answers],
    others: Sequence[ExternalResult],
    tokenizer: PreTrainedTokenizerBase,
) -> list[AnswerRow]:
    everything = dict(found) | {one.label: one.answers for one in others if one.answers is not None}
    decode = partial(questions.decode_answer, tokenizer)
    dense = conditions[0].label
    entries = found[dense].entries
    return [
        answer_row(
            label,
            quiz.examples,
            [decode(tokens) for tokens in one.tokens],
            [decode(tokens) for tokens in found[dense].tokens],
            sum(one.entries) / sum(entries),
        )
        for label, one in everything.items()
    ]
