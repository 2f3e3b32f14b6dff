"""What every learner must be able to do; a new one gets these tests by being listed in ``learners.py``."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from metadist.algorithms import BUILT_IN, Algorithm, Moment
from metadist.algorithms.base import PRE, STEP
from metadist.config.algorithms import AlgorithmConfig
from metadist.config.load import family
from metadist.episode import EpisodeBatch
from metadist.inner import Tensors

from .learners import CASES, MODULES, QUERY, WAYS, episodes, learner_of

LISTED = pytest.mark.parametrize("name", CASES)


def moved(learner: Algorithm, seed: int = 1, scale: float = 0.1) -> Tensors:
    """Meta-parameters a little away from where they start, so that nothing is nought by chance."""
    generator = torch.Generator().manual_seed(seed)
    ruled = learner.update_rules()
    return {
        k: v if k in ruled else v + scale * torch.randn(v.shape, generator=generator, dtype=v.dtype)
        for k, v in learner.initial_meta_params().items()
    }


def flat(tensors: Tensors) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors.values()])


def relative(a: Tensors, b: Tensors) -> float:
    assert a.keys() == b.keys()
    return float((flat(a) - flat(b)).norm() / flat(b).norm())


def mean_query_loss(learner: Algorithm, meta_params: Tensors, batch: EpisodeBatch) -> float:
    """The summed loss on the query sets after adaptation, by way of ``adapt`` and ``predict`` alone."""
    total = 0.0
    for e in batch:
        adapted = learner.adapt(meta_params, e.support)
        total += float(learner.objective.loss(learner.predict(adapted, e.support, e.query.x), e.query.y))
    return total


def test_every_learner_of_the_config_is_listed() -> None:
    types = {str(m.model_fields["type"].default) for m in family(AlgorithmConfig)} - {"custom", "python"}
    assert types == set(BUILT_IN) == {case.type for case in CASES.values()}
    assert all(m.__doc__ for m in family(AlgorithmConfig))
    for type, algorithm in BUILT_IN.items():
        doc = " ".join(m.__doc__ or "" for m in algorithm.__mro__[:3])
        assert " 20" in doc, f"{type}: its docstring names no paper"


@LISTED
@pytest.mark.parametrize("model", ["smooth", "normed"])
def test_the_meta_gradient_is_the_slope_of_the_query_loss(name: str, model: str) -> None:
    case = CASES[name]
    if not case.exact:
        pytest.skip(f"{name} is an approximation by design")
    learner, batch = learner_of(case, model=model), episodes(3, kind=case.tasks)
    meta_params = moved(learner)
    gradient = learner.meta_gradient(meta_params, batch).gradient
    assert gradient.keys() == meta_params.keys()
    for seed in range(4):
        along = moved(learner, seed=10 + seed, scale=1.0)
        along = {k: along[k] - v for k, v in learner.initial_meta_params().items()}
        size, eps = flat(along).norm(), 1e-6

        def at(t: float) -> float:
            return mean_query_loss(learner, {k: v + t * along[k] / size for k, v in meta_params.items()}, batch)  # noqa: B023

        difference, slope = (at(eps) - at(-eps)) / (2 * eps), float(flat(gradient) @ flat(along) / size)
        assert difference == pytest.approx(slope, rel=1e-5, abs=1e-8)


@LISTED
@pytest.mark.parametrize("batchnorm", ["transductive", "inductive", "running", "stored"])
def test_strategies_agree(name: str, batchnorm: str) -> None:
    case = CASES[name]
    batch = episodes(3, kind=case.tasks)
    learners = {s: learner_of(case, s, "normed", batchnorm) for s in ("vectorised", "adjoint", "loop")}  # type: ignore[arg-type]
    meta_params = moved(learners["loop"])
    wanted = learners["loop"].meta_gradient(meta_params, batch)
    metric = learners["loop"].objective.metric
    assert {"loss", metric, PRE + "loss", PRE + metric} <= wanted.metrics.keys()
    assert float(flat(wanted.gradient).norm()) > 0
    for strategy in ("vectorised", "adjoint"):
        got = learners[strategy].meta_gradient(meta_params, batch)
        assert relative(got.gradient, wanted.gradient) < 1e-9
        for k, values in wanted.metrics.items():
            assert values.shape == (3,)
            torch.testing.assert_close(got.metrics[k], values, rtol=1e-9, atol=1e-10)
        judged, by_loop = (learners[s].evaluate(meta_params, batch) for s in (strategy, "loop"))
        for k, values in by_loop.items():
            torch.testing.assert_close(judged[k], values, rtol=1e-9, atol=1e-10)


@LISTED
def test_a_task_does_not_feel_its_neighbours(name: str) -> None:
    case = CASES[name]
    learner, tasks = learner_of(case, model="normed"), list(episodes(3, kind=case.tasks))
    meta_params = moved(learner)

    def run(*which: int) -> Tensors:
        learner.moment = Moment(place=which[0])
        return learner.meta_gradient(meta_params, EpisodeBatch.stack([tasks[i] for i in which])).gradient

    together, apart = run(0, 1, 2), [run(0), run(1), run(2)]
    assert relative(together, {k: sum(g[k] for g in apart) for k in together}) < 1e-9  # type: ignore[misc]


@LISTED
def test_its_loss_falls_on_a_task_of_its_own(name: str) -> None:
    case = CASES[name]
    learner = learner_of(case)
    params, judge = learner.initial_meta_params(), episodes(40, seed=99, kind=case.tasks)
    start = float(learner.evaluate(params, judge)["loss"].mean())
    rules = learner.update_rules()
    names = [k for k in params if k not in rules]
    held = [params[k].clone().requires_grad_() for k in names]
    optimizer = torch.optim.Adam(held, lr=case.learns.get("lr", 0.02))
    for step in range(case.learns.get("steps", 60)):
        params = {**params, **{k: h.detach() for k, h in zip(names, held, strict=True)}}
        learner.moment = Moment(version=step, seed=step)
        results = learner.meta_gradient(params, episodes(8, seed=step // learner.tasks_held_for, kind=case.tasks))
        params |= {k: results.gradient[k] for k, rule in rules.items() if rule.kind == "replace"}
        for k, h in zip(names, held, strict=True):
            h.grad = results.gradient[k] / 8
        optimizer.step()
    params = {**params, **{k: h.detach() for k, h in zip(names, held, strict=True)}}
    end = float(learner.evaluate(params, judge)["loss"].mean())
    assert end < 0.9 * start, f"{start:.3f} -> {end:.3f}"


@LISTED
def test_outputs_before_and_after_have_the_shape_of_the_task(name: str) -> None:
    case = CASES[name]
    learner, batch = learner_of(case), episodes(2, kind=case.tasks)
    before, after = learner.outputs(learner.initial_meta_params(), batch)
    assert before.shape == after.shape and before.shape[:2] == (2, WAYS * QUERY)
    assert torch.isfinite(before).all() and torch.isfinite(after).all()


@pytest.mark.parametrize("name", [n for n, c in CASES.items() if c.refused])
def test_bad_hyper_parameters_are_refused_by_name(name: str) -> None:
    case = CASES[name]
    (option,) = case.refused
    from dataclasses import replace

    with pytest.raises(ValueError, match=option):
        learner_of(replace(case, options={**case.options, **case.refused}))


assert MODULES


IN_STEPS = {"maml", "anil", "boil", "meta_sgd", "cavia", "protomaml"}
STEPPED = [name for name, case in CASES.items() if case.type in IN_STEPS and case.options.get("inner_steps", 1) > 1]


@pytest.mark.parametrize("name", STEPPED)
def test_the_curve_by_inner_step_is_what_fewer_steps_would_have_given(name: str) -> None:
    learner, batch = learner_of(CASES[name]), episodes(4)
    params, whole = moved(learner), learner.evaluation_inner_steps
    assert whole > 1
    found = learner.evaluate(params, batch)
    told = {k.partition("/")[0] for k in found if k.startswith(STEP)}
    assert told == {f"{STEP}{k}" for k in range(1, whole)}
    for k in range(1, whole):
        fewer = learner_of(CASES[name])
        fewer.inner_steps = fewer.evaluation_inner_steps = k
        wanted = fewer.evaluate(params, batch)
        for metric in ("loss", learner.objective.metric):
            torch.testing.assert_close(found[f"{STEP}{k}/{metric}"], wanted[metric], rtol=1e-9, atol=1e-12)
    assert float((found[f"{STEP}1/loss"] - found["loss"]).abs().min()) > 0
