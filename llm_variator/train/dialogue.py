"""`python -m llm_variator.train.dialogue`: what a model writes by itself, as text to train on.

Conversations: a chat model is given where a user's turn begins and writes that turn, then the answer, and so on (Xu et
al. 2024, "Magpie"): what a plugin meets in chats, in the model's own words, from a seed and without data. Or, with
`--after`, what any model writes after given texts and questions: a plugin that is to answer as the model does has to
predict just that. It can be stopped at any moment: called again, it goes on with the next batch.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from llm_variator import cli
from llm_variator.cli import REQUIRED, flag, flags
from llm_variator.cli.values import NaturalFloat, OutputFile, PositiveInt, Share
from llm_variator.engine.files import write_atomically
from llm_variator.errors import VariatorError
from llm_variator.sources.corpora import TASK, read_windows, spread
from llm_variator.sources.models import load_model, load_tokenizer
from llm_variator.sources.tasks import load_examples

_MARK = "MARKOFATURN"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(flags.LocalData, flags.BaseModel):
    """Have a chat model write conversations, or any model go on with texts, each a line of JSON with a "text"."""

    output: OutputFile = flag(REQUIRED, "a .jsonl file, which is text for --data", metavar="FILE")
    after: tuple[str, ...] = flag(
        (),
        "instead of conversations, what the model writes after texts of these, as many of each: sources as in "
        "llm_variator.train; of task:TASK examples with answers and one without",
        metavar="SOURCE",
    )
    count: PositiveInt = flag(160, "texts")
    tokens: PositiveInt = flag(640, "tokens in each; the last turn is cut there")
    turn_tokens: PositiveInt = flag(160, "most tokens in a turn; with --after, those that the model writes")
    temperature: NaturalFloat = flag(1.0, "of the sampling; 0: always the likeliest token")
    top_p: Share = flag(0.95, "sample among the likeliest tokens that have this share together")
    batch_size: PositiveInt = flag(16, "texts written at once")


@dataclasses.dataclass(frozen=True)
class Frame:
    """What stands around the turns of a conversation, as token ids."""

    opening: list[int]
    """Before the first user's turn."""
    answering: list[int]
    """Between a user's turn and its answer."""
    asking: list[int]
    """Between an answer and the next user's turn."""


def frame_of(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """What the chat template writes around turns.

    Raises:
        VariatorError: there is no chat template, or it changes what it is given.
    """
    if not tokenizer.chat_template:
        raise VariatorError(
            "this model's tokenizer has no chat template: choose a model that was tuned for chats"
        )
    turns = [{"role": role, "content": _MARK} for role in ("user", "assistant", "user")]
    parts = str(tokenizer.apply_chat_template(turns, tokenize=False)).split(_MARK)
    if len(parts) != 4 or not all(parts[:3]):
        raise VariatorError(
            "this model's chat template does not write every turn as it is: choose another model"
        )
    frame = Frame(*(list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts[:3]))
    if not {frame.answering[0], frame.asking[0]} <= set(tokenizer.all_special_ids):
        raise VariatorError(
            "this model's chat template does not end turns with a special token, so nothing says where one ends: "
            "choose another model"
        )
    return frame


def read(argv: Sequence[str] | None = None) -> Settings:
    """The settings that a command line, with its recipe, gives."""
    return cli.read(Settings, argv, prog="python -m llm_variator.train.dialogue")


def main(argv: Sequence[str] | None = None) -> None:
    """Write the conversations; raises VariatorError for wrong input."""
    settings = read(argv)
    if settings.output.suffix != ".jsonl":
        raise VariatorError(
            f"--output {settings.output}: conversations are lines of JSON, name it FILE.jsonl"
        )
    if settings.output.exists():
        raise VariatorError(f"--output {settings.output} is there already: choose another, or delete it")
    tokenizer = load_tokenizer(settings.model, stand_in=settings.random_init)
    frame = None if settings.after else frame_of(tokenizer)
    given = openings(tokenizer, settings)
    model = load_model(settings.model, **settings.loading(), device=settings.device).eval()
    partial = settings.output.with_suffix(".part")
    record = json.dumps({**vars(settings), "output": None, "data_dir": None, "device": None}, sort_keys=True)
    lines = _done(partial, record)
    with tqdm(desc="writing", total=settings.count, initial=len(lines), unit=" texts") as bar:
        while len(lines) < settings.count:
            torch.manual_seed(settings.seed * 1_000_003 + len(lines))
            size = min(settings.batch_size, settings.count - len(lines))
            if frame:
                rows = write(model, tokenizer, frame, size, settings)
            else:
                rows = go_on(model, given[len(lines) : len(lines) + size], settings)
            lines += [json.dumps({"text": tokenizer.decode(row)}, ensure_ascii=False) for row in rows]
            write_atomically(partial, "\n".join([record, *lines]) + "\n")
            bar.update(len(rows))
    write_atomically(settings.output, "\n".join(lines) + "\n")
    partial.unlink()
    print(f"{settings.count} texts in {settings.output}")


def _done(partial: Path, record: str) -> list[str]:
    """The lines of an earlier run with the same settings."""
    if not partial.exists():
        return []
    first, *lines = partial.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    if first != record:
        raise VariatorError(
            f"{partial} is of a run with other settings: delete it, or choose another --output"
        )
    return lines


@torch.inference_mode()
def write(
    model: Any, tokenizer: PreTrainedTokenizerBase, frame: Frame, count: int, settings: Settings
) -> list[list[int]]:
    """`count` conversations as token ids, each of `settings.tokens`."""
    rows = [list(frame.opening) for _ in range(count)]
    answers = False
    while min(map(len, rows)) < settings.tokens:
        for row, turn in zip(rows, _turns(model, tokenizer, frame, rows, settings), strict=True):
            row += turn + (frame.asking if answers else frame.answering)
        answers = not answers
    return [row[: settings.tokens] for row in rows]


def _turns(
    model: Any, tokenizer: PreTrainedTokenizerBase, frame: Frame, rows: list[list[int]], settings: Settings
) -> list[list[int]]:
    """The next turn of every conversation."""
    width = max(map(len, rows))
    ends = {frame.answering[0], frame.asking[0], tokenizer.eos_token_id} - {None}
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends)
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    options = {"min_new_tokens": 1, "eos_token_id": sorted(ends), "pad_token_id": padding}
    out = model.generate(input_ids=ids, attention_mask=mask, **_sampling(settings), **options)
    turns = []
    for row in out[:, width:].tolist():
        end = next((place for place, token in enumerate(row) if token in ends), len(row))
        turns.append(row[:end])
    return turns


