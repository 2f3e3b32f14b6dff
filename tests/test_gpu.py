"""On a GPU: the answers of the CPU, the same bits each time, and recordings that follow what they are given."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from metadist.algorithms import MAML, resolve_objective
from metadist.benchmark import EngineBench
from metadist.config import validate
from metadist.device import make_repeatable
from metadist.experiment import Experiment
from metadist.inner import Engine, FunctionalModel, compiler_missing, replay
from metadist.inner.program import Compile, Program
from metadist.models import Conv4, ResNet12
from metadist.rounds import Lease
from metadist.rundir import RunDirectory
from metadist.training import resume, train
from metadist.worker import MetaWorker, training_round
from tests.algorithms.learners import CASES, episodes, learner_of
from tests.inner.test_modules import Forked, Transformer, batch, running_statistics

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def repeatable() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    make_repeatable(GPU)
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every recording that is made."""
    made: list[Any] = []

    class Spied(replay._Replayed):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(replay, "_Replayed", Spied)
    return made


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("compile", [False, "trace"])
@pytest.mark.parametrize("name", CASES)
def test_every_learner_has_the_gradient_and_the_metrics_of_the_cpu(name: str, compile: Compile) -> None:
    case = CASES[name]
    found, wanted = [], []
    for device, results, form in ((GPU, found, compile), (torch.device("cpu"), wanted, False)):
        learner = learner_of(case, device=str(device), compile=form)
        params = learner.initial_meta_params()
        tasks = episodes(3, kind=case.tasks).to(device)
        for scale in (1.0, 1.1):  # the second time with other parameters: what was recorded must follow
            torch.manual_seed(0)
            done = learner.meta_gradient({k: scale * v for k, v in params.items()}, tasks)
            results.append((done.gradient, done.metrics, learner.evaluate(params, tasks)))
    for some, others in zip(found, wanted, strict=True):
        for a, b in zip(some, others, strict=True):
            close(a, b, 1e-7)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "conv4": lambda: Conv4(1, 3, filters=8, downsample="max_pool", image_size=(16, 16)),
    "resnet12": lambda: ResNet12(1, 3, widths=(8,)),
    "transformer": Transformer,
    "running statistics": running_statistics,
}


def learn(module: nn.Module, engine: Engine, device: torch.device, dtype: torch.dtype = torch.float64) -> Any:
    learner = MAML(inner_lr=0.05, inner_steps=2)
    learner.bind(FunctionalModel(module, device, dtype), resolve_objective("auto", batch().query.y[0]), engine)
    return learner.meta_gradient(learner.initial_meta_params(), batch().to(device, dtype))


@pytest.mark.parametrize("form", ["vectorised", "trace", "compiled", "adjoint", "loop"])
@pytest.mark.parametrize("name", MODELS)
def test_every_strategy_has_the_gradient_of_the_loop_on_a_cpu(name: str, form: str, recorded: list[Any]) -> None:
    if form == "compiled" and compiler_missing():
        pytest.skip(compiler_missing())
    torch.manual_seed(0)
    module = MODELS[name]().double()
    module(batch().query.x[0])  # some layers take their sizes from what they see first
    engines = {
        "vectorised": Engine(), "trace": Engine("vectorised", "trace"), "compiled": Engine("vectorised", True),
        "adjoint": Engine("adjoint"), "loop": Engine("loop"),
    }  # fmt: skip
    found = learn(module, engines[form], GPU).gradient
    close(found, learn(module, Engine("loop"), torch.device("cpu")).gradient)
    assert bool(recorded) == (form in ("trace", "compiled"))


@pytest.mark.parametrize("form", [False, "trace"])
def test_two_calls_have_the_same_bits(form: Compile) -> None:
    torch.manual_seed(0)
    module = MODELS["conv4"]()
    found = [learn(module, Engine("vectorised", form), GPU, torch.float32).gradient for _ in range(3)]
    for other in found[1:]:
        assert all(torch.equal(other[k], v) for k, v in found[0].items())


def test_what_branches_on_values_is_computed_task_by_task() -> None:
    torch.manual_seed(0)
    module = Forked().double()
    close(learn(module, Engine("adjoint"), GPU).gradient, learn(module, Engine("loop"), torch.device("cpu")).gradient)


