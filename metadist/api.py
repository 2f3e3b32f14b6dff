"""The Python interface: the same runs as the command line, from objects instead of files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metadist.algorithms import Algorithm
from metadist.config import validate
from metadist.episode import Examples
from metadist.experiment import Experiment
from metadist.finished import load_learner
from metadist.inner.functional import Tensors
from metadist.tasks.base import TaskSource
from metadist.training import train as run_training


@dataclass(frozen=True)
class Outer:
    """The meta-update: the config's ``outer`` section.

    Args:
        optimizer: ``adam``, ``adamw`` or ``sgd``.
        lr: its rate.
        steps: meta-updates of the whole run.
        meta_batch_size: tasks of a meta-update, all workers together.
        options: further fields of the section, e.g. ``{"schedule": "cosine"}``.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    steps: int = 1000
    meta_batch_size: int = 32
    options: dict[str, Any] = field(default_factory=dict)

    def section(self) -> dict[str, Any]:
        """As in a config."""
        own = asdict(self)
        return {**own.pop("options"), **own}


@dataclass(frozen=True)
class LocalRuntime:
    """Everything in this process."""

    threads_per_worker: int = 1

    def section(self) -> dict[str, Any]:
        """As in a config."""
        return {"type": "local", **asdict(self)}


@dataclass(frozen=True)
class RayRuntime:
    """Workers over Ray.

    Args:
        workers: how many, or ``auto``.
        gpus_per_worker: GPUs of each, fractions allowed, or ``auto``.
        threads_per_worker: CPU threads of each.
        address: a running cluster; None starts one on this machine.
        server_shards: actors that the parameter server is cut into.
    """

    workers: int | str = "auto"
    gpus_per_worker: float | str = "auto"
    threads_per_worker: int = 1
    address: str | None = None
    server_shards: int = 1

    def section(self) -> dict[str, Any]:
        """As in a config."""
        return {"type": "ray", **asdict(self)}


class AdaptedModel(nn.Module):
    """A learner adapted to one task: call it on new inputs.

    Args:
        algorithm: the learner.
        adapted: what its ``adapt`` gave.
        support: the examples it was adapted to.
    """

    def __init__(self, algorithm: Algorithm, adapted: Any, support: Examples) -> None:
        super().__init__()
        self._algorithm = algorithm
        leaves, spec = pytree.tree_flatten(adapted)
        self._places = pytree.tree_unflatten(list(range(len(leaves))), spec)  # of each value, by its number
        self.values = nn.ParameterList([nn.Parameter(v.detach().clone()) for v in leaves])
        self.support_x: Tensor
        self.support_y: Tensor
        self.register_buffer("support_x", support.x)
        self.register_buffer("support_y", support.y)

    def named_values(self) -> dict[str, Tensor]:
        """What was adapted, by name: of learners that adapt a network, the names of its parameters."""
        paths, _ = pytree.tree_flatten_with_path(self._adapted())
        return {".".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): v for path, v in paths}

    def forward(self, x: Tensor) -> Tensor:
        """The outputs for ``x [N, ...]``."""
        dtype, device = self._algorithm.model.dtype, self._algorithm.model.device
        x = x.to(device, dtype) if x.is_floating_point() else x.to(device)
        support = Examples(self.support_x, self.support_y)
        return self._algorithm.predict(self._adapted(), support, x, evaluation=True)

    def _adapted(self) -> Any:
        """What the learner's ``adapt`` gave, with the values as they are now."""
        return pytree.tree_map(lambda place: self.values[place], self._places)


class Learner:
    """What a run has learned.

    Args:
        run_dir: the run's directory.
        algorithm: the learner, bound to its model.
        meta_params: what it learned.
        version: meta-updates made.
    """

    def __init__(self, run_dir: Path, algorithm: Algorithm, meta_params: Tensors, version: int) -> None:
        self.run_dir, self.algorithm, self.meta_params, self.version = run_dir, algorithm, meta_params, version

    def adapt(self, support: Examples | tuple[Tensor, Tensor]) -> AdaptedModel:
        """Adapts to one task.

        Args:
            support: its examples, ``x [S, ...]`` and ``y [S, ...]``.

        Returns:
            A module for new inputs ``[N, ...]`` of the same task.
        """
        x, y = support
        if len(x) != len(y) or not len(x):
            raise ValueError(f"support holds {len(x)} inputs for {len(y)} targets; give as many of both, at least one")
        dtype = next(iter(self.meta_params.values())).dtype
        examples = Examples(*(t.to(dtype) if t.is_floating_point() else t for t in (x, y)))
        adapted = self.algorithm.adapt(self.meta_params, examples, evaluation=True)
        return AdaptedModel(self.algorithm, adapted, examples)


