"""The meta-update: average, clip, schedule, optimizer, and leaving everything alone when something is not finite."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from metadist.config.schema import OuterConfig
from metadist.outer.update import MetaUpdate, chunk_starts, learning_rate, norm_of
from metadist.outer.vectors import Addends

TASKS = 4


def options(**changes: Any) -> dict[str, Any]:
    return OuterConfig(**{"lr": 0.01, "steps": 10, **changes}).model_dump()


def gradients(n: int = 6, size: int = 50) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(size, generator=generator) * 3 for _ in range(n)]


def global_norm(*tensors: torch.Tensor) -> float:
    whole = torch.cat(tensors).numpy()
    bounds = np.array([*chunk_starts([len(t) for t in tensors]), len(whole)])
    return norm_of(Addends([0], [whole]).mean_and_squares(1.0, bounds)[1])


def start(size: int = 50) -> torch.Tensor:
    return torch.linspace(-1, 1, size)


OPTIMIZERS = [
    ({"optimizer": "adam", "betas": (0.8, 0.99)}, lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.99))),
    ({"optimizer": "adamw", "weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1)),
    (
        {"optimizer": "sgd", "momentum": 0.9, "weight_decay": 0.1},
        lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, weight_decay=0.1),
    ),
]


@pytest.mark.parametrize(("changes", "make"), OPTIMIZERS, ids=["adam", "adamw", "sgd"])
def test_steps_of_the_mean_gradient_equal_those_of_torch(changes: dict[str, Any], make: Any) -> None:
    update, theirs = MetaUpdate(start(), options(**changes)), torch.nn.Parameter(start())
    optimizer = make([theirs])
    for n, g in enumerate(gradients(), 1):
        stats = update.apply(g * TASKS, TASKS)
        theirs.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(update.vector, theirs, rtol=1e-6, atol=1e-7)
        assert stats == {"grad_norm": pytest.approx(float(g.norm()), rel=1e-6), "outer_lr": 0.01}
        assert update.version == n


def test_the_first_adam_step_has_its_known_size() -> None:
    """Bias correction makes it lr times the sign, whatever the gradient's scale (Kingma and Ba 2015, section 2.1)."""
    update = MetaUpdate(torch.zeros(3), options())
    update.apply(torch.tensor([1e-3, -5.0, 2e4]), 1)
    assert update.vector.tolist() == pytest.approx([-0.01, 0.01, -0.01], rel=1e-4)


def test_the_vector_and_the_gradient_handed_in_are_copied() -> None:
    weights, gradient = start(), torch.ones(50)
    update = MetaUpdate(weights, options(clip_norm=0.1))
    update.apply(gradient, 1)
    assert torch.equal(weights, start()) and torch.equal(gradient, torch.ones(50))


def test_clipping_scales_the_mean_and_reports_the_norm_before() -> None:
    update = MetaUpdate(torch.zeros(2), options(optimizer="sgd", lr=1.0, clip_norm=1.0))
    assert update.apply(torch.tensor([30.0, 40.0]), 10)["grad_norm"] == pytest.approx(5.0)
    assert update.vector.tolist() == pytest.approx([-0.6, -0.8])


def test_below_the_clip_norm_nothing_is_scaled() -> None:
    update = MetaUpdate(torch.zeros(2), options(optimizer="sgd", lr=1.0, clip_norm=5.1))
    update.apply(torch.tensor([3.0, 4.0]), 1)
    assert update.vector.tolist() == [-3.0, -4.0]


# --------------------------------------------------------------------------- schedule


def test_constant_schedule_without_warmup() -> None:
    assert {learning_rate(0.3, "constant", 0, 10, v) for v in range(12)} == {0.3}


def test_warmup_rises_linearly_and_reaches_lr_at_its_last_step() -> None:
    rates = [learning_rate(0.4, "constant", 4, 10, v) for v in range(6)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])


