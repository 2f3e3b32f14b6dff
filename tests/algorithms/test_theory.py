"""Where theory says what a learner's meta-gradient is, and where two learners must be one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metadist.algorithms import (
    IMAML,
    MAML,
    Moment,
)
from metadist.algorithms.imaml import RESIDUAL, conjugate_gradient
from metadist.algorithms.mamlpp import step_weights
from metadist.algorithms.reptile import minibatch
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Tensors

from .learners import Case, episodes, learner_of
from .test_contract import flat, mean_query_loss, moved, relative

LR = 0.1


def gradient_of(
    type: str, meta_params: Tensors | None = None, batch: EpisodeBatch | None = None, **options: object
) -> Tensors:
    learner = learner_of(Case(type, options), model="smooth")
    return learner.meta_gradient(meta_params, batch).gradient


def least_squares() -> EpisodeBatch:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> Examples:
        return Examples(*(torch.randn(3, n, d, generator=generator, dtype=torch.float64) for d in (4, 1)))

    return EpisodeBatch(draw(6), draw(5))


def linear(algorithm: MAML) -> MAML:
    from metadist.algorithms import resolve_objective
    from metadist.inner import Engine, FunctionalModel

    torch.manual_seed(0)
    model = FunctionalModel(nn.Sequential(nn.Linear(4, 1, bias=False)), dtype=torch.float64)
    algorithm.bind(model, resolve_objective("mse", torch.zeros(1, 1)), Engine())
    return algorithm


# --------------------------------------------------------------------------- one is a special case of the other


def test_meta_sgd_with_constant_rates_is_maml_and_its_rates_have_the_gradients_of_theory() -> None:
    batch = episodes(3)
    maml, sgd = (learner_of(Case(t, {"inner_lr": LR, "inner_steps": 1}), model="smooth") for t in ("maml", "meta_sgd"))
    start = moved(maml)
    rates = {k: torch.full_like(v, LR) for k, v in start.items()}
    got = sgd.meta_gradient({**start, **{f"inner_lr/{k}": v for k, v in rates.items()}}, batch).gradient
    assert relative({k: got[k] for k in start}, maml.meta_gradient(start, batch).gradient) < 1e-12
    # One step: d L_query / d alpha = -grad L_support(theta) * grad L_query(theta').
    wanted = {k: torch.zeros_like(v) for k, v in start.items()}
    for e in batch:
        adapted = maml.adapt(start, e.support)
        slopes = []
        for params, examples in ((start, e.support), (adapted, e.query)):
            leaves = {k: v.detach().requires_grad_() for k, v in params.items()}
            loss = maml.objective.loss(maml.model(leaves, examples.x), examples.y)
            slopes.append(torch.autograd.grad(loss, list(leaves.values())))
        for k, a, b in zip(start, *slopes, strict=True):
            wanted[k] -= a * b
    assert relative({k: got[f"inner_lr/{k}"] for k in start}, wanted) < 1e-10


@pytest.mark.parametrize("optimizer", ["sgd", "momentum"])
def test_a_rate_for_so_many_examples_is_in_proportion_to_their_number(optimizer: str) -> None:
    start, batch = moved(learner_of(Case("maml", {}), model="smooth")), episodes(3)
    count = batch.support.y.shape[1]
    options = {"inner_steps": 2, "inner_optimizer": {"type": optimizer}}
    got = gradient_of("maml", start, batch, inner_lr=LR, inner_lr_for=2 * count, **options)
    assert relative(got, gradient_of("maml", start, batch, inner_lr=LR / 2, **options)) < 1e-10


@pytest.mark.parametrize(("type", "still"), [("anil", "first"), ("boil", "last")])
@pytest.mark.parametrize("steps", [1, 3])
def test_anil_and_boil_are_maml_with_a_rate_of_nought_elsewhere(type: str, still: str, steps: int) -> None:
    sgd = learner_of(Case("meta_sgd", {"inner_steps": steps}), model="smooth")
    some = learner_of(Case(type, {"inner_lr": LR, "inner_steps": steps}), model="smooth")
    start, batch = moved(some), episodes(3)
    rates = {f"inner_lr/{k}": torch.full_like(v, 0.0 if k.startswith(still) else LR) for k, v in start.items()}
    wanted = sgd.meta_gradient({**start, **rates}, batch).gradient
    assert relative(some.meta_gradient(start, batch).gradient, {k: wanted[k] for k in start}) < 1e-10
    adapted = some.adapt(start, batch[0].support)
    assert {k for k in start if torch.equal(adapted[k], start[k])} == {k for k in start if k.startswith(still)}


def test_mamlpp_with_all_parts_off_is_maml() -> None:
    off = {"learned_rates": False, "multi_step_loss_updates": 0, "per_step_norm": False}
    for model in ("smooth", "normed"):
        maml, plus = (
            learner_of(Case(t, {"inner_lr": LR, "inner_steps": 3, **o}), model=model)
            for t, o in (("maml", {}), ("mamlpp", off))
        )
        start, batch = moved(maml), episodes(3)
        assert relative(plus.meta_gradient(start, batch).gradient, maml.meta_gradient(start, batch).gradient) < 1e-12


def test_each_part_of_mamlpp_adds_what_it_says() -> None:
    off = {"inner_steps": 3, "learned_rates": False, "multi_step_loss_updates": 0, "per_step_norm": False}
    names = {
        part: learner_of(Case("mamlpp", {**off, part: value}), model="normed").initial_meta_params()
        for part, value in (("learned_rates", True), ("per_step_norm", True), ("first_order_updates", 2))
    }
    plain = learner_of(Case("maml", {"inner_steps": 3}), model="normed").initial_meta_params()
    assert {k: v.shape for k, v in names["first_order_updates"].items()} == {k: v.shape for k, v in plain.items()}
    rates = names["learned_rates"].keys() - plain.keys()
    assert rates == {"inner_lr/first", "inner_lr/norm", "inner_lr/last"}
    assert all(names["learned_rates"][k].shape == (3,) for k in rates)
    assert names["per_step_norm"].keys() == plain.keys()
    assert names["per_step_norm"]["norm.weight"].shape == (4, 6), "one row for each step and one for the query"


def test_the_order_of_mamlpp_derivatives_changes_at_its_time() -> None:
    options = {"inner_lr": LR, "inner_steps": 2, "learned_rates": False, "multi_step_loss_updates": 0,
               "per_step_norm": False}  # fmt: skip
    plus = learner_of(Case("mamlpp", {**options, "first_order_updates": 5}), model="smooth")
    start, batch = moved(plus), episodes(3)
    for version, first_order in ((4, True), (5, False)):
        plus.moment = Moment(version)
        wanted = gradient_of("maml", start, batch, inner_lr=LR, inner_steps=2, first_order=first_order)
        assert relative(plus.meta_gradient(start, batch).gradient, wanted) < 1e-12


@pytest.mark.parametrize("strategy", ["vectorised", "adjoint", "loop"])
@pytest.mark.parametrize("version", [0, 3, 10])
def test_the_multi_step_loss_is_the_weighted_sum_over_steps(version: int, strategy: str) -> None:
    options = {"inner_lr": LR, "inner_steps": 3, "learned_rates": False, "per_step_norm": False,
               "multi_step_loss_updates": 10}  # fmt: skip
    plus = learner_of(Case("mamlpp", options), strategy, model="smooth")  # type: ignore[arg-type]
    plus.moment = Moment(version)
    start, batch = moved(plus), episodes(3)
    wanted = {k: torch.zeros_like(v) for k, v in start.items()}
    for k, weight in enumerate(step_weights(3, version, 10).tolist(), 1):
        part = gradient_of("maml", start, batch, inner_lr=LR, inner_steps=k)
        wanted = {name: wanted[name] + weight * part[name] for name in wanted}
    assert relative(plus.meta_gradient(start, batch).gradient, wanted) < 1e-7  # the weights are made in float32


def test_step_weights_go_from_the_mean_to_the_last() -> None:
    assert step_weights(4, 0, 100).tolist() == pytest.approx([0.25] * 4)
    assert step_weights(4, 50, 100).tolist() == pytest.approx([0.125] * 3 + [0.625])
    assert step_weights(4, 100, 100).tolist() == step_weights(4, 7, 0).tolist() == [0, 0, 0, 1]


def test_protomaml_before_its_first_step_is_a_prototypical_network() -> None:
    proto = learner_of(Case("protomaml", {"inner_lr": LR}), model="smooth")
    net = learner_of(Case("protonet"), model="smooth")
    start, e = moved(proto), episodes(1)[0]
    scores = proto.predict_unadapted(start, e.support, e.query.x, evaluation=True)
    distances = net.predict(net.adapt(start, e.support), e.support, e.query.x)[:, :3]
    torch.testing.assert_close(torch.log_softmax(scores, -1), torch.log_softmax(distances, -1))


def test_cavia_on_the_first_layer_is_a_further_input() -> None:
    """Shifting the first layer by W c is feeding it c through W: the adapted outputs of both are one."""
    learner = learner_of(Case("cavia", {"inner_lr": 0.5, "inner_steps": 2, "context_size": 2}), model="smooth")
    start, e = moved(learner), episodes(1)[0]
    adapted = learner.adapt(start, e.support)
    wide = torch.cat([start["module.first.weight"], start["modulate.weight"]], 1)
    context = adapted["context"].expand(len(e.query.x), -1)
    hidden = torch.tanh(torch.cat([e.query.x, context], 1) @ wide.T + start["module.first.bias"])
    wanted = hidden @ start["module.last.weight"].T + start["module.last.bias"]
    torch.testing.assert_close(learner.predict(adapted, e.support, e.query.x), wanted)
    assert {k for k in start if not torch.equal(adapted[k], start[k])} == set()
    assert float(adapted["context"].norm()) > 0


# --------------------------------------------------------------------------- reptile


def test_one_step_of_reptile_is_the_support_gradient() -> None:
    learner = learner_of(Case("reptile", {"inner_lr": LR, "inner_steps": 1}), model="smooth")
    start, batch = moved(learner), episodes(3)
    wanted = {k: torch.zeros_like(v) for k, v in start.items()}
    for e in batch:
        leaves = {k: v.detach().requires_grad_() for k, v in start.items()}
        loss = learner.objective.loss(learner.model(leaves, e.support.x), e.support.y)
        for k, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
            wanted[k] += g
    assert relative(learner.meta_gradient(start, batch).gradient, wanted) < 1e-10


def test_reptile_points_to_the_adapted_parameters() -> None:
    learner = learner_of(Case("reptile", {"inner_lr": LR, "inner_steps": 4}), model="smooth")
    start, batch = moved(learner), episodes(1)
    adapted = learner.adapt(start, batch[0].support)
    got = learner.meta_gradient(start, batch).gradient
    assert relative({k: start[k] - 4 * LR * got[k] for k in start}, adapted) < 1e-12


def test_minibatches_go_round_all_examples_and_all_classes() -> None:
    y = torch.arange(5).repeat_interleave(4)
    seen = [minibatch(Examples(torch.arange(20), y), 5, k) for k in range(8)]
    for first in (0, 4):
        assert sorted(torch.cat([b.x for b in seen[first : first + 4]]).tolist()) == list(range(20))
    assert all(b.y.tolist() == [0, 1, 2, 3, 4] for b in seen), "one of each class in every batch"


# --------------------------------------------------------------------------- implicit gradients


def test_conjugate_gradient_solves_in_as_many_steps_as_there_are_dimensions() -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    a, b = a @ a.T + torch.eye(6, dtype=torch.float64), torch.randn(6, generator=generator, dtype=torch.float64)
    residuals = []
    for steps in (1, 3, 6):
        x, residual = conjugate_gradient(lambda v: {"x": a @ v["x"]}, {"x": b}, steps)
        assert float(residual) == pytest.approx(float((b - a @ x["x"]).norm() / b.norm()), abs=1e-12)
        residuals.append(float(residual))
    assert residuals[0] > residuals[1] > residuals[2] and residuals[2] < 1e-10
    torch.testing.assert_close(x["x"], torch.linalg.solve(a, b))


def test_imaml_comes_to_the_exact_gradient_as_its_steps_grow() -> None:
    """Ridge regression: phi* has a closed form, so has the derivative of the query loss through it."""
    batch, pull = least_squares(), 2.0
    start = linear(IMAML()).initial_meta_params()
    theta, wanted = start["0.weight"].numpy()[0], np.zeros(4)
    for e in batch:
        (xs, ys), (xq, yq) = ((s.x.numpy(), s.y.numpy()[:, 0]) for s in (e.support, e.query))
        hessian = 2 / 6 * xs.T @ xs
        best = np.linalg.solve(hessian + pull * np.eye(4), 2 / 6 * xs.T @ ys + pull * theta)
        wanted += np.linalg.solve(np.eye(4) + hessian / pull, 2 / 5 * xq.T @ (xq @ best - yq))
    errors, residuals = [], []
    for cg_steps in (1, 2, 4):
        learner = linear(IMAML(inner_lr=0.1, inner_steps=400, proximity=pull, cg_steps=cg_steps))
        got = learner.meta_gradient(start, batch)
        errors.append(np.linalg.norm(got.gradient["0.weight"].numpy()[0] - wanted) / np.linalg.norm(wanted))
        residuals.append(float(got.metrics[RESIDUAL].max()))
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-8
    assert residuals[0] > residuals[1] > residuals[2] and residuals[2] < 1e-8


def test_imaml_is_the_gradient_through_a_long_proximal_loop() -> None:
    """On a network, against central differences of the loss at the inner minimum."""
    learner = learner_of(Case("imaml", {"inner_lr": 0.2, "inner_steps": 300, "cg_steps": 30}), model="smooth")
    start, batch = moved(learner), episodes(2)
    results = learner.meta_gradient(start, batch)
    assert float(results.metrics[RESIDUAL].max()) < 1e-6
    along = moved(learner, seed=5, scale=1.0)
    along = {k: along[k] - v for k, v in learner.initial_meta_params().items()}
    eps = 1e-5
    up, down = ({k: v + t * along[k] for k, v in start.items()} for t in (eps, -eps))
    difference = (mean_query_loss(learner, up, batch) - mean_query_loss(learner, down, batch)) / (2 * eps)
    assert difference == pytest.approx(float(flat(results.gradient) @ flat(along)), rel=1e-4)


# --------------------------------------------------------------------------- BatchNorm


def normed(mode: str, type: str = "maml", **options: object) -> tuple[MAML, Tensors, EpisodeBatch]:
    learner = learner_of(Case(type, options), model="normed", batchnorm=mode)
    return learner, moved(learner), episodes(2)  # type: ignore[return-value]


@pytest.mark.parametrize("type", ["maml", "anil", "mamlpp", "protonet", "matchingnet", "protomaml"])
@pytest.mark.parametrize(("mode", "alone"), [("transductive", False), ("inductive", True), ("running", True)])
def test_whether_query_examples_are_judged_alone(type: str, mode: str, alone: bool) -> None:
    learner, params, batch = normed(mode, type)
    e = batch[0]
    adapted = learner.adapt(params, e.support, evaluation=True)
    together = learner.predict(adapted, e.support, e.query.x, evaluation=True)
    apart = torch.cat([learner.predict(adapted, e.support, e.query.x[i : i + 2], evaluation=True) for i in (0, 2, 4)])
    assert torch.allclose(together, apart) == alone


def test_inductive_normalises_by_the_support_set() -> None:
    learner, params, batch = normed("inductive")
    e, p = batch[0], params
    hidden_s, hidden_q = (s @ p["first.weight"].T + p["first.bias"] for s in (e.support.x, e.query.x))
    mean, var = hidden_s.mean(0), hidden_s.var(0, correction=0)
    norm = (hidden_q - mean) / torch.sqrt(var + 1e-5) * p["norm.weight"] + p["norm.bias"]
    wanted = torch.tanh(norm) @ p["last.weight"].T + p["last.bias"]
    torch.testing.assert_close(learner.predict_unadapted(p, e.support, e.query.x, evaluation=False), wanted)


def test_running_statistics_are_observed_step_by_step() -> None:
    """Row k: of the support set under theta_k; the last row: of the query set under theta_K."""
    learner, params, batch = normed("running", inner_lr=LR, inner_steps=2)
    gradient = learner.meta_gradient(params, batch).gradient
    wanted = torch.zeros(3, 6, dtype=torch.float64)
    for e in batch:
        for k, x in ((0, e.support.x), (1, e.support.x), (2, e.query.x)):
            partial = learner_of(Case("maml", {"inner_lr": LR, "inner_steps": max(k, 1)}), model="normed")
            start = {name: v for name, v in params.items() if "running" not in name}
            theta = partial.adapt(start, e.support) if k else start
            wanted[k] += (x @ theta["first.weight"].T + theta["first.bias"]).mean(0)
    torch.testing.assert_close(gradient["norm.running_mean"], wanted)
    rules = learner.update_rules()
    assert {k: (r.kind, r.rate) for k, r in rules.items()} == {
        "norm.running_mean": ("average", 0.1), "norm.running_var": ("average", 0.1),
    }  # fmt: skip


def test_running_statistics_rule_in_evaluation_alone() -> None:
    learner, params, batch = normed("running", inner_lr=LR)
    shifted = {k: v + 3 if "running_mean" in k else v for k, v in params.items()}
    a, b = (learner.meta_gradient(p, batch) for p in (params, shifted))
    assert torch.equal(a.metrics["loss"], b.metrics["loss"])
    c, d = (learner.evaluate(p, batch) for p in (params, shifted))
    assert not torch.allclose(c["loss"], d["loss"])


def test_per_step_norm_weights_learn_from_the_step_they_serve() -> None:
    learner, params, batch = normed("transductive", "mamlpp", inner_lr=LR, inner_steps=2, multi_step_loss_updates=0)
    gradient = learner.meta_gradient(params, batch).gradient["norm.weight"]
    assert gradient.shape == (3, 6) and bool((gradient.abs().sum(1) > 0).all())


# --------------------------------------------------------------------------- metric learners


@pytest.mark.parametrize("type", ["protonet", "matchingnet"])
def test_the_order_of_the_support_set_does_not_matter(type: str) -> None:
    learner = learner_of(Case(type), model="smooth")
    params, e = moved(learner), episodes(1)[0]
    order = torch.randperm(len(e.support.x), generator=torch.Generator().manual_seed(0))
    shuffled = Examples(e.support.x[order], e.support.y[order])
    a, b = (learner.predict(learner.adapt(params, s), s, e.query.x) for s in (e.support, shuffled))
    torch.testing.assert_close(a, b)


def test_protonet_scores_are_minus_squared_distances_to_class_means() -> None:
    learner = learner_of(Case("protonet"), model="smooth")
    params, e = moved(learner), episodes(1)[0]
    scores = learner.predict(learner.adapt(params, e.support), e.support, e.query.x)
    embed = lambda x: learner.model(params, x)  # noqa: E731
    for n in range(3):
        mean = embed(e.support.x)[e.support.y == n].mean(0)
        torch.testing.assert_close(scores[:, n], -((embed(e.query.x) - mean) ** 2).sum(1))
    assert bool((scores[:, 3:] < -1e8).all()), "classes there are none of"


def test_matchingnet_gives_probabilities() -> None:
    learner = learner_of(Case("matchingnet"), model="smooth")
    params, e = moved(learner), episodes(1)[0]
    out: Tensor = learner.predict(learner.adapt(params, e.support), e.support, e.query.x)
    torch.testing.assert_close(out.exp().sum(1), torch.ones(6, dtype=torch.float64), atol=1e-6, rtol=0)
