"""Text for training and evaluation: from the name of a source to windows of tokens. Knows no model.

A source is one string:

    pydoc-topics                            the default, English prose that ships with Python
    path/to/file.parquet[:column]           a .parquet, .jsonl or .txt file, or a folder of such files
    name[/split][:column]                   `<data dir>/<name>/<split>.parquet`, split `train` by default
    name[:config][:split][:column]          a dataset of the Hub; leave a part empty to skip it

In training also

    task:NAME                               a task's training examples, each with its answer
    end:SOURCE                              of every document the end, by itself: one window, which ends where it does

`SOURCE=WEIGHT` draws a source that many times in each pass over the data.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from llm_variator.errors import VariatorError
from llm_variator.extras import needed
from llm_variator.sources.models import hub_reachable, local_path
from llm_variator.sources.text import without_surrogates

EMBEDDED = "pydoc-topics"
TASK, END = "task:", "end:"
DATA_DIR_VARIABLE = "VARIATOR_DATA"
SUFFIXES = (".parquet", ".jsonl", ".txt")

# Line-wise text (WikiText, plain text files) has no document borders: it is cut, where possible at an empty
# line, into documents of about this many characters, so that whole stretches of text can be held out.
CHARACTERS_PER_PART = 20_000
PASSAGE = (16, 48)  # tokens of a repeated passage
_DOCUMENTS_PER_CALL = 512  # of the tokenizer; bounds the memory its lists of Python numbers take


class Source(NamedTuple):
    """One corpus and how many times it is drawn in each pass over the data."""

    name: str
    weight: float


def parse_sources(values: Sequence[str]) -> list[Source]:
    """`["wiki_prose,wikitext2/train=0.5"]` -> two sources; raises VariatorError for a weight of 0 or less."""
    sources = []
    for value in (part.strip() for item in values for part in item.split(",") if part.strip()):
        name, _, number = value.rpartition("=")
        try:
            weight = float(number) if name else 1.0
        except ValueError:  # an equals sign inside a path
            name, weight = value, 1.0
        if not 0 < weight < math.inf:
            raise VariatorError(f"data {value!r}: the weight must be a number above 0, as in {name}=0.5")
        sources.append(Source(name or value, weight))
    return sources or [Source(EMBEDDED, 1.0)]


def read_documents(source: str, data_dir: Path | None = None) -> list[str]:
    """The documents of a source, never empty; every document has some text.

    Args:
        source: see the top of this file.
        data_dir: folder of named local copies; default: the environment variable VARIATOR_DATA.

    Raises:
        VariatorError: the source is not found, not readable, has no such column or no text.
    """
    data_dir = data_folder(data_dir)
    files, column = ([], None) if source == EMBEDDED else _find_local(source, data_dir)
    if source == EMBEDDED:
        documents = _embedded()
    elif files:
        documents = [document for file in files for document in _read_file(file, column)]
    else:
        documents = _as_documents(_read_hub(source, data_dir))
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise VariatorError(f"data {source!r} holds no text; check the file and the column")
    return documents


def data_folder(data_dir: Path | None) -> Path | None:
    """The folder of local data sets: `data_dir`, else that of the environment variable VARIATOR_DATA, else None.

    Raises:
        VariatorError: it does not exist.
    """
    if data_dir is None and os.environ.get(DATA_DIR_VARIABLE):
        data_dir = Path(os.environ[DATA_DIR_VARIABLE])
    if data_dir is not None and not local_path(data_dir).is_dir():
        raise VariatorError(
            f"data folder {data_dir} does not exist; correct --data-dir or {DATA_DIR_VARIABLE}"
        )
    return data_dir


def library(name: str) -> Any:
    """A library that reads data; raises VariatorError where it is not installed."""
    return needed(name, "reading data", "train")


def read_windows(
    source: str, tokenizer: PreTrainedTokenizerBase, *, seq_length: int, data_dir: Path | None = None
) -> Tensor:
    """All windows of a source, in order: int32 (windows, seq_length); raises VariatorError for none."""
    documents = tokenize(read_documents(source, data_dir), tokenizer)
    windows = cut_windows(documents, seq_length, tokenizer)
    if not len(windows):
        raise VariatorError(
            f"data {source!r} has {sum(map(len, documents))} tokens, fewer than one window of "
            f"{seq_length}: give more text or shorter windows"
        )
    return windows


def tokenize(documents: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """One int32 tensor of token ids per document, without special tokens."""
    encoded: list[Tensor] = []
    for start in range(0, len(documents), _DOCUMENTS_PER_CALL):
        batch = list(documents[start : start + _DOCUMENTS_PER_CALL])
        output = tokenizer(batch, add_special_tokens=False, return_attention_mask=False, verbose=False)
        encoded.extend(torch.tensor(row, dtype=torch.int32) for row in output["input_ids"])
    return encoded


def cut_windows(documents: Sequence[Tensor], seq_length: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Join documents with the end-of-text token and cut: int32 (windows, seq_length), without the ragged end.

    Every window opens with the beginning-of-text token where the tokenizer puts one before a text.
    """
    opening = _opening(tokenizer)
    separator = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    end = torch.tensor(separator, dtype=torch.int32)
    stream = torch.cat([part for document in documents for part in (document, end)] or [end])
    body = seq_length - len(opening)
    rows = len(stream) // body
    windows = stream[: rows * body].view(rows, body)
    return torch.cat((torch.tensor([opening], dtype=torch.int32).expand(rows, len(opening)), windows), dim=1)


