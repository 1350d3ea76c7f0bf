"""The smaller student of the "Distillation" rows (paper section 4.3, after Sanh et al. 2019), made from its teacher.

The paper does not describe its student; its Table 1 does. With every layer kept and the inner width of every FFN
cut to a quarter, in encoder and decoder, T5-base keeps 61.9 % of its parameters and T5-large 59.1 %: both as
printed. In the encoder that costs exactly what token pruning to 25 % costs, and the two rows print the same FLOPs
(44.3 %, 52.5 %). No choice of whole layers does so: 61.9 % of T5-base needs (8, 6), (4, 9) or (12, 3) layers, which
compute 67 %, 33 % or all of the encoder, and leave T5-large with 59.0 % at (16, 12) and its like. So the narrow
student is the default, and fewer layers (Sanh et al.: every second one) are the named alternative.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from llm_variator.engine.hooks import architecture_of
from llm_variator.errors import VariatorError

PAPER_FFN = 0.25

# the blocks of a stack, and in a block the weights with one entry (in dimension 0 or 1) per inner neuron
_BLOCK = re.compile(r"(.*\b(?P<stack>encoder|decoder)\.(?:block|layer)\.)(?P<layer>\d+)(\..*)")
_NEURONS = {
    r"\.DenseReluDense\.wi(_[01])?\.weight$": 0,
    r"\.DenseReluDense\.wo\.weight$": 1,
    r"\.intermediate\.dense\.(weight|bias)$": 0,
    r"\.layer\.\d+\.output\.dense\.weight$": 1,
}


def spread(layers: int, of: int) -> list[int]:
    """`layers` of the `of` layers of a teacher, evenly spread, first and last among them; one layer: the first."""
    if layers == 1:
        return [0]
    return [(i * (of - 1) * 2 + layers - 1) // (2 * (layers - 1)) for i in range(layers)]  # rounded


def make_student(
    teacher: PreTrainedModel,
    encoder_layers: int | None = None,
    decoder_layers: int | None = None,
    *,
    ffn: float | None = None,
) -> PreTrainedModel:
    """A smaller model of the teacher's class, initialised from its weights; the teacher is not touched.

    The hidden width stays, so that the last hidden states of both compare. What a T5 shares stays shared, what it
    does not (the head of v1.1 and FLAN) is copied; `save_pretrained` and `from_pretrained` work as ever.

    Args:
        teacher: T5 or mT5 (with any head, or the encoder alone), or BERT with any head.
        encoder_layers: layers kept, evenly spread, first and last among them; None: all.
        decoder_layers: likewise of T5's decoder; None: no more than the encoder's. It cannot have more:
            transformers sizes the decoder's cache in `generate` by the number of encoder layers.
        ffn: share of the inner neurons that each FFN keeps, those with the largest product of incoming and
            outgoing weight norms, in the teacher's order. None: a quarter (the paper's student, see above) if no
            number of layers is given, else all.

    Raises:
        VariatorError: another kind of model, or a number that does not fit the teacher.
    """
    architecture = architecture_of(teacher)
    if architecture.decoder:
        raise VariatorError(f"students are made of T5 and BERT, not {teacher.config.model_type!r}")
    config: Any = copy.deepcopy(teacher.config)
    is_bert = config.model_type == "bert"
    names = {"encoder": "num_hidden_layers" if is_bert else "num_layers", "decoder": "num_decoder_layers"}
    has_decoder = not is_bert and getattr(teacher.base_model, "decoder", None) is not None
    if decoder_layers is not None and not has_decoder:
        raise VariatorError(f"{type(teacher).__name__} has no decoder: leave decoder_layers out")
    if ffn is None:
        ffn = PAPER_FFN if encoder_layers is None and decoder_layers is None else 1.0
    if not 0 < ffn <= 1:
        raise VariatorError(f"ffn must be a share above 0 and at most 1, got {ffn!r}")

    taken: dict[str, list[int]] = {}
    for stack, wanted in (("encoder", encoder_layers), ("decoder", decoder_layers)):
        if stack == "decoder" and not has_decoder:
            continue
        most = have = getattr(config, names[stack])
        if stack == "decoder":
            most = min(have, len(taken["encoder"]))
        wanted = most if wanted is None else wanted
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= most:
            limit = f"the teacher's {have}" if most == have else f"the encoder's {most}"
            raise VariatorError(f"{stack}_layers must be from 1 to {limit}, got {wanted!r}")
        taken[stack] = spread(wanted, have)
    for stack, layers in taken.items():
        setattr(config, names[stack], len(layers))
    width = "intermediate_size" if is_bert else "d_ff"
    inner = max(1, round(ffn * getattr(config, width)))
    setattr(config, width, inner)

    if not is_bert:  # an untied head's configuration would untie the embeddings of encoder and decoder too
        config.tie_word_embeddings = True
    student: PreTrainedModel = type(teacher)(config)
    head, teachers = student.get_output_embeddings(), teacher.get_output_embeddings()
    if head is not None and teachers.weight is not teacher.get_input_embeddings().weight:
        # FLAN's configuration says tied, its weights are not: transformers unties them when it loads them
        head.weight = nn.Parameter(torch.empty_like(teachers.weight))
    config.tie_word_embeddings = teacher.config.tie_word_embeddings
    weights = teacher.state_dict()
    own: dict[str, Tensor] = {}
    neurons: dict[str, Tensor] = {}  # of each of the teacher's blocks
    for name in student.state_dict():
        block = _BLOCK.fullmatch(name)
        source = (
            name if block is None else f"{block[1]}{taken[block['stack']][int(block['layer'])]}{block[4]}"
        )
        own[name] = weights[source]
        if block is not None and (dim := _neuron_dimension(source)) is not None:
            prefix = re.split(r"\.layer\.\d+\.DenseReluDense|\.intermediate|\.output", source)[0]
            if prefix not in neurons:
                neurons[prefix] = _strongest(weights, prefix, inner)
            own[name] = own[name].index_select(dim, neurons[prefix])
    student.load_state_dict(own)
    student.train(teacher.training)
    return nn.Module.to(student, device=teacher.device, dtype=teacher.dtype)


def take_head(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Give a BERT classifier the teacher's pooler and classifier.

    Raises:
        VariatorError: they are of another size.
    """
    own = dict(student.named_parameters())
    for name, value in teacher.named_parameters():
        if not name.startswith(("classifier.", "bert.pooler.")):
            continue
        if own[name].shape != value.shape:
            raise VariatorError(
                f"the student's {name} is {tuple(own[name].shape)}, its teacher's {tuple(value.shape)}: a student has "
                "its teacher's hidden size and labels"
            )
        with torch.no_grad():
            own[name].copy_(value)


def _neuron_dimension(name: str) -> int | None:
    return next((dim for pattern, dim in _NEURONS.items() if re.search(pattern, name)), None)


def _strongest(weights: dict[str, Tensor], prefix: str, count: int) -> Tensor:
    """Indices, in order, of the `count` inner neurons of the block `prefix` with the largest weights."""
    strength: Tensor | None = None
    for name, value in weights.items():
        if not name.startswith(f"{prefix}.") or value.ndim != 2 or (dim := _neuron_dimension(name)) is None:
            continue
        norm = torch.linalg.vector_norm(value.float(), dim=1 - dim)
        strength = norm if strength is None else strength * norm
    assert strength is not None
    return strength.topk(count).indices.sort().values
