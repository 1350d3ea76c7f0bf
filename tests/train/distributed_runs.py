"""Run by torchrun: training runs of one job, one after the other. Arguments: a JSON file with the runs."""

import json
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState
from torch import distributed

sys.path.insert(0, str(Path(__file__).parents[1]))
from llm_variator.train.__main__ import main

torch.set_num_threads(1)
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}
for run in json.loads(Path(sys.argv[1]).read_text()):
    os.environ.update(FSDP) if run["fsdp"] else [os.environ.pop(name, None) for name in FSDP]
    AcceleratorState._reset_state(reset_partial_state=False)
    main(run["words"])
    distributed.barrier()
distributed.destroy_process_group()
