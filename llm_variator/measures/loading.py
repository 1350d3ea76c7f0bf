"""The model that a command line measures."""

from __future__ import annotations

import argparse

from llm_variator import old_cli as cli
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model


def load_variator(args: argparse.Namespace) -> VariatorModel:
    """The model of --model, --device and `cli.model_options`, without a plugin, in evaluation mode."""
    return VariatorModel(load_model(args.model, device=args.device, **cli.model_options(args))).eval()