def end_windows(documents: Sequence[Tensor], seq_length: int, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The last tokens of every document that is long enough: int32 (windows, seq_length), opened as above."""
    opening = torch.tensor(_opening(tokenizer), dtype=torch.int32)
    body = seq_length - len(opening)
    found = [torch.cat((opening, ids[-body:])) for ids in documents if len(ids) >= body]
    return torch.stack(found) if found else torch.empty(0, seq_length, dtype=torch.int32)


def _opening(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    empty = list(tokenizer("")["input_ids"])
    return empty[:1] if empty[:1] == [tokenizer.bos_token_id] else []


def enough(windows: Tensor, count: int, source: str) -> Tensor:
    """`windows` of `source`; raises VariatorError where they are fewer than the `count` that --windows asks for."""
    if count > len(windows):
        raise VariatorError(
            f"--windows {count}: {source} holds only {len(windows)} windows of {windows.shape[1]} tokens"
        )
    return windows


def spread(windows: Tensor, count: int) -> Tensor:
    """`count` rows of `windows`, evenly spread; all rows where there are fewer."""
    if len(windows) <= count:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, count).long()]


def repeat_passages(window: Tensor, prompt_tokens: int, draw: np.random.Generator) -> Tensor:
    """A copy of `window` (tokens,) with passages of its prompt in place of what follows it.

    Each passage is 16 to 48 tokens long, where the prompt is. To go on with one a model has to find it again, word
    for word, which little plain text asks for.
    """
    parts, missing = [window[:prompt_tokens]], len(window) - prompt_tokens
    while missing > 0:
        length = min(int(draw.integers(*PASSAGE, endpoint=True)), prompt_tokens, missing)
        start = int(draw.integers(prompt_tokens - length, endpoint=True))
        parts.append(window[start : start + length])
        missing -= length
    return torch.cat(parts)


def _embedded() -> list[str]:
    from pydoc_data.topics import topics

    return list(topics.values())


def _find_local(source: str, data_dir: Path | None) -> tuple[list[Path], str | None]:
    """The files of a local source, none where nothing local has this name, and the column asked for."""
    name, _, column = source.partition(":")
    places = [local_path(name)]
    if data_dir is not None and not name.startswith(
        (".", "/", "~")
    ):  # NAME goes before a folder called so here
        places = [data_dir / f"{name}.parquet", data_dir / name / "train.parquet", *places]
    for place in places:
        if place.is_file():
            if place.suffix not in SUFFIXES:
                raise VariatorError(
                    f"data {source!r}: cannot read {place.suffix or 'a file without suffix'}; "
                    f"give a {', '.join(SUFFIXES)} file"
                )
            return [place], column or None
        if place.is_dir():
            files = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES)
            if not files:
                raise VariatorError(f"data {source!r}: the folder holds no {', '.join(SUFFIXES)} file")
            return files, column or None
    return [], None


def _read_file(file: Path, column: str | None) -> list[str]:
    """The documents of one file."""
    try:
        match file.suffix:
            case ".parquet":
                return _as_documents(_read_parquet(file, column))
            case ".jsonl":
                return _as_documents(list(_read_jsonl(file, column)))
            case _:
                return list(_join_lines(file.read_text(encoding="utf-8-sig").splitlines(keepends=True)))
    except UnicodeDecodeError as error:
        raise VariatorError(f"{file}: not UTF-8 text ({error}); convert it") from None
    except OSError as error:
        raise VariatorError(f"{file}: cannot be read ({error.strerror})") from None


def _read_parquet(file: Path, column: str | None) -> list[str]:
    pyarrow, parquet = library("pyarrow"), library("pyarrow.parquet")
    try:
        column = _text_column(str(file), _text_columns(parquet.read_schema(file)), column)
        rows = parquet.read_table(file, columns=[column]).column(column).to_pylist()
    except pyarrow.ArrowException as error:
        raise VariatorError(f"{file}: not a readable Parquet file ({error})") from None
    return [row for row in rows if row is not None]


def _text_columns(schema: Any) -> list[str]:
    """The columns of an Arrow schema that hold strings in any of their forms, as pandas and polars write them."""
    types = library("pyarrow.types")
    found = []
    for field in schema:
        kind = field.type.value_type if types.is_dictionary(field.type) else field.type
        if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
            found.append(field.name)
    return found


def _read_jsonl(file: Path, column: str | None) -> Iterator[str]:
    """The texts of a file of JSON lines; a null in the place of a text is left out, as in Parquet."""
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                if isinstance(record, str):
                    yield without_surrogates(record)
                    continue
                strings = [key for key, value in record.items() if isinstance(value, str)]
                nulls = [key for key, value in record.items() if value is None]
            except (ValueError, AttributeError, RecursionError):
                raise VariatorError(
                    f"{file}, line {number}: expected a JSON object or a JSON string"
                ) from None
            if (column or "text") in nulls or (column is None and nulls and not strings):
                continue
            column = _text_column(f"{file}, line {number}", strings, column)
            yield without_surrogates(record[column])


def _text_column(where: str, strings: Sequence[str], wanted: str | None) -> str:
    """The column with the text: the one asked for, else `text`, else the only one of type string."""
    if wanted is None:
        wanted = "text" if "text" in strings or len(strings) != 1 else strings[0]
    if wanted not in strings:
        raise VariatorError(
            f"{where}: no text column {wanted!r}; name one of [{', '.join(strings)}] as SOURCE:COLUMN"
        )
    return wanted


def _read_hub(source: str, data_dir: Path | None) -> list[str]:
    datasets = library("datasets")
    name, config, split, column, *surplus = [*source.split(":"), "", "", ""]
    if any(surplus):
        raise VariatorError(f"data {source!r}: too many parts; write name:config:split:column")
    if not HF_HUB_OFFLINE and not hub_reachable():
        raise _not_found(source, data_dir, "it does not answer; HF_HUB_OFFLINE=1 reads what is cached")
    try:
        rows = datasets.load_dataset(name, config or None, split=split or "train")
    except Exception as error:  # no network, no such name, gated, wrong split: each has its own kind
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _not_found(source, data_dir, reason) from None
    column = _text_column(f"data {source!r}", _text_columns(rows.features.arrow_schema), column or None)
    return [row for row in rows[column] if row is not None]


def _not_found(source: str, data_dir: Path | None, reason: str) -> VariatorError:
    local = f"nothing of that name in {data_dir}" if data_dir else "no --data-dir given to look in"
    return VariatorError(
        f"data {source!r}: no such file or folder, {local}, and not to be had from the Hugging Face Hub "
        f"({reason}); give a local file, or leave --data out for the embedded corpus"
    )


def _as_documents(rows: list[str]) -> list[str]:
    """Rows that are documents as they are; rows that are lines of a longer text joined into documents."""
    are_lines = all(row.find("\n") == len(row) - 1 for row in rows if row)
    return list(_join_lines(rows)) if are_lines else rows


def _join_lines(lines: Iterable[str]) -> Iterator[str]:
    part: list[str] = []
    size = 0
    for line in lines:
        part.append(line or "\n")
        size += len(line)
        if size >= 2 * CHARACTERS_PER_PART or (size >= CHARACTERS_PER_PART and not line.strip()):
            yield "".join(part)
            part, size = [], 0
    yield "".join(part)
