"""What each row of a table costs, by arithmetic: the columns "Para." and "FLOPs" of the paper's Table 1."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from llm_variator import cli
from llm_variator.baselines import make_student
from llm_variator.cli import flags
from llm_variator.config import VariatorConfig
from llm_variator.measures.operations import EncoderShape, Stack, encoding, parameters, prefill
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model
from llm_variator.tables.recipe import Row, TableRecipe, as_argv

TOKENS = 512  # of the input, as the paper counts


def row_costs(table: TableRecipe, model: str) -> dict[str, dict[str, float]]:
    """For every row that costs something else than the model itself, in per cent of the model.

    Returns:
        By row `parameters`, those that the row adds to the model or, for a baseline, has in its place; and
        `operations` of reading `TOKENS` tokens: of T5 the encoder's, without the decoder.
    """
    base = load_model(model, random_init=True, device="meta")
    return {row.name: _cost(base, row, table) for row in table.rows if row.method != "original"}


def _cost(base: PreTrainedModel, row: Row, table: TableRecipe) -> dict[str, float]:
    plugin, keep, counted, shape_of = None, None, base, base.config
    with torch.device("meta"):
        if row.method == "variator":
            attached = VariatorModel(base, _plugin_config(row))
            plugin = attached.plugin().config
            count = parameters(attached.plugin())
            attached.unload()
        else:
            said = table.flags("adapt", row)
            if row.method == "ltp":
                keep = said.get("keep", 0.25)
            else:
                counted = make_student(base, said.get("student_layers"))
                shape_of = counted.config
            count = parameters(counted)
    if base.config.is_encoder_decoder or base.config.model_type == "bert":
        dense = encoding(EncoderShape.of(base.config), TOKENS).encoder
        left = encoding(EncoderShape.of(shape_of), TOKENS, plugin=plugin, keep=keep).encoder
    else:
        stack = Stack.of(base.config)
        dense, left = prefill(stack, TOKENS).total, prefill(stack, TOKENS, plugin).total
    return {"parameters": 100 * count / parameters(base), "operations": 100 * left / dense}


def _plugin_config(row: Row) -> VariatorConfig:
    argv = as_argv(row.plugin)
    return cli.read(flags.PluginConfig, argv, prog="python -m llm_variator.train").plugin_config()