def test_cosine_values() -> None:
    rates = [learning_rate(2.0, "cosine", 0, 8, v) for v in (0, 2, 4, 6, 8, 9)]
    assert rates == pytest.approx([2.0, 1 + math.sqrt(0.5), 1.0, 1 - math.sqrt(0.5), 0.0, 0.0])


def test_linear_values() -> None:
    rates = [learning_rate(2.0, "linear", 2, 6, v) for v in (0, 1, 2, 4, 6, 9)]
    assert rates == pytest.approx([1.0, 2.0, 2.0, 1.0, 0.0, 0.0])


def test_cosine_starts_after_warmup() -> None:
    rates = [learning_rate(1.0, "cosine", 2, 6, v) for v in (0, 1, 2, 4, 6)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.0])


def test_the_schedule_drives_the_optimizer() -> None:
    update = MetaUpdate(torch.zeros(1), options(optimizer="sgd", lr=1.0, schedule="cosine", steps=4))
    rates = [update.apply(torch.ones(1), 1)["outer_lr"] for _ in range(4)]
    assert rates == pytest.approx([0.5 * (1 + math.cos(math.pi * v / 4)) for v in range(4)])
    assert update.vector.item() == pytest.approx(-sum(rates))


# --------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_changes_nothing(bad: float) -> None:
    update = MetaUpdate(start(), options())
    update.apply(gradients()[0], TASKS)
    vector, state = update.vector.detach().clone(), update.state()
    poisoned = gradients()[1]
    poisoned[17] = bad
    with pytest.raises(FloatingPointError, match="norm of the meta-gradient is (nan|inf)"):
        update.apply(poisoned, TASKS)
    assert update.version == 1 and torch.equal(update.vector, vector)
    assert all(torch.equal(v, state[k]) for k, v in update.state().items())


def test_a_large_float32_gradient_does_not_overflow_its_norm() -> None:
    assert global_norm(torch.full((4,), 1e30)) == pytest.approx(2e30)
    assert math.isinf(global_norm(torch.tensor([math.inf]))) and math.isnan(global_norm(torch.tensor([math.nan])))


def test_the_norm_crosses_chunks() -> None:
    assert global_norm(torch.ones((1 << 16) * 2 + 7)) == math.sqrt((1 << 17) + 7)
    assert global_norm(torch.ones((1 << 16) * 2 + 7), torch.ones(3), torch.ones(0)) == math.sqrt((1 << 17) + 10)


# --------------------------------------------------------------------------- stop and go on


@pytest.mark.parametrize("changes", [c for c, _ in OPTIMIZERS], ids=["adam", "adamw", "sgd"])
def test_a_restored_update_continues_bit_for_bit(changes: dict[str, Any]) -> None:
    made = options(schedule="cosine", warmup_steps=2, clip_norm=20.0, **changes)
    whole = MetaUpdate(start(), made)
    for g in gradients():
        whole.apply(g, TASKS)
    first = MetaUpdate(start(), made)
    for g in gradients()[:3]:
        first.apply(g, TASKS)
    saved, state = first.vector.detach().clone(), first.state()
    first.apply(torch.ones(50), 1)  # what is saved is a copy
    second = MetaUpdate(torch.zeros(50), made)
    second.load(saved, state, 3)
    for g in gradients()[3:]:
        second.apply(g, TASKS)
    assert second.version == whole.version == 6
    assert torch.equal(second.vector, whole.vector)
    assert all(torch.equal(v, whole.state()[k]) for k, v in second.state().items())


@pytest.mark.parametrize("changes", [c for c, _ in OPTIMIZERS], ids=["adam", "adamw", "sgd"])
def test_an_update_taken_back_to_its_start_has_forgotten_and_remembers_anew(changes: dict[str, Any]) -> None:
    fresh, again = MetaUpdate(start(), options(**changes)), MetaUpdate(start(), options(**changes))
    again.apply(gradients()[0], TASKS)
    again.load(start(), {}, 0)
    assert again.state() == {}
    for g in gradients()[1:3]:
        fresh.apply(g, TASKS)
        again.apply(g, TASKS)
    assert torch.equal(again.vector, fresh.vector)
    assert again.state().keys() == fresh.state().keys()
    assert all(torch.equal(v, fresh.state()[k]) for k, v in again.state().items())


