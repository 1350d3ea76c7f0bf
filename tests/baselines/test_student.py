"""Students against the teacher's own layers, and against the parameter counts that the paper prints."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import make_decoder, make_encoder, prompts
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    T5EncoderModel,
)

from llm_variator import VariatorError
from llm_variator.baselines import make_student
from llm_variator.baselines.student import spread
from llm_variator.sources.models import load_model
from llm_variator.sources.models.aliases import ALIASES

DECODED = torch.tensor([[0, 5, 9, 4]])


def logits(model, n: int = 21):
    extra = {"decoder_input_ids": DECODED} if model.config.is_encoder_decoder else {}
    return model(*prompts(n), **extra)[0]


def stacks(model) -> list[tuple[nn.Module, str]]:
    """The holders of a model's lists of layers."""
    if model.config.model_type == "bert":
        return [(model.base_model.encoder, "layer")]
    return [(model.encoder, "block"), *([(model.decoder, "block")] if hasattr(model, "decoder") else [])]


@pytest.mark.parametrize(
    ("layers", "of", "taken"),
    [
        (1, 12, [0]),
        (2, 12, [0, 11]),
        (3, 12, [0, 6, 11]),
        (6, 12, [0, 2, 4, 7, 9, 11]),
        (12, 12, list(range(12))),
        (4, 6, [0, 2, 3, 5]),
    ],
)
def test_layers_are_spread(layers, of, taken):
    assert spread(layers, of) == taken


def test_spread_layers_are_distinct_and_keep_both_ends():
    for of in range(1, 30):
        for layers in range(2, of + 1):
            taken = spread(layers, of)
            assert len(set(taken)) == layers
            assert taken == sorted(taken)
            assert (taken[0], taken[-1]) == (0, of - 1)


@torch.no_grad()
def test_fewer_layers_are_the_teachers_own(encoder):
    teacher = make_encoder(encoder, **({"num_hidden_layers": 5} if encoder == "bert" else {"num_layers": 5}))
    state = copy.deepcopy(teacher.state_dict())
    decoder = None if encoder == "bert" else 2
    student = make_student(teacher, 3, decoder)
    cut = copy.deepcopy(teacher)
    for (holder, name), taken in zip(stacks(cut), ([0, 2, 4], [0, 4]), strict=False):
        blocks = getattr(holder, name)
        setattr(holder, name, nn.ModuleList([blocks[i] for i in taken]))
    assert torch.equal(logits(student), logits(cut))
    assert sum(p.numel() for p in student.parameters()) == sum(p.numel() for p in cut.parameters())
    assert all(torch.equal(value, state[key]) for key, value in teacher.state_dict().items())
    assert not torch.equal(logits(student), logits(teacher))


@torch.no_grad()
def test_a_narrow_student_keeps_the_neurons_that_matter(encoder):
    """Three quarters of the teacher's neurons have no effect: the student without them is the teacher."""
    teacher = make_encoder(encoder)
    generator = torch.Generator().manual_seed(0)
    for name, module in teacher.named_modules():
        if name.endswith("DenseReluDense"):
            ends = [module.wo]
        elif encoder == "bert" and name.startswith("bert.encoder.layer.") and name.endswith(".output.dense"):
            ends = [module] if "attention" not in name else []
        else:
            continue
        for end in ends:
            end.weight[:, torch.randperm(48, generator=generator)[:36]] = 0
    student = make_student(teacher)
    torch.testing.assert_close(logits(student), logits(teacher), atol=1e-5, rtol=1e-5)
    width = student.config.intermediate_size if encoder == "bert" else student.config.d_ff
    assert width == 12


