"""vLLM's V1 model runner: which request sits in which row, from a logits processor that never touches logits.

A logits processor is the one extension point that hears of every row added, removed and moved, before the
forward pass. The class is named by what it accepts, as in `RowTracker_auto_0_2_4` (default choice first, then
the served ratios): vLLM validates requests in its front end with the class alone, without any configuration.
Such names resolve by `__getattr__` below. It also satisfies the V2 runner's interface, for the validation.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor, MoveDirectionality
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsProcessor as LogitsProcessorV2

from llm_variator.integrations.policy import Ratio
from llm_variator.integrations.vllm.rows import AUTO, Choice, Request, RowTable, check_choice, choice_of

TABLE = "variator.rows"
"""Where the table hangs in vLLM's static forward context, which model and processors share."""

MEMORY = "variator_memory"
"""Where `Request.memory` hangs in the sampling parameters, which vLLM keeps per request."""


def row_table(vllm_config: Any) -> RowTable:
    """The table of this engine's worker."""
    return vllm_config.compilation_config.static_forward_context.setdefault(TABLE, RowTable())


class RowTracker(LogitsProcessor, LogitsProcessorV2):
    """Keeps the row table; refuses requests that ask for what is not served."""

    default: ClassVar[Choice] = 0
    served: ClassVar[tuple[Ratio, ...]] = ()

    def __init__(self, vllm_config: Any, *_: Any) -> None:
        self.rows = row_table(vllm_config).requests
        self.rows.clear()

    @classmethod
    def validate_params(cls, sampling_params: Any) -> None:
        """Refuse wrong requests; vLLM answers with HTTP 400."""
        choice = check_choice(choice_of(sampling_params.extra_args, cls.default), cls.served)
        if choice != 0 and sampling_params.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs of a compressed prompt mean nothing: ask for variator_k 0")

    def is_argmax_invariant(self) -> bool:
        """It changes no logits."""
        return True

    def apply(self, logits: Tensor, *_: Any) -> Tensor:
        """Nothing to do."""
        return logits

    def add_request(self, req_idx: int, sampling_params: Any) -> bool:
        """V2: it changes no logits of any request."""
        return False

    def update_state(self, batch_update: Any) -> None:
        """Follow the rows of the V1 runner's batch."""
        if batch_update is None:
            return
        rows = self.rows
        for row in batch_update.removed:
            rows.pop(row, None)
        for row, params, prompt, _ in batch_update.added:
            # the scheduler has replaced "auto" and the default by a number
            # a row that sits out a step comes back with the same parameters: they carry what is remembered of it
            memory = vars(params).setdefault(MEMORY, {})
            rows[row] = Request(len(prompt or ()), choice_of(params.extra_args, 0), memory)
        for source, target, direction in batch_update.moved:
            moving, staying = rows.pop(source, None), rows.pop(target, None)
            if moving is not None:
                rows[target] = moving
            if direction == MoveDirectionality.SWAP and staying is not None:
                rows[source] = staying


def __getattr__(name: str) -> type[RowTracker]:
    if not re.fullmatch(rf"RowTracker_(\d+|kv\d+|{AUTO})(_(\d+|kv\d+))+", name):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    default, *served = (int(word) if word.isdecimal() else word for word in name.split("_")[1:])
    body = {"default": default, "served": tuple(k for k in served if k)}
    made = type(name, (RowTracker,), body | {"__module__": __name__, "__doc__": RowTracker.__doc__})
    globals()[name] = made
    return made