# --------------------------------------------------------------------------- what no optimizer moves

AVERAGE, REPLACE = {"kind": "average", "rate": 0.25}, {"kind": "replace", "rate": 1.0}
RULES = [(10, 20, AVERAGE), (30, 45, REPLACE)]
FREE = [*range(10), *range(20, 30), *range(45, 50)]


@pytest.mark.parametrize(("changes", "make"), OPTIMIZERS, ids=["adam", "adamw", "sgd"])
def test_rules_hold_and_the_optimizer_moves_the_rest_as_if_there_were_none(changes: dict[str, Any], make: Any) -> None:
    ruled = MetaUpdate(start(), options(**changes) | {"rules": RULES})
    alone = MetaUpdate(start()[FREE], options(**changes))
    average = start()[10:20]
    for g in gradients():
        ruled.apply(g * TASKS, TASKS)
        alone.apply(g[FREE] * TASKS, TASKS)
        average = average + 0.25 * (g[10:20] - average)  # of the mean over tasks, and no weight decay
        torch.testing.assert_close(ruled.vector[10:20].detach(), average)
        # The sum, as it came.
        assert torch.equal(ruled.vector[30:45], (g * TASKS)[30:45])
        torch.testing.assert_close(ruled.vector[FREE], alone.vector)


def test_the_norm_and_its_clip_do_not_see_what_follows_a_rule() -> None:
    made = options(optimizer="sgd", lr=1.0, clip_norm=1.0) | {"rules": [(2, 3, AVERAGE), (3, 4, REPLACE)]}
    update = MetaUpdate(torch.zeros(4), made)
    assert update.apply(torch.tensor([3.0, 4.0, 1e6, -1e6]), 1)["grad_norm"] == pytest.approx(5.0)
    assert update.vector.tolist() == pytest.approx([-0.6, -0.8, 0.25e6, -1e6])


@pytest.mark.parametrize("at", [12, 33], ids=["average", "replace"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_follows_a_rule_and_is_not_finite_changes_nothing(at: int, bad: float) -> None:
    update = MetaUpdate(start(), options() | {"rules": RULES})
    update.apply(gradients()[0], TASKS)
    vector, state = update.vector.detach().clone(), update.state()
    poisoned = gradients()[1]
    poisoned[at] = bad
    with pytest.raises(FloatingPointError, match="average or carried state is not finite"):
        update.apply(poisoned, TASKS)
    assert update.version == 1 and torch.equal(update.vector, vector)
    assert all(torch.equal(v, state[k]) for k, v in update.state().items())


def test_what_was_replaced_comes_back_bit_for_bit_from_a_wider_sum() -> None:
    """Carried float32 numbers pass through a float64 vector where another meta-parameter is wider."""
    carried = torch.randn(15, generator=torch.Generator().manual_seed(1)) * torch.logspace(-30, 30, 15)
    update = MetaUpdate(torch.zeros(50, dtype=torch.float64), options() | {"rules": RULES})
    total = torch.zeros(50, dtype=torch.float64)
    total[30:45] += carried
    update.apply(total, TASKS)
    assert torch.equal(update.vector[30:45].float(), carried)


@pytest.mark.parametrize("changes", [c for c, _ in OPTIMIZERS], ids=["adam", "adamw", "sgd"])
def test_a_restored_update_with_rules_continues_bit_for_bit(changes: dict[str, Any]) -> None:
    made = options(clip_norm=20.0, **changes) | {"rules": RULES}
    whole, first, second = (MetaUpdate(start(), made) for _ in range(3))
    for g in gradients():
        whole.apply(g, TASKS)
    for g in gradients()[:3]:
        first.apply(g, TASKS)
    second.load(first.vector.detach(), first.state(), 3)
    for g in gradients()[3:]:
        second.apply(g, TASKS)
    assert torch.equal(second.vector, whole.vector)
