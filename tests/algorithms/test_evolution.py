"""Evolution strategies: what they estimate, without bias, and what PES carries from one meta-update to the next."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metadist.algorithms import ES, PES, Algorithm, Moment, Plan, resolve_objective
from metadist.algorithms.persistent import RATES
from metadist.config import validate
from metadist.episode import EpisodeBatch, Examples
from metadist.errors import ConfigError, MetadistError
from metadist.experiment import Experiment
from metadist.inner import Engine, FunctionalModel, Tensors
from metadist.resolve import resolve
from metadist.worker import Round

from .learners import CASES, episodes, learner_of

STRATEGIES = ("vectorised", "adjoint", "loop")
TASKS = 8
CURVES = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)


class Point(nn.Module):
    """Three numbers to learn; the output for ``x`` is their distance from it, stretched: a quadratic bowl."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([1.0, -0.5, 0.3]))

    def forward(self, x: Tensor) -> Tensor:
        return (self.w - x) * CURVES.to(x).sqrt()


def half_square(output: Tensor, target: Tensor) -> Tensor:
    return 0.5 * (output - target).square().sum(-1).mean()


def bowls(count: int) -> EpisodeBatch:
    """``count`` times one task: support and query bowls with different bottoms."""
    generator = torch.Generator().manual_seed(5)
    support, query = (torch.randn(1, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    zero = torch.zeros(count, 1, 3, dtype=torch.float64)
    return EpisodeBatch(Examples(support.expand(count, 1, 3), zero), Examples(query.expand(count, 1, 3), zero), ())


def bound(algorithm: Algorithm, count: int) -> Algorithm:
    algorithm.plan = Plan(count, count)
    model = FunctionalModel(Point(), dtype=torch.float64)
    return algorithm.bind(model, resolve_objective(half_square, bowls(1).query.y, "auto"), Engine())


def within(samples: Tensor, wanted: Tensor, deviations: float = 4.0) -> bool:
    """Whether the mean of ``samples [N, D]`` lies so near ``wanted`` as chance allows, in each number."""
    error = samples.std(0) / len(samples) ** 0.5
    return bool(((samples.mean(0) - wanted).abs() < deviations * error).all())


def experiment(kind: str, **changes: Any) -> Experiment:
    own = {"inner_steps": 2, "horizon": 6} if kind == "pes" else {}
    sections: dict[str, Any] = {
        "name": "tiny", "tasks": {"type": "sinusoid"}, "model": {"type": "mlp", "hidden": [5]},
        "algorithm": {"type": kind, "pairs": 2, **own},
        "outer": {"steps": 8, "meta_batch_size": 6, "tasks_per_microbatch": 4},
        "runtime": {"type": "local"}, "evaluation": {"episodes": 4}, "checkpoint": {"every": 4},
        "tracking": {"console": False, "wandb": {"mode": "disabled"}},
    }  # fmt: skip
    for section, values in changes.items():
        sections[section] = {**sections[section], **values}
    return Experiment(validate(sections, "test"))


# --------------------------------------------------------------------------- ES


def es_estimates(learner: Algorithm, draws: int = 40) -> Tensor:
    params = learner.initial_meta_params()
    found = []
    for seed in range(draws):
        learner.moment = Moment(seed=seed)
        found.append(learner.meta_gradient(params, bowls(50)).gradient["w"] / 50)
    return torch.stack(found)


def slope_of_a_step(learner: ES) -> Tensor:
    """Of the query bowl after gradient steps on the support bowl; smoothing leaves a quadratic's gradient as it is."""
    w = learner.initial_meta_params()["w"].requires_grad_()
    batch, v = bowls(1), w
    for _ in range(learner.inner_steps):
        v = v - learner.inner_lr * CURVES * (v - batch.support.x[0, 0])
    loss = 0.5 * (CURVES * (v - batch.query.x[0, 0]).square()).sum()
    return torch.autograd.grad(loss, w)[0]


def test_es_is_unbiased_on_a_quadratic() -> None:
    learner = bound(ES(0.2, 3, sigma=0.5, pairs=2, loss=half_square), 50)
    assert within(es_estimates(learner), slope_of_a_step(learner))  # type: ignore[arg-type]


class WrongPower(ES):
    """Divides by sigma squared, which is right only where the noise has sigma in it."""

    def meta_gradient(self, meta_params: Tensors, batch: EpisodeBatch) -> Any:
        results = super().meta_gradient(meta_params, batch)
        return replace(results, gradient={k: g / self.sigma for k, g in results.gradient.items()})


class NoSign(ES):
    """Takes the losses of both signs as if they had one."""

    def noise(self, batch: EpisodeBatch, like: Tensors) -> Tensor:
        return super().noise(batch, like).abs()


@pytest.mark.parametrize("broken", [WrongPower, NoSign])
def test_the_check_of_bias_notices_one(broken: type[ES]) -> None:
    learner = bound(broken(0.2, 3, sigma=0.5, pairs=2, loss=half_square), 50)
    assert not within(es_estimates(learner), slope_of_a_step(learner))  # type: ignore[arg-type]


class Nearest(ES):
    """Adapts by the best of a few candidates and rounds it: nothing to differentiate."""

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Tensors:
        around = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
        losses = torch.stack([(self.model({"w": meta_params["w"] + a}, support.x) ** 2).sum() for a in around])
        best = around[losses.argmin()]
        return {"w": torch.round((meta_params["w"] + best) * 64) / 64}


class Branching(Nearest):
    """And takes a decision in Python, which cannot be vectorised."""

    def adapt(self, meta_params: Tensors, support: Examples, *, evaluation: bool = False) -> Tensors:
        adapted = super().adapt(meta_params, support)
        return adapted if float(adapted["w"].sum()) > -1e9 else meta_params


@pytest.mark.parametrize("kind", [Nearest, Branching])
def test_es_takes_an_adapt_that_has_no_derivative(kind: type[ES]) -> None:
    learner = bound(kind(sigma=0.3, pairs=4, loss=half_square), 4)
    learner.engine = Engine("adjoint" if kind is Branching else "vectorised")
    params = learner.initial_meta_params()
    start = float(learner.evaluate(params, bowls(1))["loss"])
    for step in range(40):
        learner.moment = Moment(step, seed=step)
        params = {"w": params["w"] - 0.1 * learner.meta_gradient(params, bowls(4)).gradient["w"] / 4}
    # A half of the way at least to the bottom of a bowl that the candidates are a step away from.
    assert float(learner.evaluate(params, bowls(1))["loss"]) < 0.5 * start


def test_a_regression_is_vectorised() -> None:
    for kind in ("es", "pes"):
        found = resolve(experiment(kind))
        assert found.experiment.config.engine.strategy == "vectorised", found.reason


# --------------------------------------------------------------------------- noise


@pytest.mark.parametrize("kind", ["es", "pes"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_noise_is_a_function_of_the_moment_alone(kind: str, strategy: str) -> None:
    learner, batch = learner_of(CASES[kind], strategy), episodes(3)  # type: ignore[arg-type]
    params = learner.initial_meta_params()

    def gradient(seed: int) -> Tensor:
        torch.manual_seed(int(torch.randint(1 << 30, ())))
        learner.moment = Moment(seed=seed)
        return learner.meta_gradient(params, batch).gradient["layers.0.weight"]

    assert torch.equal(gradient(1), gradient(1))
    assert not torch.equal(gradient(1), gradient(2))


# --------------------------------------------------------------------------- who holds which task for how long


@pytest.mark.parametrize("microbatches", [1, 3, 7])
def test_a_microbatch_starts_when_its_episodes_change(microbatches: int) -> None:
    held, changes = 4, set()
    for m in range(microbatches):
        before: range | None = None
        for version in range(20):
            now = Round("train", version, "train", "train", version * microbatches, microbatches, 1, held=held)
            starts = Moment(version, m, microbatches).starts(held)
            assert (now.episodes(m) != before) == starts
            before = now.episodes(m)
            changes |= {version} if starts and version else set()
    assert len(changes) > 5 or microbatches == 1


# --------------------------------------------------------------------------- PES


def pes_horizon(learner: PES, seed: int, batch: EpisodeBatch, forget: bool) -> Tensor:
    """The summed gradient of a horizon's truncations under one theta, ``[D + rates]``; ``forget``: truncated ES."""
    params = learner.initial_meta_params()
    total = torch.zeros(3 + 1, dtype=torch.float64)
    rules = learner.update_rules()
    for version in range(learner.tasks_held_for):
        if forget:
            params = {k: torch.zeros_like(v) if k.endswith("xi") else v for k, v in params.items()}
        learner.moment = Moment(version, seed=1000 * seed + version)
        gradient = learner.meta_gradient(params, batch).gradient
        total = total + torch.cat([gradient["w"], gradient[RATES]]) / len(batch)
        params = {**params, **{k: gradient[k] for k in rules}}
    return total


def slope_of_a_horizon(learner: PES, sigma: float) -> Tensor:
    """The same by autograd of the smoothed objective, whose expectation over the rate's noise many draws give.

    The losses are quadratic in the state but not in the rate, so that the noise in the rate matters.
    """
    batch, draws = bowls(1), 40_000
    generator = torch.Generator().manual_seed(8)
    params = learner.initial_meta_params()
    w, rate = params["w"].requires_grad_(), params[RATES].requires_grad_()
    s, total = w.expand(draws, 3), torch.zeros(())
    for _ in range(learner.tasks_held_for):
        noise = sigma * torch.randn(draws // 2, 1, generator=generator, dtype=torch.float64)
        noise = torch.cat([noise, -noise])
        for _ in range(learner.inner_steps):
            s = s - (rate + noise).exp() * CURVES * (s - batch.support.x[0, 0])
            loss = 0.5 * (CURVES * (s - batch.query.x[0, 0]).square()).sum(-1)
            total = total + loss.mean() / learner.inner_steps
    return torch.cat(torch.autograd.grad(total, [w, rate]))


def test_pes_is_unbiased_over_the_horizon_and_truncated_es_is_not() -> None:
    learner = bound(PES(0.1, 2, 8, sigma=0.1, pairs=1, loss=half_square), 400)
    assert isinstance(learner, PES)
    wanted, batch = slope_of_a_horizon(learner, 0.1), bowls(400)
    kept, forgotten = (torch.stack([pes_horizon(learner, s, batch, f) for s in range(30)]) for f in (False, True))
    assert within(kept, wanted)
    assert not within(forgotten, wanted)
    # What it misses is most of the slope, not a subtlety.
    assert float((forgotten.mean(0) - wanted).norm() / wanted.norm()) > 0.3


def test_the_particles_go_on_from_where_they_stood_and_begin_again_after_the_horizon() -> None:
    learner = learner_of(CASES["pes"])
    assert isinstance(learner, PES)
    params = learner.initial_meta_params()
    rules, xi = learner.update_rules(), "carried/0000/xi"
    norms = []
    for version in range(2 * learner.tasks_held_for):
        learner.moment = Moment(version, seed=version)
        gradient = learner.meta_gradient(params, episodes(TASKS)).gradient
        params |= {k: gradient[k] for k in rules}
        norms.append((float(params[xi][..., -4:].norm()), float(params[xi][..., :-4].norm())))
    held = learner.tasks_held_for
    rates, start = zip(*norms, strict=True)
    assert held == 3 and rates[0] < rates[1] and start[0] == start[1] == start[2] != start[3]
    # A sum of n draws is about sqrt(n) as long as one; after the horizon it is one again.
    assert rates[held - 1] / rates[0] == pytest.approx(held**0.5, rel=0.3)
    assert rates[held] / rates[0] == pytest.approx(1, rel=0.3)


def test_without_noise_in_between_particles_follow_plain_gradient_descent() -> None:
    """With a tiny sigma both signs end a horizon where an uninterrupted inner loop ends."""
    learner = learner_of(replace(CASES["pes"], options={**CASES["pes"].options, "sigma": 1e-9}))
    params, batch = learner.initial_meta_params(), episodes(TASKS)
    for version in range(learner.tasks_held_for):
        learner.moment = Moment(version, seed=version)
        params |= {k: v for k, v in learner.meta_gradient(params, batch).gradient.items() if k.startswith("carried/")}
    whole = learner.adapt(params, batch[2].support, evaluation=True)
    wanted = torch.cat([v.reshape(-1) for v in whole.values()])
    for side in ("plus", "minus"):
        torch.testing.assert_close(params[f"carried/0000/{side}"][2, 1], wanted, rtol=1e-6, atol=1e-6)


def test_microbatches_fill_their_own_places_and_leave_the_others_alone() -> None:
    learner = learner_of(CASES["pes"])
    learner.plan = Plan(5, 2)
    params = learner.initial_meta_params()
    assert [params[f"carried/{m:04d}/plus"].shape[0] for m in range(3)] == [2, 2, 1]
    learner.moment = Moment(microbatch=1, microbatches=3)
    gradient = learner.meta_gradient(params, episodes(2)).gradient
    for name, value in gradient.items():
        if name.startswith("carried/"):
            assert bool((value != 0).any()) == ("/0001/" in name)


def test_a_carried_minus_nought_has_one_form() -> None:
    learner = learner_of(CASES["pes"])
    assert isinstance(learner, PES)
    values = {part: torch.full((TASKS, 4, n), -0.0, dtype=torch.float64) for part, n in learner._widths().items()}
    assert not any(bool(torch.signbit(v).any()) for v in learner._handed_on(values).values())


# --------------------------------------------------------------------------- what is refused


def test_a_state_too_large_to_carry_is_refused() -> None:
    huge = experiment("pes", model={"hidden": [2000, 2000]}, algorithm={"pairs": 8})
    with pytest.raises(ConfigError, match=r"take 2\.3. GB to carry .* lower algorithm.pairs or outer.meta_batch_size"):
        huge.learner()


def test_a_horizon_of_broken_truncations_is_refused() -> None:
    with pytest.raises(MetadistError, match="horizon is 7; make it a multiple of inner_steps, 2"):
        experiment("pes", algorithm={"horizon": 7})
