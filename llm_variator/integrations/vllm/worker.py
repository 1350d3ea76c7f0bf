"""vLLM's CPU worker, which also takes blocks away from a request that goes on.

vLLM's scheduler tells a worker of blocks that are added to a request, never of blocks that are given back from its end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.platforms import current_platform
from vllm.v1.worker.cpu_worker import CPUWorker

from llm_variator.errors import VariatorError
from llm_variator.integrations.vllm.blocks import SHORTENED


class ShorteningWorker(CPUWorker):
    """Cuts block tables as the scheduler has cut its own, before a step adds to them."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if not current_platform.is_cpu():
            raise VariatorError(
                'plugins that keep keys and values need vLLM\'s CPU build: serve plugins with the site "ffn" only'
            )
        super().__init__(*args, **kwargs)

    def execute_model(self, scheduler_output: Any) -> Any:
        """One step."""
        shorten(self.model_runner, getattr(scheduler_output, SHORTENED, {}))
        return super().execute_model(scheduler_output)


def shorten(runner: Any, left: Mapping[str, Mapping[int, int]]) -> None:
    """Leave requests so many blocks, given by request id and KV cache group, in vLLM's V1 model runner.

    Raises:
        RuntimeError: a request has fewer.
    """
    for request_id, groups in left.items():
        state = runner.requests.get(request_id)
        if state is None:  # it ended meanwhile
            continue
        row = runner.input_batch.req_id_to_index.get(request_id)
        for group, blocks in groups.items():
            if len(state.block_ids[group]) < blocks:
                raise RuntimeError(
                    f"llm_variator: {blocks} blocks are to be left of {len(state.block_ids[group])}"
                )
            del state.block_ids[group][blocks:]
            if row is not None:
                runner.input_batch.block_table[group].num_blocks_per_row[row] = blocks
