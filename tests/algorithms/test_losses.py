"""Losses and metrics against their definitions."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap

from metadist.algorithms.losses import (
    LETTERS,
    accuracy,
    auc,
    outputs_for,
    resolve_objective,
    right,
    string_cross_entropy,
)

INTEGERS, FLOATS, STRINGS = torch.tensor([0, 2, 1]), torch.zeros(3, 1), torch.zeros(3, 4, dtype=torch.int64)


@pytest.mark.parametrize(
    ("loss", "target", "metric", "wanted"),
    [
        ("auto", INTEGERS, "auto", (F.cross_entropy, "accuracy", True)),
        ("auto", FLOATS, "auto", (F.mse_loss, "mean_squared_error", False)),
        ("auto", STRINGS, "auto", (string_cross_entropy, "accuracy", True)),
        ("cross_entropy", STRINGS, "auto", (string_cross_entropy, "accuracy", True)),
        ("binary_cross_entropy", FLOATS, "auto", (F.binary_cross_entropy_with_logits, "accuracy", True)),
        ("binary_cross_entropy", FLOATS, "auc", (F.binary_cross_entropy_with_logits, "auc", True)),
        (F.mse_loss, FLOATS, "auto", (F.mse_loss, "mean_squared_error", False)),
        (F.l1_loss, FLOATS, "auto", (F.l1_loss, "task_loss", False)),
        (F.l1_loss, FLOATS, "mean_squared_error", (F.l1_loss, "mean_squared_error", False)),
        (F.multi_margin_loss, INTEGERS, "auto", (F.multi_margin_loss, "accuracy", True)),
    ],
)
def test_the_metric_follows_from_the_loss_or_is_named(loss, target, metric, wanted) -> None:
    made = resolve_objective(loss, target, metric)
    assert (made.loss, made.metric, made.higher_is_better) == wanted


def test_what_there_is_not_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="loss must be auto, cross_entropy.*not 'hinge'"):
        resolve_objective("hinge", INTEGERS)
    with pytest.raises(ValueError, match="metric must be auto, accuracy.*not 'f1'"):
        resolve_objective("auto", INTEGERS, "f1")


@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=1, max_size=12))
def test_auc_counts_pairs_in_the_right_order(pairs: list[tuple[int, bool]]) -> None:
    scores, positive = (torch.tensor([float(p[i]) for p in pairs], dtype=torch.float64) for i in (0, 1))
    ups = [s for s, p in pairs if p]
    downs = [s for s, p in pairs if not p]
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in itertools.product(ups, downs)]
    wanted = sum(won) / len(won) if won else 0.5
    assert float(auc(scores, positive)) == pytest.approx(wanted)
    assert float(auc(scores[:, None], positive[:, None])) == pytest.approx(wanted)
    assert float(auc(torch.stack([-scores, scores], 1), positive)) == pytest.approx(wanted)


def test_auc_of_many_tasks_at_once() -> None:
    scores, positive = torch.randn(4, 9), (torch.arange(36).reshape(4, 9) % 3 == 0).float()
    together = vmap(auc)(scores, positive)
    torch.testing.assert_close(together, torch.stack([auc(s, p) for s, p in zip(scores, positive, strict=True)]))


def test_right_by_kind_of_target() -> None:
    assert right(torch.tensor([[0.1, 0.9], [0.8, 0.2]]), torch.tensor([1, 1])).tolist() == [1, 0]
    assert right(torch.tensor([[2.0], [-1.0], [3.0]]), torch.tensor([[1.0], [0.0], [0.0]])).tolist() == [1, 1, 0]
    letters = torch.tensor([[0, 4], [1, 2]])
    scores = F.one_hot(torch.tensor([[0, 4], [1, 3]]), LETTERS).float().reshape(2, -1)
    assert right(scores, letters).tolist() == [1, 0], "a string with one wrong letter is wrong"
    assert float(accuracy(scores, letters)) == 0.5


def test_the_cross_entropy_of_strings_is_the_mean_over_places() -> None:
    scores, target = torch.randn(6, 3 * LETTERS), torch.randint(0, LETTERS, (6, 3))
    parts = [F.cross_entropy(scores[:, LETTERS * i : LETTERS * (i + 1)], target[:, i]) for i in range(3)]
    torch.testing.assert_close(string_cross_entropy(scores, target), torch.stack(parts).mean())


def test_numbers_of_outputs() -> None:
    assert outputs_for(torch.tensor([0, 3, 1])) == 4
    assert outputs_for(torch.zeros(5, 2)) == 2 and outputs_for(torch.zeros(5)) == 1
    assert outputs_for(torch.zeros(5, 5, dtype=torch.int64)) == 25
