"""Learners that read sequences: the memory against a hand-written one, the gradient, and what is reported."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metadist.algorithms.sequence import accuracy_by_instance, instances
from metadist.config import validate
from metadist.episode import EpisodeBatch, Examples
from metadist.errors import ConfigError
from metadist.evaluation import summarise
from metadist.experiment import Experiment
from metadist.inner import Engine, compiler_missing
from metadist.models.mann import MANN as Cell

from .learners import CASES, QUERY, SHOTS, WAYS, episodes, learner_of
from .test_contract import flat, moved, relative

SLOTS, WIDTH, HEADS, SIZE, INPUTS = 6, 4, 2, 3, 5
DECAY, SHARPNESS = 0.7, 1.5

# ------------------------------------------------------------------ least recently used access, by hand


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def control(w: dict[str, np.ndarray], x: np.ndarray, hidden: np.ndarray, c: np.ndarray, read: np.ndarray) -> Any:
    """The controller's next state: an LSTM that sees the last read, or a single layer."""
    before = w["from_inputs.weight"] @ x + w["from_inputs.bias"]
    if len(before) == SIZE:
        return np.tanh(before + w["from_state.weight"] @ read), c
    put_in, forget, put_out, candidate = (before + w["from_state.weight"] @ np.concatenate([hidden, read])).reshape(
        4, -1
    )
    c = sigmoid(forget) * c + sigmoid(put_in) * np.tanh(candidate)
    return sigmoid(put_out) * np.tanh(c), c


def by_hand(w: dict[str, np.ndarray], inputs: np.ndarray) -> list[dict[str, np.ndarray]]:
    """The network's steps as the paper writes them, one slot and one head at a time.

    Args:
        w: its weights by name.
        inputs: ``[steps, INPUTS]``.
    """
    memory = np.full((SLOTS, WIDTH), 1e-6)
    usage, read_weights = np.zeros(SLOTS), np.zeros((HEADS, SLOTS))
    h, c, last_read = np.zeros(SIZE), np.zeros(SIZE), np.zeros(HEADS * WIDTH)
    states = []
    for x in inputs:
        h, c = control(w, x, h, c, last_read)
        made = w["to_heads.weight"] @ h + w["to_heads.bias"]
        keys = np.tanh(made[: HEADS * WIDTH]).reshape(HEADS, WIDTH)
        gates = sigmoid(made[HEADS * WIDTH :])
        now = np.zeros((HEADS, SLOTS))
        read = []
        for r in range(HEADS):
            lengths = [(np.sqrt(keys[r] @ keys[r]) + 1e-4) * (np.sqrt(m @ m) + 1e-4) for m in memory]
            powers = np.exp([SHARPNESS * (keys[r] @ m) / n for m, n in zip(memory, lengths, strict=True)])
            now[r] = powers / powers.sum()
            read.append(sum(now[r, i] * memory[i] for i in range(SLOTS)))
        ranked = sorted(range(SLOTS), key=lambda i: (usage[i], i))
        least_used = np.array([1.0 if i in ranked[:HEADS] else 0.0 for i in range(SLOTS)])
        memory[ranked[0]] = 0
        write_weights = np.zeros((HEADS, SLOTS))
        for r in range(HEADS):
            for i in range(SLOTS):
                write_weights[r, i] = gates[r] * read_weights[r, i] + (1 - gates[r]) * least_used[i]
                memory[i] += write_weights[r, i] * keys[r]
        read_weights = now
        usage = DECAY * usage + read_weights.sum(0) + write_weights.sum(0)
        last_read = np.concatenate(read)
        states.append({"hidden": h, "memory": memory.copy(), "usage": usage.copy(),
                       "read_weights": read_weights.copy(), "read": last_read})  # fmt: skip
    return states


def cell(**options: Any) -> Cell:
    torch.manual_seed(0)
    sizes = {"controller_size": SIZE, "slots": SLOTS, "width": WIDTH, "read_heads": HEADS, "usage_decay": DECAY,
             "sharpness": SHARPNESS}  # fmt: skip
    made = Cell(INPUTS, 2, **{**sizes, **options}).double()
    for p in made.parameters():  # weights of a size at which every rule shows
        p.data = torch.randn_like(p)
    return made


