"""Whether vLLM answers as the Hugging Face path does: greedy tokens, all choices side by side in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llm_variator.cli import flag, flags
from llm_variator.cli.values import PositiveInt
from llm_variator.errors import VariatorError
from llm_variator.integrations.vllm.rows import ratio_of
from llm_variator.model import VariatorModel
from llm_variator.serve.blocks import in_use, table_count
from llm_variator.serve.engine import engine, generate, vllm_version
from llm_variator.serve.flags import Choice, Plugins
from llm_variator.sources.corpora import EMBEDDED, read_documents, tokenize
from llm_variator.sources.models import load_model, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Answers(flags.Stored, Plugins):
    """Answers against those of the Hugging Face path."""

    lengths: tuple[PositiveInt, ...] = flag((1, 5, 70, 200, 333, 512, 1024, 1700), "tokens of the prompts")
    max_tokens: PositiveInt = flag(25, "generated tokens of each")
    chunk: PositiveInt = flag(256, "tokens that a step reads")
    block_size: PositiveInt = flag(32, "tokens in a KV block")
    data: str = flag(EMBEDDED, "text the prompts are cut from, a source as in training")


def measure_answers(settings: Answers, plugins: dict[str, str]) -> dict[str, Any]:
    """Generated tokens that equal the Hugging Face path's; every prompt is asked for at every choice, all at once."""
    prompts = text_prompts(settings)
    names: dict[Choice, str | None] = {0: None, **{ratio_of(name): name for name in plugins}}
    asked = [(prompt, k) for prompt in prompts for k in names]
    wanted = _expected(settings, plugins, asked, names)
    longest = max(settings.lengths) + settings.max_tokens
    llm = engine(
        settings,
        plugins,
        longest=longest,
        block_size=settings.block_size,
        max_num_seqs=len(asked),
        max_num_batched_tokens=settings.chunk,
        # all of them dense
        num_gpu_blocks_override=1
        + table_count(settings.model, plugins)
        * sum(-(-(len(prompt) + settings.max_tokens) // settings.block_size) for prompt, _ in asked),
        enforce_eager=True,
    )
    cache = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager
    with in_use(cache) as peak:
        found = generate(llm, [prompt for prompt, _ in asked], [k for _, k in asked], settings.max_tokens)
    llm.llm_engine.engine_core.shutdown()
    return {
        "model": settings.model,
        "vllm": vllm_version(),
        "plugin": list(settings.plugin),
        "dtype": settings.dtype,
        "prompt_tokens": list(settings.lengths),
        "answer_tokens": settings.max_tokens,
        "chunk": settings.chunk,
        "requests": len(asked),
        "requests_at_once": peak.requests,
        "choices": {str(k): _agreement(asked, found, wanted, k) for k in names},
    }


def text_prompts(settings: Answers) -> list[list[int]]:
    """Stretches of running text that begin at different places, of these lengths."""
    stream = torch.cat(tokenize(read_documents(settings.data), load_tokenizer(settings.model)))
    last = len(stream) - max(settings.lengths)
    if last < len(settings.lengths):
        raise VariatorError(
            f"prompts of up to {max(settings.lengths)} tokens cannot be cut from {len(stream)}"
        )
    starts = torch.linspace(0, last, len(settings.lengths)).long().tolist()
    return [stream[at : at + n].tolist() for at, n in zip(starts, settings.lengths, strict=True)]


def _expected(
    settings: Answers,
    plugins: dict[str, str],
    asked: Sequence[tuple[list[int], Choice]],
    names: dict[Choice, str | None],
) -> list[list[int]]:
    """The Hugging Face path's answers, one prompt at a time."""
    model = VariatorModel(load_model(settings.model, dtype=getattr(torch, settings.dtype)))
    for name, plugin in plugins.items():
        model.load_plugin(plugin, plugin_name=name)
    found = []
    for prompt, k in asked:
        ids = torch.tensor([prompt])
        with model.use_plugin(names[k]):
            answer = model.generate(
                ids, max_new_tokens=settings.max_tokens, do_sample=False, eos_token_id=None
            )
        found.append(answer[0, len(prompt) :].tolist())
    return found


def _agreement(
    asked: Sequence[tuple[list[int], Choice]],
    found: Sequence[Sequence[int]],
    wanted: Sequence[Sequence[int]],
    k: Choice,
) -> dict[str, Any]:
    pairs = [
        (len(prompt), ours, theirs)
        for (prompt, of), ours, theirs in zip(asked, found, wanted, strict=True)
        if of == k
    ]
    equal = [sum(a == b for a, b in zip(ours, theirs, strict=True)) for _, ours, theirs in pairs]
    different = [n for n, ours, theirs in pairs if list(ours) != list(theirs)]
    return {
        "tokens": sum(len(theirs) for _, _, theirs in pairs),
        "equal_tokens": sum(equal),
        "prompts_with_other_answers": different,
    }
