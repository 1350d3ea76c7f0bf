"""What each row of a table costs, by arithmetic: the columns "Para." and "FLOPs" of the paper's Table 1."""

from __future__ import annotations

import dataclasses

import torch
from transformers import PreTrainedModel

from llm_variator import cli
from llm_variator.baselines import make_student
from llm_variator.cli import flags
from llm_variator.config import VariatorConfig
from llm_variator.engine.groups import split
from llm_variator.measures.operations import EncoderShape, Stack, encoding, parameters, prefill
from llm_variator.model import VariatorModel
from llm_variator.sources.models import load_model
from llm_variator.tables.recipe import Flags, Row, TableRecipe, as_argv

TOKENS = 512  # of the input, as the paper counts
ANSWER = 32  # tokens of a decoder's answer to it
PARTS = ("parameters", "operations")


def row_costs(table: TableRecipe, model: str) -> dict[str, dict[str, float]]:
    """For every row that costs something else than the model itself, in per cent of the model.

    Returns:
        By row `parameters`, those that the row adds to the model or, for a baseline, has in its place; and
        `operations` of reading `TOKENS` tokens: of T5 the encoder's, without the decoder. In a table with site
        "cross" also `decoder`, operations of T5's decoder for an answer of `ANSWER` tokens, and `cross_entries`,
        keys and values that its cross-attention holds.
    """
    base = load_model(model, random_init=True, device="meta")
    costs = {row.name: _cost(base, row, table) for row in table.rows if row.method != "original"}
    if not any("cross" in row.plugin.get("sites", ()) for row in table.rows):
        return {name: {part: cost[part] for part in PARTS} for name, cost in costs.items()}
    return costs


def _cost(base: PreTrainedModel, row: Row, table: TableRecipe) -> dict[str, float]:
    plugin, keep, counted, shape_of = None, None, base, base.config
    more: dict[str, float] = {}
    made = table.flags("adapt" if row.pretrain is None else "pretrain", row)
    with torch.device("meta"):
        if row.method == "variator":
            attached = VariatorModel(base, _plugin_config(row, made))
            plugin = attached.plugin().config
            count = parameters(attached.plugin())
            attached.unload()
        else:
            if row.method == "ltp":
                keep = table.flags("adapt", row).get("keep", 0.25)
            else:
                counted = make_student(base, made.get("student_layers"))
                shape_of = counted.config
            count = parameters(counted)
    if base.config.is_encoder_decoder or base.config.model_type == "bert":
        whole, part = EncoderShape.of(base.config), EncoderShape.of(shape_of)
        dense = encoding(whole, TOKENS).encoder
        left = encoding(part, TOKENS, plugin=plugin, keep=keep).encoder
        if base.config.is_encoder_decoder:
            answering = encoding(whole, TOKENS, answer=ANSWER).total - dense
            ours = encoding(part, TOKENS, answer=ANSWER, plugin=plugin, keep=keep).total - left
            more = {"decoder": 100 * ours / answering, "cross_entries": 100 * _cross_entries(plugin) / TOKENS}
    else:
        stack = Stack.of(base.config)
        dense, left = prefill(stack, TOKENS).total, prefill(stack, TOKENS, plugin).total
    return {"parameters": 100 * count / parameters(base), "operations": 100 * left / dense} | more


def _cross_entries(plugin: VariatorConfig | None) -> int:
    k = plugin.ratio("cross", 0) if plugin else None
    return TOKENS if plugin is None or k is None else split(TOKENS, k, *plugin.ends, ragged=True).entries


def _plugin_config(row: Row, made: Flags) -> VariatorConfig:
    """The plugin's, by the flags `made` of the run that makes it."""
    names = {field.name for field in dataclasses.fields(flags.PluginConfig)}
    argv = as_argv({name: value for name, value in made.items() if name in names} | dict(row.plugin))
    return cli.read(flags.PluginConfig, argv, prog="python -m llm_variator.train").plugin_config()
