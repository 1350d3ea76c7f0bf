"""llm_variator inside vLLM: prompts compressed in the real engine, the ratio chosen per request and by load.

Attached through vLLM's own extension points: `register` is the entry point `vllm.general_plugins`, which every
process of vLLM calls; `arguments` makes the engine arguments that name the rest.
"""

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def register() -> None:
    """Tell vLLM which classes serve the architectures `Variator<family>ForCausalLM`. Imports nothing heavy."""
    from vllm import ModelRegistry

    for family in FAMILIES:
        name = f"Variator{family}ForCausalLM"
        ModelRegistry.register_model(name, f"{__name__}.model:{name}")
