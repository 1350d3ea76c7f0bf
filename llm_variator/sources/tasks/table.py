"""The task table: what the paper's Table 6 says, what its released code adds, and a prompt form for decoders.

`template` is Table 6 word for word. The released code (thunlp/Compression-Plugin) differs in two ways that
are not followed: line breaks between the parts, which T5's tokenizer reads as blanks, and a full stop after
`<extra_id_0>` in the six classification tasks. The answers per label are the released code's; the paper does
not print them.

`decoder_template` is ours, the paper prints none: one part a line, the possible answers named, and the end
chosen so that a blank and the answer are the natural continuation. SQuAD's question follows its context
there, because a decoder reads the context knowing only what stands before it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from llm_variator.errors import VariatorError

DECODER_START = "<extra_id_0>"
"""What a seq2seq model's decoder is given before the answer, after its own start token."""
DECODER_END = "<extra_id_1>"
"""What the released code lets a generated answer (SQuAD) end with."""

SPLITS = ("train", "validation")


@dataclass(frozen=True)
class TaskSplit:
    """One split of a task's data set."""

    name: str
    """On the hub, and of the local file with the official rows."""
    rows: int
    """Number of official rows."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One task, as data."""

    name: str
    dataset: str = "nyu-mll/glue"
    """Hub id of the data set."""
    config: str | None = None
    """Its configuration on the hub."""
    columns: tuple[str, ...]
    """The columns with input texts: the fields of both templates."""
    target: str = "label"
    """The column with the label, or with SQuAD's struct of gold answers."""
    key: str = "idx"
    """The column that identifies a row."""
    template: str
    """Prompt of a seq2seq model."""
    decoder_template: str
    """Prompt of a decoder; an answer it generates ends with the line."""
    answers: tuple[str, ...] = ()
    """Text of every label, in the order of the labels; empty where the answer is free text."""
    metrics: tuple[str, ...] = ("accuracy",)
    """The figures `score` returns; the first one counts in the average over the tasks."""
    train: TaskSplit
    validation: TaskSplit

    def split(self, name: str) -> TaskSplit:
        """The split "train" or "validation"; raises VariatorError for any other name."""
        if name not in SPLITS:
            raise VariatorError(
                f"task {self.name!r} has no split {name!r}; choose one of {', '.join(SPLITS)}"
            )
        return self.train if name == "train" else self.validation


def find_task(name: str) -> Task:
    """The entry of `TASKS`; raises VariatorError naming the known tasks."""
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower(), TASKS, n=1)
        mend = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(TASKS)}"
        raise VariatorError(f"unknown task {name!r}; {mend}")
    return TASKS[name]


_TABLE = (
    Task(
        name="mnli",
        config="mnli",
        columns=("premise", "hypothesis"),
        template=(
            "Sentence 1: {premise} Sentence 2: {hypothesis} Does sentence 1 entails sentence 2? <extra_id_0>"
        ),
        decoder_template=(
            "Sentence 1: {premise}\n"
            "Sentence 2: {hypothesis}\n"
            "Does sentence 1 entail sentence 2? Yes, Maybe or No?\n"
            "Answer:"
        ),
        answers=("Yes", "Maybe", "No"),
        train=TaskSplit("train", 392_702),
        validation=TaskSplit("validation_matched", 9_815),
    ),
    Task(
        name="qnli",
        config="qnli",
        columns=("question", "sentence"),
        template=(
            "Question: {question} Sentence: {sentence} "
            "Does the sentence contains the answer to the question? <extra_id_0>"
        ),
        decoder_template=(
            "Question: {question}\n"
            "Sentence: {sentence}\n"
            "Does the sentence contain the answer to the question? Yes or No?\n"
            "Answer:"
        ),
        answers=("Yes", "No"),
        train=TaskSplit("train", 104_743),
        validation=TaskSplit("validation", 5_463),
    ),
    Task(
        name="qqp",
        config="qqp",
        columns=("question1", "question2"),
        template=(
            "Question 1: {question1} Question 2: {question2} "
            "Are the two questions paraphrase of each other? <extra_id_0>"
        ),
        decoder_template=(
            "Question 1: {question1}\n"
            "Question 2: {question2}\n"
            "Are the two questions paraphrases of each other? Yes or No?\n"
            "Answer:"
        ),
        answers=("No", "Yes"),
        train=TaskSplit("train", 363_846),
        validation=TaskSplit("validation", 40_430),
    ),
    Task(
        name="rte",
        config="rte",
        columns=("sentence1", "sentence2"),
        template=(
            "Sentence 1: {sentence1} Sentence 2: {sentence2} Does sentence 1 entails sentence 2? <extra_id_0>"
        ),
        decoder_template=(
            "Sentence 1: {sentence1}\n"
            "Sentence 2: {sentence2}\n"
            "Does sentence 1 entail sentence 2? Yes or No?\n"
            "Answer:"
        ),
        answers=("Yes", "No"),
        train=TaskSplit("train", 2_490),
        validation=TaskSplit("validation", 277),
    ),
    Task(
        name="sst2",
        config="sst2",
        columns=("sentence",),
        template=(
            "Sentence: {sentence} Does this sentence express positive or negative emotions? <extra_id_0>"
        ),
        decoder_template=(
            "Sentence: {sentence}\nDoes this sentence express positive or negative emotions?\nAnswer:"
        ),
        answers=("negative", "positive"),
        train=TaskSplit("train", 67_349),
        validation=TaskSplit("validation", 872),
    ),
    Task(
        name="mrpc",
        config="mrpc",
        columns=("sentence1", "sentence2"),
        template=(
            "Sentence 1: {sentence1} Sentence 2: {sentence2} "
            "Are the two sentences paraphrase of each other? <extra_id_0>"
        ),
        decoder_template=(
            "Sentence 1: {sentence1}\n"
            "Sentence 2: {sentence2}\n"
            "Are the two sentences paraphrases of each other? Yes or No?\n"
            "Answer:"
        ),
        answers=("No", "Yes"),
        metrics=("f1", "accuracy"),
        train=TaskSplit("train", 3_668),
        validation=TaskSplit("validation", 408),
    ),
    Task(
        name="squad",
        dataset="rajpurkar/squad",
        columns=("question", "context"),
        target="answers",
        key="id",
        template="Question: {question} Context: {context} Answer: <extra_id_0>",
        decoder_template="Context: {context}\nQuestion: {question}\nAnswer:",
        metrics=("exact_match", "f1"),
        train=TaskSplit("train", 87_599),
        validation=TaskSplit("validation", 10_570),
    ),
)

TASKS: dict[str, Task] = {task.name: task for task in _TABLE}
"""By name, in the order of the paper's Table 6."""
