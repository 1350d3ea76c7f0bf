"""The plain form of "select" itself: against the base model, and against examples written out by hand."""

from __future__ import annotations

import pytest
import reference_select as plain
import torch
from conftest import make_decoder, prompts

# Eleven tokens, no head, blocks 0123 4567 89A. The best of the first block are 3, then 0, of the second 6 and 5, and
# of equals (5 and 7, 8 and 9) the first.
SCORES = [5, 1, 2, 9, 0, 3, 7, 3, 4, 4, 1]


def rows(mask) -> list[str]:
    return ["".join("x" if seen else "." for seen in row) for row in mask]


def test_a_prompt_by_hand():
    assert rows(plain.seen_while_reading(SCORES, 4, 11, 0, 0, 4)) == [
        "x..........",
        "xx.........",
        "xxx........",
        "xxxx.......",
        "xxxxx......",
        "xxxxxx.....",
        "xxxxxxx....",
        "xxxxxxxx...",
        "...xxxxxx..",
        "...xxxxxxx.",
        "...xxxxxxxx",
    ]
    assert rows(plain.seen_while_reading(SCORES, 2, 11, 0, 0, 4))[7:] == [
        "xxxxxxxx...",
        "x..xxxxxx..",
        "x..xxxxxxx.",
        "x..xxxxxxxx",
    ]
    assert plain.kept_after(SCORES, 4, 11, 0, 0, 4) == [3, 6, 8]
    assert plain.kept_after(SCORES, 2, 11, 0, 0, 4) == [0, 3, 5, 6, 8, 9]
    assert plain.kept_after(SCORES, 1, 11, 0, 0, 4) == list(range(11))


def test_head_and_tail_by_hand():
    """Head 01, blocks 2345 6789 A; the tail starts inside the second block, after 6, or inside the first, after 3."""
    assert rows(plain.seen_while_reading(SCORES, 4, 11, 2, 4, 4)) == [
        "x..........",
        "xx.........",
        "xxx........",
        "xxxx.......",
        "xxxxx......",
        "xxxxxx.....",
        "xxxxxxx....",
        "xxxxxxxx...",
        "xxxxxxxxx..",
        "xxxxxxxxxx.",
        "xx.x..xxxxx",
    ]
    assert plain.kept_after(SCORES, 4, 11, 2, 4, 4) == [0, 1, 3, 6, 7, 8, 9, 10]
    assert plain.kept_after(SCORES, 2, 11, 2, 4, 4) == [0, 1, 3, 5, 6, 7, 8, 9, 10]
    assert rows(plain.seen_while_reading(SCORES, 4, 11, 2, 7, 4))[10] == "xx.xxxxxxxx"
    assert plain.kept_after(SCORES, 4, 11, 2, 7, 4) == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10]


def test_a_choice_cut_off_is_made_again():
    """Of the whole block 4567 token 6 is the best; once the tail starts at it, 5 is the best of what is left."""
    assert plain.kept_after(SCORES, 4, 11, 0, 5, 4) == [3, 5, 6, 7, 8, 9, 10]


def test_blocks_of_two_by_hand():
    assert rows(plain.seen_while_reading([1, 2, 4, 3, 6, 5, 8], 2, 7, 1, 1, 2)) == [
        "x......",
        "xx.....",
        "xxx....",
        "xxxx...",
        "xxxxx..",
        "x.xxxx.",
        "x.xxxxx",
    ]
    assert plain.kept_after([1, 2, 4, 3, 6, 5, 8], 2, 7, 1, 1, 2) == [0, 2, 4, 5, 6]


@pytest.mark.parametrize(("n", "head", "tail", "dense"), [(7, 0, 0, True), (8, 0, 0, False), (9, 2, 0, True)])
@pytest.mark.parametrize("ratio", [2, 4])
def test_short_prompts_stay_dense(n, head, tail, dense, ratio):
    assert (plain.kept_after(SCORES, ratio, n, head, tail, 4) == list(range(n))) is dense
    assert plain.kept_after(SCORES, ratio, n, head, n - head, 4) == list(range(n))


def test_scores():
    x, weight = torch.tensor([1.0, 2.0]), torch.tensor([[3.0, -1.0], [0.5, 0.5]])
    one = [plain.score(x, weight[f : f + 1], torch.tensor([0.25])) for f in range(2)]
    assert one == pytest.approx([2.5, 3.5])
    both = plain.score(x, weight, torch.tensor([0.25, 0.25]))
    assert both == pytest.approx(float(torch.tensor(one, dtype=torch.float64).logsumexp(0)))


def test_ties_keep_the_earlier():
    assert plain.best([0, 0, 0, 0], [0, 1, 2, 3], 2) == {0, 1}
    assert plain.best([1, 2, 2, 0], [0, 1, 2, 3], 1) == {1}


