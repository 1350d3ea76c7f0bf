"""Windows of tokens that age: counted by hand."""

from __future__ import annotations

import torch

from llm_variator.engine.window import Rule, Window

RULE = Rule(block=4, step=8, near=6, head=2, owner=0)


def scores(rows: int, tokens: int) -> torch.Tensor:
    """(rows, 1, tokens): 0, 1, ..., from 100 on in the next row."""
    return torch.arange(tokens)[None, None] + 100.0 * torch.arange(rows)[:, None, None]


def test_steps_are_those_of_a_loop():
    for start in range(-2, RULE.near + 1):
        length, steps = start, 0
        for read in range(1, 60):
            if length - RULE.near >= RULE.step:
                length, steps = length - RULE.step, steps + 1
            length += 1
            assert (RULE.steps(start, read), RULE.after(start, read)) == (steps, length)
            assert length <= RULE.near + RULE.step
    assert (RULE.steps(14, 0), RULE.after(14, 0)) == (0, 14)


def test_cuts_are_where_each_row_has_enough():
    window = Window.opened(RULE, scores(3, 1), tokens=5).appended(scores(3, 6), [6, 0, 3])
    # before the token that finds 6 + 8 in the window
    assert window.cuts([20, 14, 12]) == {8: [8, 0, 0], 11: [0, 0, 8], 16: [8, 0, 0]}
    assert Window.opened(RULE, scores(1, 1), tokens=0).lengths == (-2,)


def test_rows_are_right_aligned():
    window = Window.opened(RULE, scores(2, 1), tokens=5).appended(scores(2, 6), [6, 3])
    assert window.scores[:, 0].tolist()[0] == [0, 1, 2, 3, 4, 5]
    assert window.scores[1, 0, 3:].tolist() == [100, 101, 102]
    assert window.rows([1, 1]).scores.tolist() == [[[100, 101, 102]]] * 2
    assert window.without_newest([4, 2]).scores[0, 0].tolist() == [0, 1]
    assert window.without_newest([4, 2]).scores[1, 0, -1:].tolist() == [100]
    assert window.without_oldest([4, 0]).lengths == (2, 3)
    both = Window.stack([window, None, None], [2, 1, 1], [9, 9, 0])
    assert both.lengths == (6, 3, 0, -2)
    assert Window.stack([None], [1], [4]) is None


def test_of_equal_scores_the_earlier_token_stays():
    window = Window.opened(RULE, scores(1, 1), tokens=5)
    window = window.appended(torch.tensor([[[1.0, 3.0, 1.00001, 1.0, 9.0, 9.0, 0.0]]]), [7])
    keep = window.keep(window.order([6]), [6], 2, None, entries=9)
    assert keep[0, 0].int().tolist() == [1, 1, 1, 1, 0, 0, 1, 0, 1]
    assert window.removed([6], 2) == [3]
    valid = torch.tensor([[True] * 4 + [False] + [True] * 5])
    keep = window.keep(window.order([6]), [6], 2, valid, entries=10)
    assert keep[0, 0].int().tolist() == [1, 1, 1, 1, 0, 0, 0, 1, 0, 1]