@dataclass(frozen=True)
class Run:
    """A finished run.

    Args:
        run_dir: its directory.
        summary: its ``summary.json``.
        learner: what it learned.
    """

    run_dir: Path
    summary: dict[str, Any]
    learner: Learner

    def adapt(self, support: Examples | tuple[Tensor, Tensor]) -> AdaptedModel:
        """See :meth:`Learner.adapt`."""
        return self.learner.adapt(support)


def train(
    *,
    model: Callable[[], nn.Module],
    tasks: TaskSource,
    algorithm: Algorithm,
    outer: Outer | None = None,
    runtime: LocalRuntime | RayRuntime | None = None,
    engine: dict[str, Any] | None = None,
    evaluation: dict[str, Any] | None = None,
    tracking: dict[str, Any] | None = None,
    name: str = "run",
    seed: int = 0,
    precision: str = "float32",
    batchnorm: str = "transductive",
    run_dir: str | Path | None = None,
) -> Run:
    """Meta-trains and evaluates.

    Args:
        model: makes the network; called with the seed set.
        tasks: where tasks come from.
        algorithm: the learner, e.g. ``MAML(inner_lr=0.1)``.
        outer: the meta-update.
        runtime: where it runs; this process by default.
        engine, evaluation, tracking: fields of these sections of the config, e.g. ``engine={"compile": True}``.
        name, seed: of the run.
        precision: ``float32``, ``tf32`` (of a GPU's products), ``float64`` or ``bfloat16`` (of products alone).
        batchnorm: whose statistics BatchNorm takes for the query set: ``transductive`` (its own), ``inductive`` (the
            support set's) or ``running`` (averages of training).
        run_dir: where the run is kept; must not exist. None makes ``runs/NAME-TIME``.

    Returns:
        The run, ready to adapt.

    Raises:
        MetadistError: what a user can mend.
    """
    sections: dict[str, Any] = {
        "name": name,
        "seed": seed,
        "tasks": _named(type(tasks)) | {"type": "python"},
        "model": _named(model) | {"type": "python", "batchnorm": batchnorm},
        "algorithm": _named(type(algorithm)) | {"type": "python"},
        "engine": {"precision": precision, **(engine or {})},
        "outer": (outer or Outer()).section(),
        "runtime": (runtime or LocalRuntime()).section(),
        "evaluation": evaluation or {},
        "tracking": tracking or {},
    }
    experiment = Experiment(validate(sections, "metadist.train"), tasks, model, algorithm, code=True)
    run = run_training(experiment, Path(run_dir) if run_dir is not None else None)
    learner = load(run.path, tasks=tasks, model=model, algorithm=algorithm)
    return Run(run.path, run.load_summary(), learner)


def load(
    run_dir: str | Path,
    *,
    tasks: TaskSource | None = None,
    model: Callable[[], nn.Module] | None = None,
    algorithm: Algorithm | None = None,
    checkpoint: str | int = "latest",
    allow_code: bool = False,
) -> Learner:
    """What a run has learned.

    Args:
        run_dir: the run's directory.
        tasks, model, algorithm: the objects the run was started with, if it was started from Python.
        checkpoint: ``latest``, the newest that is whole; ``best``, of the evaluations during training; or a version.
        allow_code: import what the run's config names by ``import_path``, which runs it: for runs of people you trust.

    Raises:
        MetadistError: there is no such run or checkpoint, or it does not fit the model.
    """
    stand_ins = {"tasks": tasks, "model": model, "algorithm": algorithm, "code": allow_code}
    learner, _, loaded = load_learner(Path(run_dir), stand_ins, str(checkpoint))
    return Learner(Path(run_dir), learner, loaded.meta_params, loaded.version)


def _named(thing: Any) -> dict[str, str]:
    return {"name": f"{getattr(thing, '__module__', '?')}:{getattr(thing, '__qualname__', repr(thing))}"}
