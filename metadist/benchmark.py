"""How fast each way to run a config's meta-gradient is on this machine, and which to write into the config.

Real microbatches of the config's tasks, its model and learner. Every way is first compared with the plain loop; those
that are right are timed in turn, round by round, so that a machine whose speed drifts treats them alike.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from metadist.algorithms import Algorithm
from metadist.config import in_words
from metadist.device import device_here, make_repeatable, wait_for
from metadist.errors import ConfigError, first_line
from metadist.experiment import PRODUCTS, Experiment
from metadist.inner import Tensors, compiler_missing
from metadist.inner.memory import peak_bytes
from metadist.resolve import resolve

REFERENCE = {"strategy": "loop", "compile": False, "convolution": "direct", "fused_norm": False}
"""Plain automatic differentiation, task by task: what every other way must agree with."""

TOLERANCE = {"float32": 2e-2, "tf32": 0.3, "float64": 1e-6, "bfloat16": 1.0}
"""Largest relative distance from the reference; single precision is felt at the kinks of ReLU and pooling, and bfloat16
everywhere: of a network that has not learned yet, half of the gradient may be rounding."""

NEAR = 1.25
"""How far from the fastest a way may be, traced, for inductor to be tried on it as well."""

CLOSE = 1.15
"""How far from the fastest a way may be for both to be timed once more."""

UNKNOWN_WORKERS = 4
"""How many workers are reckoned with where the config takes as many as there are."""


@dataclass(frozen=True)
class Way:
    """A way to compute a microbatch: fields of ``engine``, and ``outer.tasks_per_microbatch``."""

    strategy: str
    compile: bool | str
    convolution: str
    recompute: bool
    tasks: int

    @property
    def engine(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "tasks"}

    @property
    def name(self) -> str:
        form = {False: "", "trace": ", traced", True: ", compiled"}[self.compile]
        again = ", steps recomputed" if self.recompute else ""
        return f"{self.strategy}{form}, {self.convolution} convolutions{again}, {self.tasks} together"


@dataclass
class Timing:
    """What was measured of a way.

    Args:
        way: the way.
        first_s: seconds of its first call, tracing and compilation included.
        error: relative distance of its meta-gradient from the reference's.
        memory: bytes of the tensors it holds at once, at most; None where inductor decides that.
        seconds: of each timed call, a task.
        reason: why it was not timed; empty if it was.
    """

    way: Way
    first_s: float = 0.0
    error: float = 0.0
    memory: int | None = None
    seconds: list[float] = field(default_factory=list)
    reason: str = ""

    @property
    def ms_per_task(self) -> float | None:
        """The median, or None where nothing was timed."""
        return 1e3 * statistics.median(self.seconds) if self.seconds else None

    def row(self, best: float) -> dict[str, Any]:
        """What ``--json`` has of it."""
        found = self.ms_per_task
        return {
            **self.way.engine,
            "tasks_per_microbatch": self.way.tasks,
            "ms_per_task": found,
            "first_call_s": self.first_s,
            "relative_error": self.error,
            "memory_mb": None if self.memory is None else self.memory / 1e6,
            "ratio_to_best": None if found is None else found / best,
            "reason": self.reason,
        }


class EngineBench:
    """Times the ways to run one config.

    Args:
        experiment: what is computed; its engine's precision and memory are kept to.
        rounds: timed calls of each way.
        compile: try inductor too, which takes a minute or two for each way.
        say: told what is going on, a line at a time.

    Attributes:
        timings: of every way that was tried.
        calls: what computes a microbatch in each way that may be timed.
        automatic: the way of a config that leaves its engine to ``auto``.
        device: where it is computed: on a GPU if there is one and the config lets workers have it.
    """

    def __init__(
        self,
        experiment: Experiment,
        rounds: int = 5,
        compile: bool = True,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._experiment, self._rounds, self._say = experiment, rounds, say
        self._inductor = compile and not compiler_missing()
        torch.set_num_threads(experiment.config.runtime.threads_per_worker)
        self.device = torch.device(device_here(experiment.config.runtime.gpus_per_worker))
        make_repeatable(self.device, experiment.config.engine.precision == "tf32")
        self.timings: dict[Way, Timing] = {}
        self.calls: dict[Way, Callable[[], Any]] = {}
        self._wanted: dict[int, Tensors] = {}

    def run(self) -> Timing:
        """Searches one choice after the other; returns the fastest way that is right."""
        config = self._experiment.config
        tasks = int(config.outer.tasks_per_microbatch)
        self.automatic = self._way_of_auto(tasks)
        plain = [Way("vectorised", "trace", c, False, tasks) for c in self.convolutions]
        eager = [replace(w, strategy=s, compile=False) for s in ("vectorised", "adjoint") for w in plain]
        self.measure([*plain, *eager, Way("loop", False, "direct", False, tasks)])
        # What is traced takes seconds to prepare, inductor minutes: it comes last, where tracing is at its best.
        self.measure(replace(self.best().way, tasks=n) for n in self.sizes())
        best = self.best()
        self.measure([self.automatic])
        if self._inductor and best.way.strategy == "vectorised":
            ms = {w: t for w in plain if (t := self.timings[w].ms_per_task)}
            near = [w for w, t in ms.items() if t <= NEAR * min(ms.values())]
            self.measure(replace(w, compile=True, tasks=best.way.tasks) for w in near)
            self.measure([replace(self.best().way, compile=True, tasks=tasks)])
        programs = [t for t in self.timings.values() if t.seconds and t.way.compile]
        if programs:  # on a busy machine, too, where one that was not traced may seem the fastest
            self.measure([replace(_fastest(programs).way, recompute=True)])
        self._decide()
        return self.best()

    def _decide(self) -> None:
        """Times what is close to the fastest once more, in turns: it was timed minutes apart."""
        most = CLOSE * (self.best().ms_per_task or 0.0)
        near = [way for way, timing in self.timings.items() if timing.seconds and (timing.ms_per_task or 0.0) <= most]
        if len(near) > 1:
            self._say(f"{len(near)} ways are close: once more, in turns")
            for way, seconds in self.in_turns(near, 2 * self._rounds).items():
                self.timings[way].seconds = seconds

    @functools.cached_property
    def convolutions(self) -> tuple[str, ...]:
        """The ways to compute convolutions that can differ for this model."""
        convolutional = any(isinstance(m, torch.nn.Conv2d) for m in self._learner(REFERENCE).model.module.modules())
        if not convolutional:
            return ("direct",)
        return ("direct", "columns", "winograd") if self.device.type == "cpu" else ("direct", "columns")

    def sizes(self) -> list[int]:
        """Numbers of tasks computed together that leave work for every worker of the config."""
        config = self._experiment.config
        workers = config.runtime.workers
        if config.runtime.type == "local":
            workers = 1
        most = workers if isinstance(workers, int) else getattr(workers, "max", UNKNOWN_WORKERS)
        return list(_sizes(config.outer.meta_batch_size, most))

    def _way_of_auto(self, tasks: int) -> Way:
        form = "auto" if self._inductor else "trace"
        left_open = {"strategy": "auto", "compile": form, "recompute": False, "convolution": "auto", "memory": None}
        decided = resolve(self._experiment.with_engine(**left_open, tasks_together=None)).experiment
        engine = decided.config.engine
        convolution = decided.learner().model.convolution if len(self.convolutions) > 1 else "direct"
        assert engine.compile != "auto"  # it is decided
        return Way(engine.strategy, engine.compile, convolution, False, tasks)

    def best(self) -> Timing:
        """The fastest of those that were measured."""
        timed = [t for t in self.timings.values() if t.seconds]
        if not timed:
            reason = next((t.reason for t in self.timings.values() if t.reason), "nothing was tried")
            raise ConfigError("engine", f"no way to compute the meta-gradient works: {reason}")
        return _fastest(timed)

    def measure(self, ways: Iterable[Way]) -> None:
        """Prepares new ways, then times them in turn, with the best one so far among them for comparison."""
        fresh = [w for w in dict.fromkeys(ways) if w not in self.timings]
        ready = [w for w in fresh if self._prepare(w)]
        if ready and any(t.seconds for t in self.timings.values()):
            ready.append(self.best().way)
        for way, seconds in self.in_turns(ready, self._rounds).items():
            self.timings[way].seconds += seconds
            self._say(f"{way.name}: {self.timings[way].ms_per_task:.2f} ms a task")

    def in_turns(self, ways: Iterable[Way], rounds: int) -> dict[Way, list[float]]:
        """Seconds a task of each way, which is prepared, in each round."""
        found: dict[Way, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, seconds in found.items():
                start = time.perf_counter()
                self.calls[way]()
                seconds.append((time.perf_counter() - start) / way.tasks)
        return found

    def _prepare(self, way: Way) -> bool:
        """Makes the call and checks what it gives; whether it may be timed."""
        timing = self.timings[way] = Timing(way)
        self._say(f"preparing {way.name}")
        start = time.perf_counter()
        try:
            call = self._call(way.engine, way.tasks)
            found = call()
        except (RuntimeError, NotImplementedError, TypeError) as e:
            timing.reason = first_line(e)
            return False
        timing.first_s = time.perf_counter() - start
        timing.error = distance(found, self._reference(way.tasks))
        if not timing.error <= TOLERANCE[self._experiment.config.engine.precision]:
            timing.reason = f"its gradient is {timing.error:.1e} away from the loop's"
            return False
        timing.memory = None if way.compile is True else peak_bytes(call)
        budget = self._experiment.config.engine.memory
        if budget is not None and timing.memory is not None and timing.memory > budget:
            timing.reason = f"it takes {in_words(timing.memory)}, more than engine.memory"
            return False
        self.calls[way] = call
        return True

    def _reference(self, tasks: int) -> Tensors:
        """The loop's meta-gradient of so many tasks; computed once."""
        if tasks not in self._wanted:
            full = {"precision": "float32"} if self._experiment.config.engine.precision in PRODUCTS else {}
            self._wanted[tasks] = self._call({**REFERENCE, **full}, tasks)()
        return self._wanted[tasks]

    def _call(self, engine: dict[str, Any], tasks: int) -> Callable[[], Tensors]:
        learner = self._learner(engine)
        batch = self._experiment.first_tasks(tasks).to(self.device)
        params = {k: v.detach() for k, v in learner.initial_meta_params().items()}

        def call() -> Tensors:
            torch.manual_seed(0)
            gradient = learner.meta_gradient(params, batch).gradient
            wait_for(self.device)
            return gradient

        return call

    def _learner(self, engine: dict[str, Any]) -> Algorithm:
        return self._experiment.with_engine(**engine).learner(self.device)


def _fastest(timings: Iterable[Timing]) -> Timing:
    return min(timings, key=lambda t: t.ms_per_task or 0.0)


def _sizes(tasks: int, workers: int) -> Iterator[int]:
    """Powers of two up to a worker's part of a meta-batch, and that part."""
    size, most = 1, -(-tasks // workers)
    while size < most:
        yield size
        size *= 2
    yield most


def distance(found: Tensors, wanted: Tensors) -> float:
    """How far one meta-gradient is from another, all tensors as one vector, over the length of the other.

    Raises:
        ValueError: their names or shapes differ.
    """
    shapes = [{k: tuple(v.shape) for k, v in g.items()} for g in (found, wanted)]
    if shapes[0] != shapes[1]:
        raise ValueError(f"the gradient has other tensors: {shapes[0]}, wanted {shapes[1]}")
    a, b = (torch.cat([g[k].detach().double().flatten() for k in wanted]) for g in (found, wanted))
    return float((a - b).norm() / b.norm().clamp_min(1e-300))
