"""vLLM's V2 model runner (the default with Triton): requests by state index, from the model's own state class."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from llm_variator.integrations.vllm.rows import Request, choice_of
from llm_variator.integrations.vllm.rows_v1 import row_table


class VariatorModelState(DefaultModelState):
    """Keeps the row table: `add_request` hears of requests, `prepare_attn` of the rows of the next pass."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._request_ids: dict[int, str] = {}

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        """Note prompt length and plugin. After a pre-emption the prompt is still the request's own prompt."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        choice = choice_of(params.extra_args, 0) if params is not None else 0
        request = Request(len(new_req_data.prompt_token_ids or ()), choice)
        row_table(self.vllm_config).requests[req_index] = request
        self._request_ids[req_index] = new_req_data.req_id

    def prepare_attn(self, input_batch: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Note the chunks of this pass. Rows of dummy batches carry ids of no request and stay dense."""
        indices = input_batch.idx_mapping_np.tolist()
        keys = [
            index if self._request_ids.get(index) == name else -1
            for index, name in zip(indices, input_batch.req_ids, strict=False)
        ]
        table = row_table(self.vllm_config)
        starts = input_batch.query_start_loc_np[: len(keys) + 1].tolist()
        table.prepared = table.chunks(starts, input_batch.seq_lens_cpu_upper_bound.tolist(), keys)
        return super().prepare_attn(input_batch, *args, **kwargs)