def openings(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> list[list[int]]:
    """What `--after` names as token ids, `count` beginnings in random order, each as long as leaves room to go on.

    Raises:
        VariatorError: there is no room, or a source cannot be read or is too short.
    """
    tokens = settings.tokens - settings.turn_tokens
    if settings.after and tokens < 1:
        raise VariatorError(
            f"--turn-tokens {settings.turn_tokens} leaves nothing to go on with: give more --tokens"
        )
    draw = random.Random(settings.seed)
    found: list[list[int]] = []
    for source in settings.after:
        share = -(-settings.count // len(settings.after))
        if source.startswith(TASK):
            found += _questions(source.removeprefix(TASK), tokenizer, tokens, share, draw, settings.data_dir)
            continue
        windows = spread(
            read_windows(source, tokenizer, seq_length=tokens, data_dir=settings.data_dir), share
        )
        if len(windows) < share:
            raise VariatorError(
                f"{source} has {len(windows)} texts of {tokens} tokens, {share} are wanted: lower --count or --tokens"
            )
        found += windows.tolist()
    draw.shuffle(found)
    return found[: settings.count]


def _questions(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    tokens: int,
    count: int,
    draw: random.Random,
    data_dir: Path | None,
) -> list[list[int]]:
    """`count` times the last `tokens` of a prompt that ends where the answer follows; the same examples never twice."""
    examples = load_examples(task, "train", data_dir=data_dir)
    draw.shuffle(examples)
    found: list[list[int]] = []
    texts: list[str] = []
    for example in examples:
        texts.append(example.decoder_prompt)
        ids = list(tokenizer("\n\n".join(texts))["input_ids"])
        if len(ids) >= tokens:
            found.append(ids[-tokens:])
            texts = []
            if len(found) == count:
                return found
        else:
            texts[-1] += example.continuation
    raise VariatorError(
        f"task:{task} has examples for {len(found)} prompts of {tokens} tokens, {count} are wanted: lower --count or "
        "--tokens"
    )


@torch.inference_mode()
def go_on(model: Any, rows: list[list[int]], settings: Settings) -> list[list[int]]:
    """The rows, which are of one length, with `settings.turn_tokens` more."""
    ids = torch.tensor(rows, device=model.device)
    out: Tensor = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        **_sampling(settings),
        min_new_tokens=settings.turn_tokens,
    )
    return out.tolist()


def _sampling(settings: Settings) -> dict[str, Any]:
    """Arguments of `generate`."""
    if not settings.temperature:
        return {"do_sample": False, "max_new_tokens": settings.turn_tokens}
    return {
        "do_sample": True,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "top_k": 0,
        "max_new_tokens": settings.turn_tokens,
    }


if __name__ == "__main__":
    cli.run(main)
