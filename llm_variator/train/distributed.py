"""Several processes: who speaks, how many micro-batches are in a step, and a sharded base under a whole plugin.

DDP (`accelerate launch` or `torchrun`) is the Trainer's and Accelerate's own. With FSDP2 the frozen base is sharded
and the plugin, a thousandth of it, is whole on every process: so checkpoints are the same files in every case, and
each can be resumed by any number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch import distributed, nn

from llm_variator.errors import VariatorError


def world_size() -> int:
    """Processes of this run, as the launcher says; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_main_process() -> bool:
    """Whether this process prints, and writes files."""
    return int(os.environ.get("RANK", 0)) == 0


def announce(text: str) -> None:
    """Print once, not in every process."""
    if is_main_process():
        print(text)


def wants_fsdp() -> bool:
    """Whether the launcher asks for FSDP."""
    return os.environ.get("ACCELERATE_USE_FSDP", "false").lower() in ("1", "true")


def shard_only(accelerator: Accelerator, frozen: nn.Module, trained: nn.Module) -> None:
    """Have Accelerate shard the model but for `trained`, also on CPUs, where it would leave FSDP out.

    Raises:
        VariatorError: FSDP1 is asked for, or weights of `frozen` are trained.
    """
    state = accelerator.state
    if state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    plugin = state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise VariatorError("FSDP1 shards whole modules, a plugin's too: set fsdp_version: 2")
    if plugin.cpu_ram_efficient_loading:
        raise VariatorError(
            "set fsdp_cpu_ram_efficient_loading: false; every process reads the base by itself"
        )
    if any(parameter.requires_grad for parameter in frozen.parameters()):
        raise VariatorError("FSDP is for plugins on a frozen base: train whole models and LoRA with DDP")
    trained.to(accelerator.device)  # what is ignored is not moved there either
    plugin.ignored_modules = [trained]


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Average over all processes, in one message; a weight that got no gradient in a process counts as zero there."""
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    flat = torch.cat([p.new_zeros(p.numel()) if p.grad is None else p.grad.flatten() for p in trained])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = part.view_as(parameter)
