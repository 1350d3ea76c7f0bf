"""One-process vLLM engines over tiny random models, and the Hugging Face reference for them."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from conftest import make_decoder, randomise

from llm_variator import VariatorConfig, VariatorModel

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
BLOCK = 32

SHAPE = dict(vocab_size=211, hidden_size=128, intermediate_size=96, head_dim=32, max_position_embeddings=2048)
FFN = dict(sites=("ffn",), r=8, k_per_layer=None, dense_head=4, dense_tail=5)
BOTH = FFN | dict(sites=("ffn", "kv"))
HEADS = [[4, 1], [2, 8], [16, 4]]
KEPT = dict(sites=("kv",), compressor="select", block=16, dense_head=4, dense_tail=5, k_per_head=HEADS)


def make_model(name: str, folder: Path, **overrides: int) -> str:
    """A tiny decoder's folder. Norms of one keep its logits apart."""
    model = make_decoder(name, **(SHAPE | overrides))
    with torch.no_grad():
        for part, parameter in model.named_parameters():
            if "norm" in part:
                parameter.fill_(1)
    model.save_pretrained(folder / name)
    return str(folder / name)


def make_byte_model(folder: Path) -> str:
    """A tiny decoder's folder with a tokenizer of bytes in it, as servers need."""
    from llm_variator.sources.models import byte_tokenizer

    model = make_model("llama", folder, vocab_size=259)
    byte_tokenizer().save_pretrained(model)
    return model


def reference_model(model: str, plugins: Mapping[str, str | Path]) -> VariatorModel:
    """The Hugging Face path with the same plugins."""
    from llm_variator.sources.models import load_model

    variator = VariatorModel(load_model(model, dtype=torch.float32))
    for name, plugin in plugins.items():
        variator.load_plugin(plugin, plugin_name=name)
    return variator


def make_plugin(model: str, folder: Path, k: int, **settings: Any) -> str:
    """A randomised plugin's folder."""
    from llm_variator.sources.models import load_model

    host = VariatorModel(load_model(model, dtype=torch.float32), VariatorConfig(k=k, **settings))
    randomise(host.plugin(), std=0.1, seed=k)
    host.save_pretrained(folder)
    return str(folder)


def expected(
    variator: VariatorModel, prompts: Sequence[Sequence[int]], ks: Sequence[int | str], tokens: int
) -> list:
    """Greedy continuations, one prompt at a time; `ks` as a request names them."""
    found = []
    for prompt, k in zip(prompts, ks, strict=True):
        with variator.use_plugin(k if isinstance(k, str) else f"k{k}" if k else None):
            ids = torch.tensor([list(prompt)])
            out = variator.generate(ids, max_new_tokens=tokens, do_sample=False, eos_token_id=None)
        found.append(out[0, len(prompt) :].tolist())
    return found


class Engine:
    """A vLLM engine in this process; close it before the next one."""

    def __init__(self, model: str, plugins: Mapping[str, str] | None = None, **options: Any) -> None:
        from vllm import LLM

        from llm_variator.integrations.vllm.arguments import engine_arguments
        from llm_variator.sources.models import model_source

        settings: dict[str, Any] = dict(
            dtype="float32",
            max_model_len=1024,
            max_num_batched_tokens=64,
            max_num_seqs=8,
            num_gpu_blocks_override=200,
            block_size=BLOCK,
            enforce_eager=True,
            skip_tokenizer_init=True,
            distributed_executor_backend="uni",
            disable_log_stats=True,
        )
        settings |= options
        if plugins is None:
            self.llm: Any = LLM(model=model_source(model), **settings)
        else:
            self.llm = LLM(**engine_arguments(model, plugins, **settings))

    @property
    def scheduler(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core.scheduler

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def outputs(
        self, prompts: Sequence[Sequence[int]], ks: Sequence[Any], tokens: int, **sampling: Any
    ) -> list:
        from vllm import SamplingParams

        params = [
            SamplingParams(
                temperature=0,
                max_tokens=tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if k is None else {"variator_k": k},
                **sampling,
            )
            for k in ks
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        return self.llm.generate(asked, params, use_tqdm=False)

    def tokens(self, *args: Any, **sampling: Any) -> list[list[int]]:
        return [list(out.outputs[0].token_ids) for out in self.outputs(*args, **sampling)]

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None:
        from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        del self.llm
        gc.collect()
        cleanup_dist_env_and_memory()
