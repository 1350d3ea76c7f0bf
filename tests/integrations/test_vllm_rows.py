"""The two ways in which vLLM's runners tell which request sits where. `make test-vllm`."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm.v1", reason="vllm is not installed here: make test-vllm")

from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality, _load_logitsprocs_by_fqcns
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.sample.logits_processor.loader import (
    build_custom_logits_processors_params_validator,
)

from llm_variator.integrations.vllm import rows_v1
from llm_variator.integrations.vllm.plan import Chunk
from llm_variator.integrations.vllm.rows import Request, tracker_path
from llm_variator.integrations.vllm.rows_v1 import row_table
from llm_variator.integrations.vllm.state_v2 import VariatorModelState
from llm_variator.integrations.vllm.worker import shorten


def config():
    return SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context={}))


def params(k=None, **others):
    return SimpleNamespace(
        extra_args=None if k is None else {"variator_k": k}, prompt_logprobs=None, **others
    )


def test_rows_follow_the_v1_batch():
    vllm_config = config()
    tracker = rows_v1.RowTracker(vllm_config, torch.device("cpu"), False)
    table = row_table(vllm_config)

    def update(removed=(), added=(), moved=()):
        added = [(row, params(k), [0] * prompt, []) for row, prompt, k in added]
        tracker.update_state(BatchUpdate(4, list(removed), added, list(moved)))

    update(added=[(0, 10, 2), (1, 20, None), (2, 30, 4)])
    assert table.requests == {0: Request(10, 2), 1: Request(20, 0), 2: Request(30, 4)}
    tracker.update_state(None)
    update(moved=[(0, 2, MoveDirectionality.SWAP)])
    assert table.requests == {0: Request(30, 4), 1: Request(20, 0), 2: Request(10, 2)}
    update(removed=[1], added=[(1, 5, 2)])
    assert table.requests[1] == Request(5, 2)
    update(removed=[0], moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)])
    assert table.requests == {0: Request(10, 2), 1: Request(5, 2)}
    logits = torch.zeros(2, 3)
    assert tracker.apply(logits) is logits


def test_the_class_is_named_by_what_it_accepts():
    path = tracker_path("auto", (2, 4))
    (found,) = _load_logitsprocs_by_fqcns([path])
    assert (found.default, found.served) == ("auto", (2, 4))
    assert getattr(rows_v1, found.__name__) is found  # so that it can be pickled by name
    (other,) = _load_logitsprocs_by_fqcns([tracker_path(2, (2,))])
    assert (other.default, other.served) == (2, (2,))
    (named,) = _load_logitsprocs_by_fqcns([tracker_path("kv4", (2, "kv4"))])
    assert (named.default, named.served) == ("kv4", (2, "kv4"))
    for wrong in ("RowTracker_two_0", "RowTracker_", "Other"):
        with pytest.raises(AttributeError):
            getattr(rows_v1, wrong)


def test_the_v2_front_end_validates_with_the_same_class():
    validate = build_custom_logits_processors_params_validator([tracker_path(0, (2,))])
    validate(params(2))
    with pytest.raises(VLLMValidationError, match="must be one of 0, 2"):
        validate(params(4))


def test_rows_of_the_v2_runner(monkeypatch):
    monkeypatch.setattr(DefaultModelState, "__init__", lambda self, vllm_config: None)
    monkeypatch.setattr(DefaultModelState, "add_request", lambda self, index, data: None)
    monkeypatch.setattr(DefaultModelState, "prepare_attn", lambda self, batch: {"metadata": 1})
    state = VariatorModelState(None)
    state.vllm_config = config()

    def new(name, prompt, k):
        return SimpleNamespace(req_id=name, prompt_token_ids=[0] * prompt, sampling_params=params(k))

    state.add_request(5, new("a", 20, 2))
    state.add_request(3, new("b", 8, None))
    batch = SimpleNamespace(
        idx_mapping_np=np.array([3, 5]),
        req_ids=["b", "a"],
        query_start_loc_np=np.array([0, 1, 13, 13]),
        seq_lens_cpu_upper_bound=torch.tensor([9, 12, 0]),
    )
    assert state.prepare_attn(batch) == {"metadata": 1}
    table = row_table(state.vllm_config)
    assert table.prepared == [Chunk(0, 1, 8, 8, 0), Chunk(1, 12, 0, 20, 2)]
    batch.req_ids = ["dummy", "dummy"]  # a warm-up batch uses the indices of live requests
    state.prepare_attn(batch)
    assert table.prepared == [Chunk(0, 1, 8, 0, 0), Chunk(1, 12, 0, 0, 0)]


def test_blocks_that_a_request_gave_back():
    tables = [SimpleNamespace(num_blocks_per_row=np.array([9, 5, 4])) for _ in range(2)]
    runner = SimpleNamespace(
        requests={"a": SimpleNamespace(block_ids=([1, 2, 3], [4, 5, 6, 7])), "b": None},
        input_batch=SimpleNamespace(req_id_to_index={"a": 2}, block_table=tables),
    )
    shorten(runner, {"a": {1: 2}, "ended": {0: 1}})
    assert runner.requests["a"].block_ids == ([1, 2, 3], [4, 5])
    assert [table.num_blocks_per_row.tolist() for table in tables] == [[9, 5, 4], [9, 5, 2]]
    del runner.input_batch.req_id_to_index["a"]  # it sits out a step
    shorten(runner, {"a": {0: 1}})
    assert runner.requests["a"].block_ids == ([1], [4, 5])
    with pytest.raises(RuntimeError, match="3 blocks are to be left of 2"):
        shorten(runner, {"a": {1: 3}})
