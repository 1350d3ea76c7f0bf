"""The scheduler's part: the ratio of every request, chunks that cut no group, and caches that never mix.

vLLM takes a scheduler class by name; `make_scheduler` stands for it and picks the asynchronous one when vLLM's
own choice would be asynchronous.
"""

from __future__ import annotations

import copy
import hashlib
import time
from collections import Counter, defaultdict, deque
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from llm_variator.integrations.policy import Load, Ratio
from llm_variator.integrations.vllm.blocks import SHORTENED, CompressedPromptManager
from llm_variator.integrations.vllm.heads import entries_of
from llm_variator.integrations.vllm.metrics import count_request
from llm_variator.integrations.vllm.plan import Shape, cut, settled
from llm_variator.integrations.vllm.rows import ARGUMENT, AUTO, choice_of
from llm_variator.integrations.vllm.settings import settings_of


class VariatorScheduler(Scheduler):
    """vLLM's scheduler for compressed prompts."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._settings = settings_of(self.vllm_config)
        self._shapes = self._settings.shapes
        self._policy = self._settings.make_policy() if self._shapes else None
        self._ratios: dict[str, Ratio] = {}
        self._steps: deque[tuple[Any, Counter[Ratio], float]] = deque()
        self._ended = 0.0
        self._shortened: defaultdict[str, dict[int, int]] = defaultdict(dict)
        for manager in self.kv_cache_manager.coordinator.single_type_managers:
            if isinstance(manager, CompressedPromptManager):
                manager.ledger = self

    def add_request(self, request: Any) -> None:
        """Settle the request's ratio, once and for all, and give its cached blocks a namespace of their own."""
        if request.request_id not in self.requests and request.sampling_params is not None:
            k = self._ratio(request)
            # of its own: vLLM gives all answers to one prompt (n > 1) the same parameters
            params = request.sampling_params = copy.copy(request.sampling_params)
            params.extra_args = {**(params.extra_args or {}), ARGUMENT: k}
            self._ratios[request.request_id] = k
            if k:
                self._salt(request, k, self._shapes[k])
            count_request(k, request.num_prompt_tokens)
        super().add_request(request)

    def _ratio(self, request: Any) -> Ratio:
        choice = choice_of(request.sampling_params.extra_args, self._settings.default)
        if request.resumable:
            return 0  # its prompt is still growing; the answer's metadata says so
        if choice == AUTO:
            choice = self._policy.choose(self._load(request)) if self._policy else 0
        return choice if choice in self._shapes else 0

    def _load(self, request: Any) -> Load:
        queued: Counter[Ratio] = Counter()
        for other in self.requests.values():
            unread = other.num_prompt_tokens - other.num_computed_tokens
            if unread > 0:
                queued[self._ratios.get(other.request_id, 0)] += unread
        return Load(request.num_prompt_tokens, queued, 1.0 - self.kv_cache_manager.usage)

    # --- chunks

    def _reserve_prefill_lookahead(self, request: Any, num_computed_tokens: int, num_new_tokens: int) -> int:
        """A hook of vLLM on the size of every chunk: end it where no group is."""
        tokens = super()._reserve_prefill_lookahead(request, num_computed_tokens, num_new_tokens)
        shape = self._shape(request.request_id)
        if shape is None:
            return tokens
        end = cut(num_computed_tokens + tokens, request.num_prompt_tokens, shape)
        return max(0, end - num_computed_tokens)

    def _shape(self, request_id: str) -> Shape | None:
        return self._shapes.get(self._ratios.get(request_id, 0))

    # --- steps, and what the policy learns of them

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Schedule a step, remember which prompts it reads, and tell the worker what blocks were given back."""
        output = super().schedule(*args, **kwargs)
        if self._shortened:
            setattr(output, SHORTENED, dict(self._shortened))
            self._shortened.clear()
        read: Counter[Ratio] = Counter()
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = self.requests[request_id]  # its computed tokens include this step's already
            if tokens > 1 and request.num_computed_tokens - tokens < request.num_prompt_tokens:
                read[self._ratios.get(request_id, 0)] += tokens
        if self._policy is not None:
            self._steps.append((output, read, time.monotonic()))
        return output

    def update_from_output(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Take a step's results, and tell the policy how long it took. Steps may overlap, but end in order."""
        while self._steps:
            output, read, began = self._steps.popleft()
            if output is scheduler_output:
                now = time.monotonic()
                if read and self._policy is not None:
                    self._policy.observe(read, now - max(began, self._ended))
                self._ended = now
                break
        return super().update_from_output(scheduler_output, *args, **kwargs)

    # --- caches

    def entries(self, request_id: str, tokens: int, spec: Any) -> int:
        """KV entries of a request's first `tokens` tokens in layers of this specification."""
        k = self._ratios.get(request_id, 0)
        if not k:
            return tokens
        prompt = self.requests[request_id].num_prompt_tokens
        return entries_of(tokens, prompt, k, self._shapes[k], dict(spec.ratios), dict(spec.keeps))

    def scheduled(self, request_id: str) -> int:
        """Tokens of a request that are computed, or are being computed."""
        return int(self.requests[request_id].num_computed_tokens)

    def shortened(self, request_id: str, group: int, blocks: int) -> None:
        """Note that a request is left so many blocks in a KV cache group, for the next step."""
        self._shortened[request_id][group] = blocks

    def _salt(self, request: Any, k: Ratio, shape: Shape) -> None:
        """Blocks are shared only between requests that compute the same keys and values in them.

        The salt separates plugins. Behind the last group they depend on where the prompt ends as well, so there
        the hashes take in its length.
        """
        if request._block_hasher is None:
            return
        stock, end = request._block_hasher, settled(request.num_prompt_tokens, shape)
        request.cache_salt = f"variator:{k}:{request.cache_salt or ''}"
        size, mark = self.hash_block_size, f"variator:{request.num_prompt_tokens}".encode()

        def hasher(of: Any) -> list[bytes]:
            first = len(of.block_hashes)
            return [
                value if (first + i + 1) * size <= end else hashlib.sha256(value + mark).digest()
                for i, value in enumerate(stock(of))
            ]

        request._block_hasher = hasher
        request.block_hashes.clear()
        request.update_block_hashes()

    def _get_local_prefix_cache_hit(self, request: Any) -> Any:
        """A hook of vLLM on prefix caching: shorten a hit that ends inside a group to whole blocks before it."""
        blocks, tokens, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        shape = self._shape(request.request_id)
        if shape is None or not tokens:
            return blocks, tokens, boundary, diverged
        size, kept = self.block_size, tokens
        while kept and cut(kept, request.num_prompt_tokens, shape) != kept:
            kept -= size
        if kept != tokens:
            groups = tuple(list(group)[: kept // size] for group in blocks.blocks)
            blocks = self.kv_cache_manager.create_kv_cache_blocks(groups)
        return blocks, kept, boundary, diverged

    # --- answers

    def _free_request(self, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Tell the ratio in the answer's metadata."""
        kv_params, ec_params = super()._free_request(request, *args, **kwargs)
        k = self._ratios.pop(request.request_id, None)
        if k is not None and self._shapes:
            kv_params = {**(kv_params or {}), ARGUMENT: k}
        return kv_params, ec_params


class VariatorAsyncScheduler(VariatorScheduler, AsyncScheduler):
    """vLLM's asynchronous scheduler for compressed prompts."""


def make_scheduler(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """What vLLM calls for a scheduler."""
    asynchronous = vllm_config.scheduler_config.async_scheduling
    made: Any = VariatorAsyncScheduler if asynchronous else VariatorScheduler
    return made(vllm_config=vllm_config, **kwargs)
