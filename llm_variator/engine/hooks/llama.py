"""Decoders built like LLaMA: Llama, Mistral, Qwen2, Qwen3 (with q/k norm), Gemma 3 (text)."""

from llm_variator.engine.hooks.architecture import Architecture

LLAMA = Architecture(
    model_types=("llama", "mistral", "qwen2", "qwen3", "gemma3_text"),
    layers="layers",
    ffn="mlp",
    neurons="mlp.down_proj",
    attention="self_attn",
    key="k_proj",
    value="v_proj",
    query="q_proj",
    output="o_proj",
    norm="input_layernorm",
)
