"""What the model must know of every request in a batch: prompt length and chosen plugin.

vLLM's model runners differ in how they tell: `rows_v1` and `state_v2` fill this table, the model reads it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from llm_variator.errors import VariatorError
from llm_variator.integrations.policy import Ratio
from llm_variator.integrations.vllm.plan import Chunk

ARGUMENT = "variator_k"
"""The key in a request's `vllm_xargs` (offline: `SamplingParams.extra_args`)."""
AUTO = "auto"
Choice = Ratio
"""0 (or 1): dense; k: the plugin of that ratio, or name; "auto": the scheduler decides at admission."""
KEPT = re.compile("kv[0-9]+")
"""The name of a plugin that keeps keys and values; all are named by `k` and their ratio otherwise."""


@dataclasses.dataclass
class Request:
    """One row."""

    prompt: int
    """Its tokens."""
    plugin: Ratio
    memory: dict[int, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """By layer: what is remembered of a prompt from chunk to chunk. It ends with the prompt, or with the request."""


def choice_of(extra_args: Mapping[str, Any] | None, default: Choice) -> Any:
    """What a request asks for, unchecked."""
    return (extra_args or {}).get(ARGUMENT, default)


def ratio_of(name: str) -> Ratio:
    """What requests ask for to get the plugin of this name: "k2" -> 2, "kv4" -> "kv4".

    Raises:
        VariatorError: it is no name of a plugin.
    """
    if KEPT.fullmatch(name):
        return name
    if name.startswith("k") and name[1:].isdecimal() and int(name[1:]) >= 2:
        return int(name[1:])
    raise VariatorError(
        "a served plugin is named after the ratio that requests ask for (k2, k4), or, where it keeps keys and "
        f"values, kv and a number (kv4); got {name!r}"
    )


def check_choice(choice: Any, served: Sequence[Ratio]) -> Choice:
    """A valid choice, 1 read as 0.

    Raises:
        VariatorError: not one of 0, 1, "auto" and the served ratios.
    """
    if choice == AUTO:
        return AUTO
    if isinstance(choice, str) and choice in served:
        return choice
    if isinstance(choice, int) and not isinstance(choice, bool) and choice in (0, 1, *served):
        return 0 if choice == 1 else choice
    known = ", ".join(map(str, (0, *served)))
    raise VariatorError(f'{ARGUMENT} must be one of {known} or "{AUTO}", got {choice!r}')


def tracker_path(default: Choice, served: Sequence[Ratio]) -> str:
    """The name of the class in `rows_v1` that accepts these choices, for vLLM's `logits_processors`."""
    return f"{__name__}_v1:RowTracker_" + "_".join(map(str, (default, 0, *served)))


class RowTable:
    """Requests by row of the runner's batch, for the next forward pass."""

    def __init__(self) -> None:
        self.requests: dict[int, Request] = {}
        """Row (V1) or state index (V2) -> request."""
        self.prepared: list[Chunk] | None = None
        """V2: the chunks of the next pass, known on the CPU; None (V1): the model reads them off the metadata."""

    def chunks(
        self, query_start: Sequence[int], lengths: Sequence[int], keys: Sequence[int] | None = None
    ) -> list[Chunk]:
        """The batch's chunks.

        Args:
            query_start: first row of every chunk and, last, the end.
            lengths: tokens of every sequence up to the end of its chunk.
            keys: of each chunk's request; default its place in the batch.
        """
        chunks = []
        for row in range(len(query_start) - 1):
            start, stop = query_start[row], query_start[row + 1]
            if stop > start:
                request = self.requests.get(row if keys is None else keys[row], Request(0, 0))
                place = lengths[row] - (stop - start)
                chunks.append(Chunk(start, stop - start, place, request.prompt, request.plugin))
        return chunks

    @property
    def any_plugin(self) -> bool:
        """Whether some request here uses a plugin."""
        return any(request.plugin for request in self.requests.values())
