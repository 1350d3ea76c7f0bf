"""llm_variator inside vLLM: prompts compressed in the real engine, the ratio chosen per request and by load.

Attached through vLLM's own extension points: `register` is the entry point `vllm.general_plugins`, which every
process of vLLM calls; `arguments` makes the engine arguments that name the rest.
"""

import ctypes
import os
import signal
import sys

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


SERVER = "VARIATOR_SERVER_PID"
"""The environment variable with which `llm_variator.serve` names itself to the processes it starts."""


def register() -> None:
    """Tell vLLM which classes serve the architectures `Variator<family>ForCausalLM`. Imports nothing heavy."""
    from vllm import ModelRegistry

    if os.environ.get(SERVER) not in (None, str(os.getpid())):
        _end_with_parent()

    for family in FAMILIES:
        name = f"Variator{family}ForCausalLM"
        ModelRegistry.register_model(name, f"{__name__}.model:{name}")


def _end_with_parent() -> None:
    """Let Linux end this process with its parent: a killed server must not leave its engine behind."""
    if sys.platform == "linux":
        set_parent_death_signal = 1  # PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
