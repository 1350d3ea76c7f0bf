"""What the model must know of every request in a batch: prompt length and chosen plugin.

vLLM's model runners differ in how they tell: `rows_v1` and `state_v2` fill this table, the model reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from llm_variator.errors import VariatorError
from llm_variator.integrations.vllm.plan import Chunk

ARGUMENT = "variator_k"
"""The key in a request's `vllm_xargs` (offline: `SamplingParams.extra_args`)."""
AUTO = "auto"
Choice = int | str
"""0 (or 1): dense; k: the plugin of that ratio; "auto": the scheduler decides at admission."""


@dataclasses.dataclass
class Request:
    """One row."""

    prompt: int
    """Its tokens."""
    plugin: int
    memory: dict[int, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    """By layer: what is remembered of a prompt from chunk to chunk. It ends with the prompt, or with the request."""


def choice_of(extra_args: Mapping[str, Any] | None, default: Choice) -> Any:
    """What a request asks for, unchecked."""
    return (extra_args or {}).get(ARGUMENT, default)


def check_choice(choice: Any, served: Sequence[int]) -> Choice:
    """A valid choice, 1 read as 0.

    Raises:
        VariatorError: not one of 0, 1, "auto" and the served ratios.
    """
    if choice == AUTO:
        return AUTO
    if isinstance(choice, int) and not isinstance(choice, bool) and choice in (0, 1, *served):
        return 0 if choice == 1 else choice
    known = ", ".join(map(str, (0, *served)))
    raise VariatorError(f'{ARGUMENT} must be one of {known} or "{AUTO}", got {choice!r}')


def tracker_path(default: Choice, served: Sequence[int]) -> str:
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
