"""T5's encoder: v1.0 (ReLU), v1.1 and FLAN (gated), mT5, with or without the decoder, which stays as it is.

With site "cross" it reads merged encoder states; its modules are untouched then too.
"""

from llm_variator.engine.hooks.architecture import Architecture

T5 = Architecture(
    model_types=("t5", "mt5"),
    reader="encoder",
    layers="block",
    ffn="layer.1.DenseReluDense",
    neurons="layer.1.DenseReluDense.wo",
    attention="layer.0.SelfAttention",
    key="k",
    value="v",
    answers="decoder",
    decoder=False,
)
