"""The paper's seven tasks: prompts, answers, data and metrics. Knows no model and no tokenizer."""

from llm_variator.sources.tasks.examples import Example, Origin, load_examples
from llm_variator.sources.tasks.scoring import (
    average,
    exact_match,
    label_from_log_likelihoods,
    label_from_text,
    score,
    token_f1,
)
from llm_variator.sources.tasks.table import (
    DECODER_END,
    DECODER_START,
    SPLITS,
    TASKS,
    Task,
    TaskSplit,
    find_task,
)

__all__ = [
    "DECODER_END",
    "DECODER_START",
    "SPLITS",
    "TASKS",
    "Example",
    "Origin",
    "Task",
    "TaskSplit",
    "average",
    "exact_match",
    "find_task",
    "label_from_log_likelihoods",
    "label_from_text",
    "load_examples",
    "score",
    "token_f1",
]