def test_a_recording_follows_its_inputs_and_leaves_what_it_gave_before(recorded: list[Any]) -> None:
    program = Program(lambda a, b: {"sum": a + b.sum(0)}, inductor=False, recompute=False)
    a, b = torch.randn(4, device=GPU), torch.randn(3, 4, device=GPU)
    first = program(a, b)["sum"]
    kept = first.clone()
    second = program(2 * a, b)["sum"]
    assert len(recorded) == 1
    torch.testing.assert_close(second, 2 * a + b.sum(0))
    assert torch.equal(first, kept)
    program(torch.randn(5, device=GPU), torch.randn(2, 5, device=GPU))
    assert len(recorded) == 2
    torch.testing.assert_close(program(a, b)["sum"], first)


def test_what_cannot_be_recorded_runs_all_the_same(caplog: pytest.LogCaptureFixture, recorded: list[Any]) -> None:
    def waits(x: Tensor) -> list[Tensor]:
        return [x * float(x.sum().item() > 0)]

    x = torch.ones(3, device=GPU)
    with caplog.at_level(logging.WARNING):
        program = replay.replayed(waits, [x])
    assert "cannot be recorded as a CUDA graph" in caplog.text
    assert not recorded
    assert program(x)[0].tolist() == [1, 1, 1]
    assert program(-x)[0].tolist() == [0, 0, 0]


def test_products_are_rounded_only_where_the_config_says_so() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(512, 512, device=GPU), torch.randn(512, 512, device=GPU)
    exact = a.double() @ b.double()

    def error() -> float:
        return float(((a @ b).double() - exact).norm() / exact.norm())

    assert error() < 1e-5
    make_repeatable(GPU, tf32=True)
    assert 1e-5 < error() < 1e-2


def config(**changes: Any) -> Any:
    return validate(
        {
            "name": "gpu",
            "tasks": {"type": "glyphs", "ways": 5, "shots": 1, "query_shots": 5},
            "model": {"type": "conv4", "filters": 8},
            "algorithm": {"type": "maml", "inner_lr": 0.1, "inner_steps": 2},
            "outer": {"steps": 6, "meta_batch_size": 4, "tasks_per_microbatch": 2},
            "evaluation": {"every": 3, "episodes": 4},
            "runtime": {"type": "local"},
            "tracking": {"wandb": {"mode": "disabled"}},
            **changes,
        },
        "the test",
    )


def test_a_worker_gives_what_a_worker_on_a_cpu_gives() -> None:
    experiment = Experiment(config(engine={"strategy": "vectorised", "compile": "trace", "precision": "float64"}))
    answers = []
    for device in ("cuda", "cpu"):
        worker = MetaWorker(experiment, device)
        initial = experiment.learner().initial_meta_params()
        lease = Lease(0, training_round(experiment, 0), 0, 2)
        answers.append(worker.compute(lease, [worker.layout.flatten(initial).numpy()]))
        worker.close()
    (report, sums), (wanted_report, wanted) = answers
    assert set(sums) == set(wanted)
    for block, value in wanted.items():
        torch.testing.assert_close(torch.from_numpy(sums[block]), torch.from_numpy(value), rtol=1e-8, atol=1e-8)
    for name, values in wanted_report.metrics.items():
        torch.testing.assert_close(torch.from_numpy(report.metrics[name]), torch.from_numpy(values))
    assert report.gpu["memory_mb"] > 0
    assert not wanted_report.gpu


def sha(run: RunDirectory) -> Any:
    return run.load_summary()["meta_params_sha256"]


@pytest.mark.parametrize("engine", [{}, {"compile": False}, {"precision": "bfloat16"}, {"precision": "tf32"}])
def test_two_runs_have_one_sha_and_a_resumed_one_has_it_too(tmp_path: Path, engine: dict[str, Any]) -> None:
    whole = [train(Experiment(config(engine=engine)), tmp_path / name) for name in ("one", "two")]
    assert sha(whole[0]) == sha(whole[1])
    half = config(engine=engine, outer={**config().outer.model_dump(), "steps": 3})
    train(Experiment(half), tmp_path / "half")
    assert sha(resume(tmp_path / "half", ("outer.steps=6",))) == sha(whole[0])


def test_the_benchmark_finds_a_way_that_is_right() -> None:
    bench = EngineBench(Experiment(config()), rounds=1, compile=False)
    assert bench.device.type == "cuda"
    found = bench.run()
    assert found.error < 1e-2
    assert found.way.compile == "trace"
