"""BERT with any head. Its `output` modules add the residual: both sites end at their projection `dense`.

Positions are BERT's own: it counts them from the first column, so give `position_ids` to a left-padded batch.
"""

from llm_variator.engine.hooks.architecture import Architecture

BERT = Architecture(
    model_types=("bert",),
    layers="encoder.layer",
    ffn="intermediate",
    neurons="output.dense",
    ffn_end="output.dense",
    attention="attention.self",
    attention_end="attention.output.dense",
    key="key",
    value="value",
    decoder=False,
)
