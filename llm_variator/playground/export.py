"""One prompt as a page that needs nothing else: the figures of `--compare`, and which tokens are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from llm_variator.engine.files import write_atomically
from llm_variator.measures.compare import Comparison, compare
from llm_variator.model import VariatorModel
from llm_variator.playground import panels, render
from llm_variator.playground.view import View, pieces


def export(
    file: Path,
    model: VariatorModel,
    tokenizer: Any,
    input_ids: Tensor,
    *,
    name: str,
    command: str,
    max_new_tokens: int,
    repetitions: int,
) -> list[Comparison]:
    """Write the page of a prompt (1, tokens), dense and under every plugin; returns the rows of `--compare`.

    The tokens kept are read from each plugin's own cache of the prompt.

    Raises:
        VariatorError: the file cannot be written.
    """
    rows = compare(model, tokenizer, input_ids, max_new_tokens=max_new_tokens, repetitions=repetitions)
    views = []
    for plugin in (None, *model.plugins):
        with model.use_plugin(plugin):
            views.append(View.of(model.compress(input_ids)))
    page = render.whole(
        pieces(tokenizer, input_ids[0].tolist()),
        views,
        panels.of_comparison(model, tokenizer, rows, input_ids.shape[1]),
        model=name,
        command=command,
    )
    write_atomically(file, page)
    return rows