@pytest.mark.parametrize("controller", ["lstm", "feedforward"])
def test_three_steps_of_the_memory_are_those_of_the_paper(controller: str) -> None:
    made, inputs = cell(controller=controller), torch.randn(3, INPUTS, dtype=torch.float64)
    state = None
    weights = {k: v.detach().numpy() for k, v in made.named_parameters()}
    for x, wanted in zip(inputs, by_hand(weights, inputs.numpy()), strict=True):
        _, state = made(x[None, None], state)
        for name, values in wanted.items():
            np.testing.assert_allclose(state[name][0].detach().numpy(), values, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("memory", ["lrua", "none"])
def test_whole_sequences_are_their_steps_one_by_one(memory: str) -> None:
    """The projection of all inputs at once, and outputs of all steps at once, change nothing."""
    made, x = cell(memory=memory), torch.randn(2, 7, INPUTS, dtype=torch.float64)
    whole, end = made(x)
    state, outputs = made.blank(x), []
    for t in range(7):
        state = made.step(made.from_inputs(x[:, t]), state)
        outputs.append(made.to_outputs(torch.cat([state[n] for n in ("hidden", "read") if n in state], -1)))
    torch.testing.assert_close(whole, torch.stack(outputs, 1), rtol=1e-12, atol=1e-12)
    for name, value in end.items():
        torch.testing.assert_close(value, state[name], rtol=1e-12, atol=1e-12)


def test_the_lstm_is_torch_s() -> None:
    made = cell(memory="none")
    lstm = torch.nn.LSTM(INPUTS, SIZE, batch_first=True).double()
    order = torch.cat([torch.arange(2 * SIZE), torch.arange(3 * SIZE, 4 * SIZE), torch.arange(2 * SIZE, 3 * SIZE)])
    assert made.from_state is not None
    lstm.weight_ih_l0.data, lstm.weight_hh_l0.data = made.from_inputs.weight[order], made.from_state.weight[order]
    lstm.bias_ih_l0.data, lstm.bias_hh_l0.data = made.from_inputs.bias[order], torch.zeros(4 * SIZE).double()
    x = torch.randn(2, 5, INPUTS, dtype=torch.float64)
    torch.testing.assert_close(made(x)[0], made.to_outputs(lstm(x)[0]), rtol=1e-10, atol=1e-10)


# ------------------------------------------------------------------ the learner


@pytest.mark.parametrize("name", ["mann", "mann feedforward", "mann without memory"])
def test_the_meta_gradient_is_the_slope_of_the_loss_of_all_steps(name: str) -> None:
    learner, batch = learner_of(CASES[name], model="smooth"), episodes(3, kind="sequence")
    meta_params = moved(learner)
    gradient = flat(learner.meta_gradient(meta_params, batch).gradient)
    along = moved(learner, seed=10, scale=1.0)
    along = {k: along[k] - v for k, v in learner.initial_meta_params().items()}
    size = flat(along).norm()

    def at(t: float) -> float:
        point = {k: v + t * along[k] / size for k, v in meta_params.items()}
        return float(learner.evaluate(point, batch)["loss"].sum())

    slope = (at(1e-6) - at(-1e-6)) / 2e-6
    assert slope == pytest.approx(float(gradient @ flat(along) / size), rel=1e-5)


@pytest.mark.parametrize("name", ["mann", "mann feedforward", "mann without memory"])
def test_the_first_query_is_answered_alike_in_use_and_in_the_sequence(name: str) -> None:
    learner, batch = learner_of(CASES[name]), episodes(4, kind="sequence")
    meta_params = moved(learner)
    outputs, _ = learner._answers(meta_params, batch.support, batch.query)  # type: ignore[attr-defined]
    assert outputs.shape == (4, WAYS * (SHOTS + QUERY), WAYS)
    _, after = learner.outputs(meta_params, batch)
    torch.testing.assert_close(after[:, 0], outputs[:, WAYS * SHOTS], rtol=1e-10, atol=1e-12)


def test_no_answer_depends_on_what_comes_after_it() -> None:
    learner, batch = learner_of(CASES["mann"]), episodes(1, kind="sequence")
    meta_params, length = moved(learner), WAYS * SHOTS
    whole, _ = learner._answers(meta_params, batch.support, batch.query)  # type: ignore[attr-defined]
    for t in range(length):
        # The label of step t is told at step t + 1, so answer t must not feel it.
        y = batch.support.y.clone()
        y[:, t] = (y[:, t] + 1) % WAYS
        other, _ = learner._answers(meta_params, batch.support._replace(y=y), batch.query)  # type: ignore[attr-defined]
        torch.testing.assert_close(other[:, : t + 1], whole[:, : t + 1], rtol=0, atol=0)
        assert not torch.allclose(other[:, t + 1 :], whole[:, t + 1 :])


@pytest.mark.skipif(bool(compiler_missing()), reason=f"cannot compile: {compiler_missing()}")
@pytest.mark.parametrize("compile", ["trace", pytest.param(True, marks=pytest.mark.slow)])
def test_traced_and_compiled_equal_eager(compile: bool | str) -> None:
    batch = episodes(2, kind="sequence")
    short = EpisodeBatch(*(Examples(s.x[:, :1], s.y[:, :1]) for s in (batch.support, batch.query)))
    learner = learner_of(CASES["mann"])
    meta_params = moved(learner)
    eager = learner.meta_gradient(meta_params, short)
    learner.engine = Engine("vectorised", compile=compile)  # type: ignore[arg-type]
    for _ in range(2):
        fast = learner.meta_gradient(meta_params, short)
        assert relative(fast.gradient, eager.gradient) < 1e-10
        torch.testing.assert_close(fast.metrics, eager.metrics, rtol=1e-10, atol=1e-12, equal_nan=True)
    assert len(learner.engine._programs["sequences"]._programs) == 1


# ------------------------------------------------------------------ by instance


def test_instances_are_counted_by_class() -> None:
    y = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 1, 1, 0, 0, 0]])
    assert instances(y).tolist() == [[1, 1, 2, 3, 2, 3], [1, 2, 3, 1, 2, 3]]
    letters = torch.tensor([[[0, 4], [4, 0], [0, 4], [0, 0]]])
    assert instances(letters).tolist() == [[1, 1, 2, 1]]


