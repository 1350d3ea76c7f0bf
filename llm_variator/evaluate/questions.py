"""SQuAD for the frontier: its articles as text, and its questions as prompts that a small decoder can answer."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Sequence
from itertools import groupby
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_variator.errors import VariatorError
from llm_variator.measures.quality import Question
from llm_variator.sources.corpora import (
    cut_windows,
    data_folder,
    enough,
    read_documents,
    read_windows,
    spread,
    tokenize,
)
from llm_variator.sources.tasks import Example, load_examples
from llm_variator.sources.tasks.forms import following

ARTICLES = "squad-articles"
"""The name of SQuAD's development articles as a source of text."""
ANSWER_TOKENS = 24

_SHORT_PASSAGE, _SHORT_ANSWER = 450, 30  # characters; what is shown as an example
_SHOTS_POOL = 400  # training questions the examples are taken from


def read_articles(data_dir: Path | None) -> list[str]:
    """SQuAD's development articles: the paragraphs of each joined, every paragraph once.

    Raises:
        VariatorError: the data set is neither in the data folder nor on the hub.
    """
    return ["\n\n".join(paragraphs) for paragraphs in _articles(data_dir)]


def read_text(
    source: str, tokenizer: PreTrainedTokenizerBase, *, seq_length: int, count: int, data_dir: Path | None
) -> Tensor:
    """`count` windows (count, seq_length) that are evenly spread over a text, or over `ARTICLES`."""
    if source == ARTICLES:
        windows = cut_windows(tokenize(read_articles(data_dir), tokenizer), seq_length, tokenizer)
    else:
        windows = read_windows(source, tokenizer, seq_length=seq_length, data_dir=data_dir)
    return spread(enough(windows, count, source), count)


def _articles(data_dir: Path | None) -> list[list[str]]:
    """The paragraphs of each article, every one once."""
    folder = data_folder(data_dir)
    local = folder is not None and (folder / "squad" / "validation.parquet").is_file()
    columns = []
    for column in ("title", "context"):
        source = f"squad/validation:{column}" if local else f"rajpurkar/squad::validation:{column}"
        columns.append(read_documents(source, folder))
    rows = zip(*columns, strict=True)
    return [
        [*dict.fromkeys(text.strip() for _, text in part)]
        for _, part in groupby(rows, key=lambda row: row[0])
    ]


def load_questions(data_dir: Path | None, count: int) -> list[Example]:
    """`count` development questions, drawn at random, always the same ones."""
    return load_examples("squad", "validation", data_dir=data_dir, limit=count)


def load_joined(data_dir: Path | None, count: int, fits: Callable[[Example], bool]) -> list[Example]:
    """`count` development questions on one passage: the first paragraphs of an article, as many as it `fits`.

    The article is the one with the most questions; they are drawn at random, always the same ones.

    Raises:
        VariatorError: the whole article fits, or too few questions are on what does.
    """
    asked: dict[str, list[Example]] = {}
    for example in load_examples("squad", "validation", data_dir=data_dir):
        asked.setdefault(example.inputs["context"], []).append(example)

    paragraphs = max(
        _articles(data_dir), key=lambda article: sum(len(asked.get(text, ())) for text in article)
    )

    def on(number: int, example: Example) -> Example:
        return dataclasses.replace(
            example, inputs={**example.inputs, "context": "\n".join(paragraphs[:number])}
        )

    def questions(number: int) -> list[Example]:
        return [example for text in paragraphs[:number] for example in asked.get(text, ())]

    whole = len(paragraphs)
    longer = (n for n in range(whole) if not fits(on(n + 1, questions(whole)[0])))
    if (number := next(longer, None)) is None:
        raise VariatorError(
            f"the {whole} paragraphs of the article with the most questions do not fill one context: ask for a shorter "
            "--question-context"
        )
    if len(found := questions(number)) < count:
        raise VariatorError(
            f"{number} of the article's {whole} paragraphs fit, with {len(found)} questions on them, {count} are "
            "wanted: ask for a longer --question-context, or fewer --questions"
        )
    places = sorted(random.Random(0).sample(range(len(found)), count))
    return [on(number, found[place]) for place in places]


def load_shots(data_dir: Path | None, count: int) -> list[Example]:
    """`count` short training questions to show as examples."""
    pool = load_examples("squad", "train", data_dir=data_dir, limit=_SHOTS_POOL)
    short = [
        example
        for example in pool
        if len(example.inputs["context"]) < _SHORT_PASSAGE and len(example.answer) < _SHORT_ANSWER
    ]
    if len(short) < count:
        raise VariatorError(f"only {len(short)} short training questions for {count} examples; ask for fewer")
    return short[:count]


def encode_question(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    *,
    form: str,
    shots: Sequence[Example] = (),
    passage: bool = True,
    hidden: bool = False,
) -> Question:
    """The token ids of one question.

    Args:
        tokenizer: the model's.
        example: of the task "squad".
        form: "text" is continued by the answer; "chat" asks an instruction-tuned model.
        shots: questions that are answered before it.
        passage: whether the passage stands before its question (the passages of the shots always do).
        hidden: whether the prompt ends with the passage, before the line break in front of the question.

    Raises:
        VariatorError: the chat form and a tokenizer without a chat template, or with one that writes the answer
            elsewhere than behind its prompt.
    """
    text, answer = _written(tokenizer, example, form=form, shots=shots, passage=passage)
    cut = text.rindex(f"\nQuestion: {example.inputs['question']}") if hidden else len(text)
    return Question(
        list(tokenizer(text[:cut], add_special_tokens=form != "chat", verbose=False)["input_ids"]),
        following(tokenizer, text[:cut], text[cut:]) if hidden else [],
        following(tokenizer, text, answer),
    )


def _written(
    tokenizer: PreTrainedTokenizerBase,
    example: Example,
    *,
    form: str,
    shots: Sequence[Example],
    passage: bool,
) -> tuple[str, str]:
    """Everything before the answer, and the answer with what ends it."""
    if form == "chat":
        if not tokenizer.chat_template:
            raise VariatorError("this model's tokenizer has no chat template: choose another --question-form")
        messages = []
        for shot in shots:
            messages.append({"role": "user", "content": _request(shot, passage=True)})
            messages.append({"role": "assistant", "content": shot.answer})
        messages.append({"role": "user", "content": _request(example, passage=passage)})
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        messages.append({"role": "assistant", "content": example.answer})
        whole = str(tokenizer.apply_chat_template(messages, tokenize=False))
        if not whole.startswith(text):
            raise VariatorError(
                "this model's chat template does not write an answer behind its prompt: choose --question-form text"
            )
        return text, whole[len(text) :].rstrip()
    parts = [shot.decoder_prompt + shot.continuation for shot in shots]
    parts.append(example.decoder_prompt if passage else f"Question: {example.inputs['question']}\nAnswer:")
    return "\n\n".join(parts), f"{example.continuation}\n"


def _request(example: Example, *, passage: bool) -> str:
    question = f"Question: {example.inputs['question']}\nAnswer in a few words."
    return f"Passage: {example.inputs['context']}\n{question}" if passage else question


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens that end an answer: end of text, and every token that breaks the line."""
    ends = {tokenizer.eos_token_id} - {None}
    texts = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return frozenset(ends | {index for index, text in enumerate(texts) if "\n" in text})


def decode_answer(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> str:
    """The first line of an answer."""
    text = str(tokenizer.decode(list(tokens), skip_special_tokens=True))
    return text.strip().partition("\n")[0].strip()
