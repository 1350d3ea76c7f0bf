"""A vLLM engine in this process, as measurements use it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from llm_variator.errors import VariatorError
from llm_variator.integrations.vllm.arguments import engine_arguments
from llm_variator.integrations.vllm.rows import ARGUMENT
from llm_variator.serve.flags import Choice, Plugins

SEED = 0


def engine(
    settings: Plugins, plugins: Mapping[str, str], *, longest: int, block_size: int, **options: Any
) -> Any:
    """An engine for sequences of at most `longest` tokens; `options` are vLLM's."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    # the pool is given in blocks; vLLM's default would want most of the machine's memory to be free
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
    try:
        from vllm import LLM
    except ImportError:
        raise VariatorError("this needs vLLM: see docs/serving.md for how to install it") from None
    defaults: dict[str, Any] = dict(
        dtype=settings.dtype,
        max_model_len=longest,
        block_size=block_size,
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        seed=SEED,
    )
    return LLM(**engine_arguments(settings.model, plugins, **(defaults | options)))


def vllm_version() -> str:
    """Of vLLM as installed."""
    import vllm

    return str(vllm.__version__)


def generate(
    llm: Any, prompts: Sequence[Sequence[int]], choices: Sequence[Choice], tokens: int
) -> list[list[int]]:
    """Greedy continuations of so many tokens, each prompt at the choice of its place."""
    from vllm import SamplingParams

    asked = [
        SamplingParams(
            temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False, extra_args={ARGUMENT: k}
        )
        for k in choices
    ]
    answers = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], asked, use_tqdm=False)
    return [list(answer.outputs[0].token_ids) for answer in answers]