def test_accuracy_by_instance_is_that_of_the_steps_it_names() -> None:
    y = torch.tensor([[0, 1, 0, 0, 1, 1]])
    said = torch.tensor([[1, 1, 0, 0, 0, 1]])
    found = accuracy_by_instance(torch.nn.functional.one_hot(said).double(), y)
    assert {k: v.tolist() for k, v in found.items()} == {
        "accuracy_instance_1": [0.5], "accuracy_instance_2": [0.5], "accuracy_instance_3": [1.0],
    }  # fmt: skip


def test_the_evaluation_gathers_them() -> None:
    metrics = {"accuracy": np.array([0.5, 1.0]), "accuracy_instance_1": np.array([0.2, 0.4]),
               "accuracy_instance_2": np.array([1.0, 1.0])}  # fmt: skip
    summary = summarise(metrics, "accuracy", "test", "none")
    assert summary["by_instance"].keys() == {"1", "2"}
    assert summary["by_instance"]["1"]["mean"] == pytest.approx(0.3)
    assert summary["by_instance"]["1"]["ci95"] == pytest.approx(1.96 * 0.1 * 2**0.5 / 2**0.5)
    assert "by_instance" not in summarise({"accuracy": np.ones(3)}, "accuracy", "test", "none")


# ------------------------------------------------------------------ what the tasks must be like


def experiment(algorithm: str, **tasks: Any) -> Experiment:
    sections = {"tasks": {"type": "glyphs", "ways": 3, **tasks}, "model": {"type": "flatten", "size": 4},
                "algorithm": {"type": algorithm}, "outer": {"steps": 1}, "engine": {"compile": False}}  # fmt: skip
    return Experiment(validate(sections, "test"))


@pytest.mark.parametrize(("algorithm", "order"), [("mann", "by_class"), ("mann", "within_sets"), ("snail", "by_class")])
def test_an_order_that_tells_the_class_is_refused(algorithm: str, order: str) -> None:
    mend = {"mann": "shuffled", "snail": "within_sets"}[algorithm]
    with pytest.raises(ConfigError, match=rf"tasks\.order: is {order}, .*; write tasks\.order: {mend}$"):
        experiment(algorithm, order=order).learner()


@pytest.mark.parametrize("algorithm", ["protonet", "matchingnet"])
def test_letters_are_refused_by_learners_that_need_class_numbers(algorithm: str) -> None:
    with pytest.raises(ConfigError, match="whole-number targets, one an example"):
        experiment(algorithm, labels="letters").learner()


@pytest.mark.parametrize("algorithm", ["mann", "snail"])
def test_letters_are_read_and_written(algorithm: str) -> None:
    made = experiment(algorithm, order="shuffled", labels="letters", shots=2)
    learner = made.learner()
    batch = made.source("train").episodes(0, "train", [0, 1])
    results = learner.meta_gradient(learner.initial_meta_params(), batch)
    before, after = learner.outputs(learner.initial_meta_params(), batch)
    assert before.shape == after.shape == (2, 3, 25)
    assert all(torch.isfinite(v).all() for v in _all(results.gradient, results.metrics))


def _all(*groups: dict[str, Tensor]) -> list[Tensor]:
    return [v for group in groups for v in group.values()]


@pytest.mark.parametrize("algorithm", ["mann", "snail"])
def test_numbers_are_read_and_written(algorithm: str) -> None:
    sections = {"tasks": {"type": "sinusoid", "shots": 3, "query_shots": 2}, "model": {"type": "mlp", "hidden": [4]},
                "algorithm": {"type": algorithm}, "engine": {"compile": False}}  # fmt: skip
    made = Experiment(validate(sections, "test"))
    learner, batch = made.learner(), made.source("train").episodes(0, "train", [0, 1])
    results = learner.meta_gradient(learner.initial_meta_params(), batch)
    assert learner.outputs(learner.initial_meta_params(), batch)[1].shape == (2, 2, 1)
    assert results.metrics["mean_squared_error"].shape == (2,)
    assert not any(name.startswith("accuracy") for name in results.metrics)
