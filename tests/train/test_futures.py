"""Samples that scores are fitted on."""

from __future__ import annotations

import pytest
import torch

from llm_variator import VariatorError
from llm_variator.sources.corpora import parse_sources
from llm_variator.sources.models import byte_tokenizer
from llm_variator.train.futures import KINDS, Samples


def make_samples(data, squad=None, **changes):
    settings = dict(count=9, lengths=(60, 240), ends=(4, 8), seed=0, data_dir=squad) | changes
    return Samples(parse_sources(data), byte_tokenizer(), **settings)


def test_samples_are_functions_of_their_number(squad):
    made, again = (make_samples(["pydoc-topics", "task:squad"], squad) for _ in range(2))
    assert [one.kind for one in made] == [*(KINDS * 4), "text"]
    assert sorted({len(one.context) for one in made}) == [60, 240]
    for index in (8, 1, 5):
        one, other = made[index], again[index]
        assert torch.equal(one.context, other.context)
        assert one.rows == other.rows
        assert all(torch.equal(one.futures[name], other.futures[name]) for name in one.futures)
    assert made.has_questions


def test_what_follows_belongs_to_the_context(squad):
    tokenizer = byte_tokenizer()
    for one in make_samples(["pydoc-topics", "task:squad"], squad):
        assert 4 <= one.rows.start < one.rows.stop <= len(one.context) - 8
        again = tokenizer.decode(one.futures["repetition"])
        assert again.endswith("exactly.\n\n" + tokenizer.decode(one.context[one.rows]))
        if one.kind == "text":
            assert set(one.futures) == {"continuation", "repetition"}
            continue
        text = tokenizer.decode(one.context)
        asked = tokenizer.decode(one.futures["questions"])
        assert asked.startswith("\nQuestion: What is ")
        passage = asked.split("What is ")[1].split(",")[0]
        assert f"Passage {passage} "[:9] in text
        shown = [line for line in text.split("\n") if line.startswith("Question: ")]
        assert not any(len(line) > 25 and line in asked for line in shown), (
            "a question that was answered already"
        )


def test_texts_of_different_samples_do_not_overlap():
    made = make_samples(["pydoc-topics"], count=12, lengths=(200,))
    assert len({tuple(one.context.tolist()) for one in made}) == 12
    assert not make_samples(["pydoc-topics"]).has_questions


def test_too_little_text_is_refused(tmp_path, squad):
    (tmp_path / "a.txt").write_text("Some words, and then some more. " * 20)
    with pytest.raises(VariatorError, match=r"text for \d contexts of 200 tokens, 9 are wanted"):
        make_samples([str(tmp_path / "a.txt")], lengths=(200,))
    with pytest.raises(
        VariatorError, match=r"the passages of the data have .* too few for a context of 9000"
    ):
        make_samples(["task:squad"], squad, lengths=(9000,))
    with pytest.raises(VariatorError, match="--fit-tokens 12 leaves no token between --dense-head 4"):
        make_samples(["pydoc-topics"], lengths=(12,))