@pytest.mark.parametrize(("alias", "share"), [("t5-base", "61.9%"), ("t5-large", "59.1%")])
def test_parameters_are_those_of_table_1(alias, share):
    with torch.device("meta"):
        teacher = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(**ALIASES[alias].config))
        student = AutoModelForSeq2SeqLM.from_config(
            AutoConfig.for_model(**{**ALIASES[alias].config, "d_ff": teacher.config.d_ff // 4})
        )
        made = make_student(teacher)
    counts = [sum(p.numel() for p in model.parameters()) for model in (made, student, teacher)]
    assert counts[0] == counts[1]
    assert f"{counts[0] / counts[2]:.1%}" == share


@torch.no_grad()
def test_saves_loads_and_generates(encoder, tmp_path):
    teacher = make_encoder(encoder)
    student = make_student(teacher, decoder_layers=None if encoder == "bert" else 2, ffn=0.5)
    student.save_pretrained(tmp_path)
    again = type(teacher).from_pretrained(tmp_path)
    assert torch.equal(logits(again), logits(student))
    if encoder != "bert":
        assert (len(again.encoder.block), len(again.decoder.block)) == (3, 2)
        assert again.generate(*prompts(9), num_beams=2, max_new_tokens=4).shape[0] == 1
        tied = again.get_output_embeddings().weight is again.get_input_embeddings().weight
        assert tied == (teacher.get_output_embeddings().weight is teacher.get_input_embeddings().weight)


@torch.no_grad()
def test_other_heads(encoder):
    for auto in (AutoModel, AutoModelForSequenceClassification) if encoder == "bert" else (AutoModel,):
        teacher = make_encoder(encoder, auto)
        student = make_student(teacher, 2)
        assert type(student) is type(teacher)
        assert logits(student).shape == logits(teacher).shape
    if encoder == "t5":
        base = make_encoder(encoder)
        alone = T5EncoderModel(copy.deepcopy(base.config))
        assert len(make_student(alone, 1).encoder.block) == 1
        with pytest.raises(VariatorError, match="no decoder"):
            make_student(alone, 1, 1)


def test_student_learns_alone_and_takes_dtype_and_mode():
    teacher = make_encoder("t5").bfloat16().eval()
    student = make_student(teacher)
    assert student.dtype == torch.bfloat16
    assert not student.training
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.zero_()
    assert all(parameter.any() for parameter in teacher.parameters())


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("llama", {}, "made of T5 and BERT"),
        ("bert", dict(decoder_layers=2), "no decoder"),
        ("bert", dict(encoder_layers=4), "from 1 to the teacher's 3"),
        ("t5", dict(decoder_layers=0), "decoder_layers must be from 1 to the teacher's 3"),
        ("t5", dict(encoder_layers=2, decoder_layers=3), "to the encoder's 2"),
        ("t5", dict(ffn=0), "above 0"),
    ],
)
def test_what_cannot_be_made(name, settings, message):
    with pytest.raises(VariatorError, match=message):
        make_student(make_decoder(name) if name == "llama" else make_encoder(name), **settings)


def with_own_head(folder):
    """A tiny T5 in `folder` as FLAN is saved: its head is its own, and it says so."""
    model = make_encoder("t5")
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.config.tie_word_embeddings = model.config.scale_decoder_outputs = False
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("load", [AutoModelForSeq2SeqLM.from_pretrained, load_model])
def test_an_own_head_unties_nothing_else(tmp_path, load):
    teacher = load(with_own_head(tmp_path / "teacher"))
    for student in (make_student(teacher, ffn=1.0), make_student(teacher)):
        student.save_pretrained(tmp_path / "student")
        for model in (student, load(tmp_path / "student")):
            assert model.encoder.embed_tokens.weight is model.shared.weight
            assert model.decoder.embed_tokens.weight is model.shared.weight
            assert model.lm_head.weight is not model.shared.weight
            assert torch.equal(logits(model), logits(student))
    whole = make_student(teacher, ffn=1.0)
    assert torch.equal(logits(whole), logits(teacher))
    shape = load_model(tmp_path / "teacher", random_init=True, device="meta")  # what tables count by
    with torch.device("meta"):
        models = (whole, teacher, shape, make_student(shape, ffn=1.0))
    assert len({sum(p.numel() for p in model.parameters()) for model in models}) == 1


@torch.no_grad()
def test_real_t5_keeps_its_own_head(flan_t5_small, tmp_path):
    teacher = load_model(flan_t5_small, dtype=torch.float32)
    assert teacher.lm_head.weight is not teacher.shared.weight
    whole = make_student(teacher, ffn=1.0)
    assert torch.equal(logits(whole), logits(teacher))
    assert sum(p.numel() for p in whole.parameters()) == sum(p.numel() for p in teacher.parameters())
    student = make_student(teacher, 4)
    expected = teacher.encoder.block[7].layer[1].DenseReluDense.wo.weight
    assert torch.equal(student.encoder.block[3].layer[1].DenseReluDense.wo.weight, expected)
    assert len(student.decoder.block) == 4
    student.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert torch.equal(again.lm_head.weight, teacher.lm_head.weight)
    assert torch.equal(logits(again), logits(student))