def of(base, ratio: int, *, block: int = 4, tail: int = 3) -> plain.Select:
    """Random scores for every layer."""
    generator = torch.Generator().manual_seed(2)
    layers, groups, d = 3, base.config.num_key_value_heads, base.config.hidden_size
    weights = [torch.randn(2, groups, d, generator=generator).double() for _ in range(layers)]
    biases = [torch.randn(2, groups, generator=generator).double() for _ in range(layers)]
    return plain.Select([[ratio] * groups] * layers, block, tail, weights, biases)


@torch.no_grad()
def test_ratios_of_one_are_the_base_model(decoder):
    base = make_decoder(decoder).double()
    (ids,) = prompts(45)
    expected = base(ids, output_hidden_states=True)
    for select in (of(base, 1), None):
        found = plain.read(base, ids, [plain.Segment(30, select, 2), plain.Segment(15)])
        torch.testing.assert_close(found.logits, expected.logits[0], atol=1e-9, rtol=0)
        for ours, theirs in zip(found.hidden, expected.hidden_states, strict=True):
            torch.testing.assert_close(ours, theirs[0], atol=1e-9, rtol=0)
        assert found.kept == [[list(range(45))] * base.config.num_key_value_heads] * 3


@torch.no_grad()
def test_ratios_above_one_are_felt_where_they_may(decoder):
    """A choice is felt two blocks on at the earliest: until there the base model's logits, from there others."""
    base = make_decoder(decoder).double()
    (ids,) = prompts(45)
    expected = base(ids).logits[0]
    found = plain.read(base, ids, [plain.Segment(45, of(base, 4), 2)]).logits
    first = 2 + 2 * 4  # the head, and two blocks
    torch.testing.assert_close(found[:first], expected[:first], atol=1e-9, rtol=0)
    assert ((found - expected)[first:].abs().amax(-1) > 1e-4).all()


@torch.no_grad()
def test_masks_in_the_models_own_attention(decoder):
    """One layer: the base model itself, given the mask of each head, computes the same."""
    shape = {"layer_types": ["full_attention"]} if decoder == "gemma3" else {}
    base = make_decoder(decoder, num_hidden_layers=1, attn_implementation="sdpa", **shape).double()
    (ids,) = prompts(26)
    groups = base.config.num_key_value_heads
    select = of(base, 2)
    select = select._replace(ratios=[[2, 4] * (groups // 2)])
    found = plain.read(base, ids, [plain.Segment(20, select, 2), plain.Segment(6)])
    h = base.model.layers[0].input_layernorm(base.model.embed_tokens(ids)[0])
    mask = torch.zeros(1, base.config.num_attention_heads, 26, 26, dtype=torch.bool)
    for head in range(base.config.num_attention_heads):
        g = head // (base.config.num_attention_heads // groups)
        scores = [plain.score(row, select.weights[0][:, g], select.biases[0][:, g]) for row in h[:20]]
        rule = (scores, select.ratios[0][g], 20, 2, 3, 4)
        mask[0, head, :20, :20] = torch.tensor(plain.seen_while_reading(*rule))
        mask[0, head, 20:, plain.kept_after(*rule)] = True
        mask[0, head, 20:, 20:] = torch.ones(6, 6).tril().bool()
    given = {"full_attention": mask} if decoder == "gemma3" else mask
    torch.testing.assert_close(found.logits, base(ids, attention_mask=given).logits[0], atol=1e-9, rtol=0)


@torch.no_grad()
def test_segments_and_entries():
    base = make_decoder("llama").double()
    (ids,) = prompts(53)
    first, second = of(base, 4), of(base, 2, block=8, tail=1)
    found = plain.read(
        base,
        ids,
        [plain.Segment(20, first, 2), plain.Segment(5), plain.Segment(18, second, 1), plain.Segment(10)],
    )
    # head, three whole blocks and three of a fourth, tail; generated; head, two blocks, tail; generated
    counts = 2 + 3 * 1 + 1 + 3, 5, 1 + 2 * 4 + 1, 10
    assert [found.entries(layer) for layer in range(3)] == [[sum(counts)] * 2] * 3
    alone = plain.read(base, ids[:, :25], [plain.Segment(20, first, 2), plain.Segment(5)])
    torch.testing.assert_close(found.logits[:25], alone.logits, atol=1e-12, rtol=0)
    assert [kept[:14] for kept in found.kept[1]] == alone.kept[1]
    assert alone.kept[1][0] != alone.kept[1][1]  # each head its own


@torch.no_grad()
def test_greedy():
    base = make_decoder("llama").double()
    (ids,) = prompts(20)
    tokens, logits = plain.greedy(base, ids, [plain.Segment(20)], 5)
    out = base.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(tokens, out[0, 20:])
    torch.testing.assert_close(logits, base(out).logits[0, 19:-1], atol=1e-9, rtol=0)
