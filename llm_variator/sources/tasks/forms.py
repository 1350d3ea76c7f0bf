"""The form in which each kind of model reads a task: batches to train on, and predictions.

A sequence-to-sequence model (T5) reads the paper's template and answers after `<extra_id_0>`; a decoder
continues its own prompt, which alone is compressed; a classifier (BERT) reads the bare inputs. An input too
long for the model loses its end, never the template around it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from llm_variator.errors import VariatorError
from llm_variator.sources.tasks.examples import Example
from llm_variator.sources.tasks.scoring import label_from_log_likelihoods
from llm_variator.sources.tasks.table import DECODER_END, DECODER_START, Task

IGNORED = -100  # a label that no loss counts
ANSWER_TOKENS = 32  # longest free-text answer that is generated

Batch = dict[str, Tensor]


class TaskForm(Protocol):
    """How one model reads one task."""

    def collate(self, examples: Sequence[Example]) -> Batch:
        """A padded batch with the right answers as `labels`: what the model's forward takes."""
        ...

    def predict(self, model: Any, examples: Sequence[Example]) -> list[int] | list[str]:
        """A label per example, or a text where the task has no labels; one forward pass or `generate`."""
        ...


def form_for(
    model: PreTrainedModel, task: Task, tokenizer: PreTrainedTokenizerBase, *, max_length: int = 512
) -> TaskForm:
    """The form in which a model reads a task.

    Args:
        model: a T5, a decoder, or a BERT with a classification head.
        task: an entry of `TASKS`.
        tokenizer: the model's.
        max_length: most prompt tokens; longer inputs are cut.

    Raises:
        VariatorError: the tokenizer lacks T5's sentinels, the model has neither a head for the task nor generates,
            or a classifier is to give free text.
    """
    if model.config.is_encoder_decoder:
        return Seq2SeqForm(task, tokenizer, max_length, start=model.config.decoder_start_token_id)
    if type(model).__name__.endswith("ForSequenceClassification"):
        if task.answers and model.config.num_labels != len(task.answers):
            raise VariatorError(
                f"{type(model).__name__} has {model.config.num_labels} labels, {task.name} {len(task.answers)}: "
                f"fine-tune it first, by --stage finetune --task {task.name}"
            )
        return ClassifierForm(task, tokenizer, max_length)
    if not model.can_generate():
        raise VariatorError(
            f"{type(model).__name__} has no head for {task.name}: fine-tune it first, by --stage finetune "
            f"--task {task.name}"
        )
    return DecoderForm(task, tokenizer, max_length)


def predict_all(
    form: TaskForm,
    model: nn.Module,
    examples: Sequence[Example],
    *,
    batch_size: int,
    progress: Callable[[Iterator[Any]], Iterator[Any]] = iter,
) -> list[int] | list[str]:
    """Predictions in the order of the examples, made in batches of similar length, in evaluation mode.

    `progress` may wrap the iterator over batches, as `tqdm` does.
    """
    order = sorted(range(len(examples)), key=lambda i: examples[i].size)
    found: dict[int, Any] = {}
    with _evaluating(model), torch.no_grad():
        for start in progress(iter(range(0, len(order), batch_size))):
            part = order[start : start + batch_size]
            found.update(zip(part, form.predict(model, [examples[i] for i in part]), strict=True))
    return [found[i] for i in range(len(examples))]


