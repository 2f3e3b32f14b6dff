"""The workloads: tasks of random numbers from a fixed seed, networks, and how far each adapts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import metadist as md
from metadist.algorithms import MANN, Algorithm
from metadist.algorithms.maml import MAML
from metadist.benchmark import REFERENCE
from metadist.config import validate
from metadist.experiment import Experiment
from metadist.models import MLP, Conv4

Tensors = dict[str, Tensor]
Call = Callable[[], Tensors]
"""A meta-gradient summed over the tasks of a job, by the names of the meta-parameters."""

DTYPES = {torch.float32: "float32", torch.float64: "float64"}


@dataclass(frozen=True)
class Workload:
    """A meta-gradient to compute.

    Args:
        name: its letter, of a family of workloads with one network, and its number of inner steps.
        title: what it is, in a line.
        shape: of an input.
        ways: classes; 0 for regression.
        shots, queries: support and query examples, of each class if there are classes.
        tasks: of a meta-batch.
        quick_tasks: the same with ``--quick``.
        check_tasks: of the comparison in float64.
        model: the config's section.
        steps, inner_lr, first_order: of the inner loop; no steps for a learner that has none.
    """

    name: str
    title: str
    shape: tuple[int, ...]
    ways: int
    shots: int
    queries: int
    tasks: int
    quick_tasks: int
    check_tasks: int
    model: dict[str, Any] = field(default_factory=dict)
    steps: int = 0
    inner_lr: float = 0.01
    first_order: bool = False

    @property
    def family(self) -> str:
        return self.name[0]

    def plain_module(self) -> nn.Module:
        """The network as any PyTorch program would have it."""
        if self.model["type"] == "mlp":
            return MLP(self.shape[0], 1, self.model["hidden"])
        options = {k: v for k, v in self.model.items() if k != "type"}
        return Conv4(self.shape[0], self.ways, image_size=self.shape[-2:], **options)  # type: ignore[arg-type]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target) if self.ways else F.mse_loss(output, target)


_OMNIGLOT: dict[str, Any] = dict(
    shape=(1, 28, 28), ways=5, shots=1, queries=15, tasks=32, quick_tasks=4, check_tasks=2,
    model={"type": "conv4", "filters": 64, "downsample": "max_pool"},
)  # fmt: skip
_SINES: dict[str, Any] = dict(
    shape=(1,), ways=0, shots=10, queries=10, tasks=25, quick_tasks=25, check_tasks=3,
    model={"type": "mlp", "hidden": [40, 40]},
)  # fmt: skip

WORKLOADS: dict[str, Workload] = {
    w.name: w
    for w in (
        Workload("A1", "Omniglot MAML, Conv4-64, 5-way 1-shot, 1 step", **_OMNIGLOT, steps=1, inner_lr=0.4),
        Workload("A5", "Omniglot MAML, Conv4-64, 5-way 1-shot, 5 steps", **_OMNIGLOT, steps=5, inner_lr=0.1),
        Workload("B1", "A1, first order", **_OMNIGLOT, steps=1, inner_lr=0.4, first_order=True),
        Workload("B5", "A5, first order", **_OMNIGLOT, steps=5, inner_lr=0.1, first_order=True),
        Workload("C", "MAML, Conv4-32 on 84x84 pictures, 5-way 5-shot, 5 steps", (3, 84, 84), 5, 5, 15, 4, 1, 1,
                 {"type": "conv4", "filters": 32, "downsample": "max_pool"}, steps=5),
        Workload("D1", "sinusoid MAML, MLP 1-40-40-1, 10 shots, 1 step", **_SINES, steps=1),
        Workload("D5", "sinusoid MAML, MLP 1-40-40-1, 10 shots, 5 steps", **_SINES, steps=5),
        Workload("E", "MANN, LSTM 200, memory 128x40, 4 heads, sequences of 50", (1, 20, 20), 5, 5, 5, 16, 16, 2,
                 {"type": "flatten"}),
    )
}  # fmt: skip


class RandomTasks(md.TaskSource):
    """Random pictures with balanced labels, or points of random sines."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload

    def sample(self, rng: md.Rng) -> md.Episode:
        torch.manual_seed(rng.torch_seed())
        w = self.workload
        if not w.ways:
            amplitude, phase = 0.1 + 4.9 * torch.rand(()), 3.14 * torch.rand(())
            x = 10 * torch.rand(w.shots + w.queries, *w.shape) - 5
            y = amplitude * torch.sin(x - phase)
            support, query = (md.Examples(x[rows], y[rows]) for rows in (slice(w.shots), slice(w.shots, None)))
            return md.Episode(support, query)
        return md.Episode(self._labelled(w.shots), self._labelled(w.queries))

    def _labelled(self, shots: int) -> md.Examples:
        y = torch.arange(self.workload.ways).repeat(shots)[torch.randperm(self.workload.ways * shots)]
        return md.Examples(torch.randn(len(y), *self.workload.shape), y)


@dataclass(frozen=True)
class Job:
    """A workload with its tasks and meta-parameters, ready for any implementation.

    Args:
        workload: what is computed.
        batch: its tasks, floating-point tensors in ``dtype``.
        params: meta-parameters by name, in ``dtype``.
        dtype: of the computation.
        device: where it lies.
    """

    workload: Workload
    batch: md.EpisodeBatch
    params: Tensors
    dtype: torch.dtype
    device: str = "cpu"

    def module(self) -> nn.Module:
        """The plain network with the meta-parameters as its own."""
        module = self.workload.plain_module().to(self.device, self.dtype)
        module.load_state_dict(self.params)
        return module

    def tasks(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Support inputs and targets, query inputs and targets of each task."""
        return [(*e.support, *e.query) for e in self.batch]

    def stacked(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The same of all tasks at once."""
        return (*self.batch.support, *self.batch.query)


def make_job(workload: Workload, tasks: int, dtype: torch.dtype, device: str = "cpu") -> Job:
    """The first tasks of the workload, the same in every dtype."""
    with torch.random.fork_rng(devices=[]):
        batch = RandomTasks(workload).episodes(0, "bench", range(tasks)).to(device, dtype)
    return Job(workload, batch, learner(workload, REFERENCE, dtype, device).initial_meta_params(), dtype, device)


def learner(workload: Workload, engine: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> Algorithm:
    """The learner of metadist for a workload, with an engine as the config's section says."""
    return experiment(workload, engine, dtype).learner(device)


def experiment(workload: Workload, engine: dict[str, Any], dtype: torch.dtype, **others: dict[str, Any]) -> Experiment:
    """A workload as an experiment of metadist; ``others`` are fields of further sections of its config."""
    w = workload
    algorithm: Algorithm
    if w.steps:
        algorithm = MAML(inner_lr=w.inner_lr, inner_steps=w.steps, first_order=w.first_order)
    else:
        algorithm = MANN(controller_size=200, memory_slots=128, memory_width=40, read_heads=4)
    sections = {
        **others,
        "name": "bench",
        "tasks": {"type": "python", "name": "random"},
        "model": w.model,
        "algorithm": {"type": "python", "name": type(algorithm).__name__},
        "engine": {"precision": DTYPES[dtype], **engine},
        "outer": {"meta_batch_size": w.tasks, **others.get("outer", {})},
        "tracking": {"wandb": {"mode": "disabled"}},
    }
    return Experiment(validate(sections, "the benchmark"), RandomTasks(w), algorithm=algorithm)


def our_gradient(of: Algorithm, params: Tensors, batch: md.EpisodeBatch) -> Tensors:
    """The meta-gradient alone, without the metrics before adaptation that a step reports beside it."""
    if isinstance(of, MAML):
        return of.engine.meta_gradient(of.problem(of.inner_steps), params, batch, of.constants())[0]
    assert isinstance(of, MANN)
    return of.engine.sum_batch(of._learn, (params,), (batch.support, batch.query), key="sequences")[0]


def reference(job: Job) -> Tensors:
    """The meta-gradient by plain automatic differentiation, task by task."""
    return our_gradient(learner(job.workload, REFERENCE, job.dtype, job.device), job.params, job.batch)


def flops_of_a_task(workload: Workload) -> float:
    """Floating-point operations of the products and convolutions of one task's meta-gradient."""
    job = make_job(workload, 1, torch.float32)
    with FlopCounterMode(display=False) as counter:
        reference(job)
    return float(counter.get_total_flops())


def microbatches(batch: md.EpisodeBatch, together: int | None) -> list[md.EpisodeBatch]:
    """The batch cut into parts of at most ``together`` tasks; None leaves it whole."""
    size = together or len(batch)

    def part(examples: md.Examples, start: int) -> md.Examples:
        return md.Examples(*(t[start : start + size] for t in examples))

    starts = range(0, len(batch), size)
    return [replace(batch, support=part(batch.support, i), query=part(batch.query, i), info=()) for i in starts]