@dataclasses.dataclass(frozen=True)
class Seq2SeqForm:
    """T5: the decoder starts with `<extra_id_0>`; a free-text answer ends with `<extra_id_1>`."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int
    start: int
    """The decoder's start token."""

    def __post_init__(self) -> None:
        for sentinel in (DECODER_START, DECODER_END):
            if sentinel not in self.tokenizer.get_vocab():
                raise VariatorError(f"the tokenizer has no {sentinel!r}: the task forms need T5's tokenizer")

    def encode(self, examples: Sequence[Example]) -> BatchEncoding:
        """The encoder's input: `input_ids` and `attention_mask`, (rows, tokens)."""
        texts = [fitted(example, self._length, self.max_length).prompt for example in examples]
        return self.tokenizer(texts, padding=True, return_tensors="pt")

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Encoder and decoder input; the decoder reads `start <extra_id_0>` and the answer but its last token."""
        answers = self._answers([example.answer for example in examples])
        return {**self.encode(examples), **answers}

    def predict(self, model: Any, examples: Sequence[Example]) -> list[int] | list[str]:
        """The likeliest answer of the task, or the generated text."""
        device = _device(model)
        inputs = self.encode(examples).to(device)
        if not self.task.answers:
            start = torch.tensor([[self.start, self._id(DECODER_START)]], device=device)
            rows = model.generate(
                **inputs,
                decoder_input_ids=start.expand(len(examples), -1),
                max_new_tokens=ANSWER_TOKENS,
                eos_token_id=[self._id(DECODER_END), self.tokenizer.eos_token_id],
                num_beams=1,
                do_sample=False,
            )
            return self.tokenizer.batch_decode(rows, skip_special_tokens=True)
        answers = self.tokenizer(list(self.task.answers), add_special_tokens=False)["input_ids"]

        def logits_after(prefix: Sequence[int]) -> Tensor:
            read = torch.tensor([[self.start, self._id(DECODER_START), *prefix]], device=device)
            output = model(**inputs, decoder_input_ids=read.expand(len(examples), -1), use_cache=False)
            return output.logits[:, 1:]

        return _likeliest(self.task, answers, logits_after)

    def _answers(self, answers: Sequence[str]) -> Batch:
        rows = self.tokenizer(list(answers), add_special_tokens=False)["input_ids"]
        # nothing is generated after a label, so nothing is learned there
        ends = [] if self.task.answers else [self._id(DECODER_END)]
        targets = [[self._id(DECODER_START), *row, *ends] for row in rows]
        return {
            "decoder_input_ids": _padded([[self.start, *target[:-1]] for target in targets], 0),
            "decoder_attention_mask": _padded([[1] * len(target) for target in targets], 0),
            "labels": _padded([[IGNORED, *target[1:]] for target in targets], IGNORED),
        }

    def _id(self, token: str) -> int:
        ids: Any = self.tokenizer.convert_tokens_to_ids([token])
        return int(ids[0])

    def _length(self, example: Example) -> int:
        return len(self.tokenizer(example.prompt)["input_ids"])


@dataclasses.dataclass(frozen=True)
class DecoderForm:
    """LLaMA-type: the answer follows the prompt and ends with its line. Only the prompt is compressed."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def collate(self, examples: Sequence[Example]) -> Batch:
        """Prompt and answer in one row, padded on the right; `prompt_length` (rows,) is the prompt's."""
        prompts = self._prompts(examples)
        answers = [self._answer(f"{example.continuation}\n") for example in examples]
        pairs = list(zip(prompts, answers, strict=True))
        return {
            "input_ids": _padded([prompt + answer for prompt, answer in pairs], self._pad),
            "attention_mask": _padded([[1] * len(prompt + answer) for prompt, answer in pairs], 0),
            "labels": _padded([[IGNORED] * len(prompt) + answer for prompt, answer in pairs], IGNORED),
            "prompt_length": torch.tensor([len(prompt) for prompt in prompts]),
        }

    def predict(self, model: Any, examples: Sequence[Example]) -> list[int] | list[str]:
        """The likeliest answer of the task, or the first line of the generated text."""
        device = _device(model)
        prompts = self._prompts(examples)
        if self.task.answers:
            answers = [self._answer(f" {text}") for text in self.task.answers]
            return _likeliest(self.task, answers, lambda prefix: self._logits_after(model, prompts, prefix))
        width = max(map(len, prompts))
        rows = [[self._pad] * (width - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        output = model.generate(
            input_ids=torch.tensor(rows, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=ANSWER_TOKENS,
            stop_strings=["\n"],
            tokenizer=self.tokenizer,
            pad_token_id=self._pad,
            do_sample=False,
        )
        texts = self.tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
        return [text.partition("\n")[0].strip() for text in texts]

    def _logits_after(self, model: Any, prompts: Sequence[list[int]], prefix: Sequence[int]) -> Tensor:
        """Logits (rows, 1 + prefix, vocabulary) of what follows each prompt and each token of the prefix."""
        rows = [[*prompt, *prefix] for prompt in prompts]
        inputs = {
            "input_ids": _padded(rows, self._pad),
            "attention_mask": _padded([[1] * len(row) for row in rows], 0),
        }
        if takes_prompt_length(model):
            inputs["prompt_length"] = torch.tensor([len(prompt) for prompt in prompts])
        inputs = {name: value.to(_device(model)) for name, value in inputs.items()}
        width = inputs["input_ids"].shape[1]
        first = min(map(len, prompts)) - 1  # the first column that any row is scored at
        logits = model(**inputs, logits_to_keep=width - first, use_cache=False).logits
        starts = [len(prompt) - 1 - first for prompt in prompts]
        return torch.stack(
            [row[start : start + 1 + len(prefix)] for row, start in zip(logits, starts, strict=True)]
        )

    def _answer(self, text: str) -> list[int]:
        end = self.task.decoder_template.rpartition("\n")[2]  # with which every prompt ends
        return following(self.tokenizer, end, text)

    def _prompts(self, examples: Sequence[Example]) -> list[list[int]]:
        texts = [fitted(example, self._length, self.max_length).decoder_prompt for example in examples]
        rows: list[list[int]] = self.tokenizer(texts)["input_ids"]
        return rows

    def _length(self, example: Example) -> int:
        return len(self.tokenizer(example.decoder_prompt)["input_ids"])

    @property
    def _pad(self) -> int:
        return int(self.tokenizer.pad_token_id or 0)


@dataclasses.dataclass(frozen=True)
class ClassifierForm:
    """BERT with a classification head: one or two inputs, a label out."""

    task: Task
    tokenizer: PreTrainedTokenizerBase
    max_length: int

    def __post_init__(self) -> None:
        if not self.task.answers:
            raise VariatorError(
                f"task {self.task.name!r} asks for a text, which a classifier cannot give: choose a task with labels"
            )

    def collate(self, examples: Sequence[Example]) -> Batch:
        """The inputs of each row as the tokenizer pairs them."""
        labels = torch.tensor([example.label for example in examples])
        return {**self._encode(examples), "labels": labels}

    def predict(self, model: Any, examples: Sequence[Example]) -> list[int]:
        """The likeliest label."""
        logits = model(**self._encode(examples).to(_device(model))).logits
        return list(map(int, logits.argmax(-1).tolist()))

    def _encode(self, examples: Sequence[Example]) -> BatchEncoding:
        columns = [[example.inputs[name] for example in examples] for name in self.task.columns]
        return self.tokenizer(
            *columns, padding=True, truncation=True, max_length=self.max_length, return_tensors="pt"
        )


def fitted(example: Example, length: Callable[[Example], int], limit: int) -> Example:
    """The example with its inputs cut at the end, to a length that the longest have in common, until it fits.

    Raises:
        VariatorError: the prompt is longer than `limit` even with all inputs empty.
    """
    if length(example) <= limit:
        return example

    def cut(size: int) -> Example:
        inputs = {name: text[:size] for name, text in example.inputs.items()}
        return dataclasses.replace(example, inputs=inputs)

    kept, least = max(map(len, example.inputs.values())), 0  # the most characters that fit, by bisection
    if length(cut(0)) > limit:
        raise VariatorError(
            f"task {example.task.name!r}: its prompt does not fit in {limit} tokens; raise --max-length"
        )
    while kept - least > 1:
        middle = (kept + least) // 2
        least, kept = (middle, kept) if length(cut(middle)) <= limit else (least, middle)
    return cut(least)


def following(tokenizer: PreTrainedTokenizerBase, before: str, text: str) -> list[int]:
    """The tokens of `text` as they are behind `before`.

    LLaMA's tokenizer begins every text by a space: " Yes" alone is another one than behind "Answer:". Where the two are
    joined in a token, `text` has those that it has alone.
    """
    first, whole = (
        tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"]
        for part in (before, before + text)
    )
    if whole[: len(first)] == first:
        return list(whole[len(first) :])
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def takes_prompt_length(model: Any) -> bool:
    """Whether the model compresses prompts, and so wants to know their length."""
    return hasattr(model, "use_plugin")


def _likeliest(
    task: Task, answers: Sequence[list[int]], logits_after: Callable[[Sequence[int]], Tensor]
) -> list[int]:
    """The label of each row whose answer's tokens have the highest summed log-probability.

    `logits_after(prefix)` gives the logits (rows, 1 + prefix, vocabulary) before and after each token of the
    prefix. Answers that differ in their last token only share one call; most answers are one token.
    """
    known: dict[tuple[int, ...], Tensor] = {}
    scores = []
    for answer in answers:
        prefix = tuple(answer[:-1])
        if prefix not in known:
            known[prefix] = F.log_softmax(logits_after(prefix).float(), dim=-1)
        steps = torch.arange(len(answer), device=known[prefix].device)
        scores.append(known[prefix][:, steps, answer].sum(-1))
    return [label_from_log_likelihoods(task, row) for row in torch.stack(scores, dim=1).tolist()]


def _padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
