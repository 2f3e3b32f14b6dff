"""What a run's engine is, decided once before the first step and kept by the run's config.

By rules over the config, the model and the kind of device, never by a timing: two runs of one config have the same
bits.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metadist.algorithms import Algorithm, Plan
from metadist.config import in_words
from metadist.config.schema import LONG_RUN
from metadist.device import device_here, wants_gpu
from metadist.episode import EpisodeBatch, Examples
from metadist.errors import ConfigError, DataError, first_line
from metadist.experiment import Experiment
from metadist.inner import Engine, Tensors, choose_strategy, compiler_missing
from metadist.inner.engine import Strategy, drew_numbers
from metadist.inner.memory import LARGE, draws_by_shapes, peak_bytes, predicted_peak_bytes
from metadist.inner.program import Compile
from metadist.outer.gradient import Layout
from metadist.progress import Progress

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """An experiment whose engine is decided.

    Args:
        experiment: it.
        reason: why the engine is not the one hoped for; empty if it is.
        memory: bytes that a microbatch is predicted to take, where ``engine.memory`` bounds them.
        left_out: of which class how many blocks are left out, since they cannot be read.
    """

    experiment: Experiment
    reason: str = ""
    memory: int | None = None
    left_out: Mapping[str, int] = dataclass_field(default_factory=dict)

    def notable(self) -> Iterator[str]:
        """What a person should know of the data, and of how tasks are computed."""
        if left_out := self.left_out:
            blocks = sum(left_out.values())
            some = ", ".join(f"{n} of {name}" for name, n in list(left_out.items())[:8])
            more = ", ..." if len(left_out) > 8 else ""
            yield f"{blocks} blocks that cannot be read are left out (tasks.on_bad=skip): {some}{more}"
        engine = self.experiment.config.engine
        if self.reason:
            yield f"tasks are computed by the {engine.strategy}: {self.reason}"
        if engine.memory is not None and self.memory is not None:
            how = ", inner steps recomputed" if engine.recompute else ""
            how += f", {engine.tasks_together} tasks at once" if engine.tasks_together else ""
            yield f"memory: {in_words(self.memory)} predicted of {in_words(engine.memory)}{how}"
        runtime = self.experiment.config.runtime
        if runtime.type == "ray" and runtime.topology == "allreduce_unordered":
            yield "gradients are added in any order: this run is not reproducible (runtime.topology=allreduce is)"
        if runtime.type == "ray" and runtime.wire != "float32":
            yield f"gradients travel as {runtime.wire}: this run is not reproducible (runtime.wire=float32 is)"


def resolve(experiment: Experiment) -> Resolved:
    """Decides the engine of an experiment.

    Raises:
        ConfigError: the engine asked for does not go with the rest of the config.
        DataError: there are more bad blocks than ``tasks.most_bad`` allows.
    """
    experiment, left_out = _without_bad_blocks(experiment)
    section, reason = experiment.config.engine, ""
    strategy, compiled = section.strategy, section.compile
    if strategy in ("adjoint", "loop"):
        compiled = False
    elif compiled == "auto":
        compiled, reason = _form(experiment)
    if compiled is True and (reason := compiler_missing()):
        compiled = "trace"
    if strategy == "auto":
        strategy, traceable, why = _strategy(experiment, bool(compiled))
        compiled, reason = compiled if traceable else False, why or reason
    if section.compile == "auto" and compiled is True and (reason := _not_compilable(experiment, strategy)):
        compiled = "trace"
    experiment, memory = experiment.with_engine(strategy=strategy, compile=compiled), None
    if section.memory is not None:
        experiment, memory = _within(experiment, section.memory)
    return Resolved(experiment, reason, memory, left_out)


def _form(experiment: Experiment) -> tuple[Compile, str]:
    """What ``engine.compile`` comes to where it is left open, and why it is not inductor where that would pay.

    On a CPU, convolutions gain a tenth by it at most, networks of small operators two to three times as much speed
    (``tools/bench/choice.py``), once a run is long enough to repay a minute of compilation. On a GPU all gain, by a
    half and more, since little of the time goes into products (``tools/bench/adaptation.py --device cuda``).
    """
    if experiment.config.outer.steps < LONG_RUN or compiler_missing():
        return "trace", ""
    if wants_gpu(experiment.config.runtime.gpus_per_worker):
        if torch.cuda.is_available():
            return True, ""
        # On a cluster the driver's node need not have one, and what cannot be compiled is to be found out before.
        return "trace", "no GPU is here to try inductor on; engine.compile=true lets the workers compile"
    modules = experiment.learner().model.module.modules()
    convolutional = any(isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d) for m in modules)
    return "trace" if convolutional else True, ""


def _not_compilable(experiment: Experiment, strategy: Strategy) -> str:
    """Why inductor cannot compile the microbatches of a run; empty if it can.

    What it makes stays in its cache on the disk, for the workers of this machine.
    """
    device = device_here(experiment.config.runtime.gpus_per_worker)
    learner = experiment.with_engine(strategy=strategy, compile=True).learner(device)
    batch = experiment.first_tasks(experiment.plan.tasks_per_microbatch).to(device)
    print("compiling the meta-gradient, which may take minutes; engine.compile=trace does without", file=sys.stderr)
    try:
        with torch.random.fork_rng(devices=[]):
            learner.meta_gradient(learner.initial_meta_params(), batch)
    except Exception as e:  # whatever it is, the same gradient can be had without it
        log.debug("inductor is out", exc_info=True)
        return f"inductor cannot compile it: {first_line(e)}"
    return ""


def _without_bad_blocks(experiment: Experiment) -> tuple[Experiment, dict[str, int]]:
    """With ``tasks.on_bad: skip``, the experiment without the blocks that cannot be read, and how many of each class.

    They are looked for once, when the run begins, and kept in its config: what a run draws from does not depend on who
    reads when.
    """
    tasks = experiment.config.tasks
    if tasks.type != "shards" or tasks.on_bad == "error" or experiment.tasks is not None:
        return experiment, {}
    from metadist.data import bad_blocks, class_of, load_manifest

    manifest = load_manifest(Path(tasks.path))
    if tasks.left_out is None:
        with Progress("looking for bad blocks,") as progress:
            bad = bad_blocks(tasks.path, progress)
        if len(bad) > tasks.most_bad * manifest.blocks:
            some = "".join(f"\n  {why}" for why in list(bad.values())[:5])
            raise DataError(
                tasks.path,
                f"{len(bad)} of its {manifest.blocks} blocks cannot be read, more than tasks.most_bad="
                f"{tasks.most_bad:g} allows:{some}\n",
                "pack or copy the set again",
            )
        experiment = experiment.without_blocks(sorted(bad))
    counts: Counter[str] = Counter()
    for key in experiment.config.tasks.left_out or ():  # type: ignore[union-attr]
        number = class_of(key)
        counts[manifest.classes[number] if number < len(manifest.classes) else key] += 1
    return experiment, dict(counts)


def _strategy(experiment: Experiment, traced: bool) -> tuple[Strategy, bool, str]:
    experiment = experiment.with_few_steps(2)  # further ones are as the second, and each takes its time to trace
    learner, batch = experiment.learner(), experiment.first_tasks(2)
    learner.plan = Plan(2, 2)
    params = learner.initial_meta_params()

    def probe(engine: Engine) -> bool:
        call = _microbatch_of(learner.bind(learner.model, learner.objective, engine))
        if Layout.of(params).nbytes >= LARGE:
            # The process that trains nothing need not hold what training takes.
            with contextlib.suppress(RuntimeError, NotImplementedError, TypeError):
                return draws_by_shapes(call, params, batch.support, batch.query)
        return drew_numbers(lambda: call(params, batch.support, batch.query))

    return choose_strategy(learner.model, probe, traced)


def _microbatch_of(learner: Algorithm) -> Callable[[Tensors, Examples, Examples], Any]:
    """A microbatch's meta-gradient as a function of tensors alone, which can be run on shapes."""

    def call(meta_params: Tensors, support: Examples, query: Examples) -> Any:
        return learner.meta_gradient(meta_params, EpisodeBatch(support, query))

    return call


# --------------------------------------------------------------------------- memory


def predicted_memory(experiment: Experiment) -> int:
    """Bytes of tensors that computing one microbatch takes, beside model and data.

    Nothing is computed for it, unless the learner or the model looks at values: then one microbatch is, and counted.
    What inductor compiles is taken as if traced alone, which needs no less.

    Args:
        experiment: with ``engine.strategy`` decided.
    """
    tasks = int(experiment.config.outer.tasks_per_microbatch)
    learner = experiment.learner()
    engine = learner.engine
    if engine.compile is True:
        engine = Engine(engine.strategy, "trace", engine.recompute, engine.together)
        learner.bind(learner.model, learner.objective, engine)
    params, batch = learner.initial_meta_params(), experiment.first_tasks(tasks)
    call = _microbatch_of(learner)
    try:
        return predicted_peak_bytes(call, params, batch.support, batch.query)
    except (RuntimeError, NotImplementedError, TypeError):
        call(params, batch.support, batch.query)  # what is traced is traced here
        return peak_bytes(lambda: call(params, batch.support, batch.query))


def _within(experiment: Experiment, budget: int) -> tuple[Experiment, int]:
    """The first that is predicted to keep to a budget, from fast to frugal, and the prediction."""
    need = 0
    for candidate in _frugal(experiment):
        need = predicted_memory(candidate)
        if need <= budget:
            return candidate, need
    raise ConfigError(
        "engine.memory",
        f"is {in_words(budget)}, but a task by itself takes {in_words(need)}",
        "raise it, or have fewer examples in a task, a smaller model or algorithm.first_order: true",
    )


def _frugal(experiment: Experiment) -> Iterator[Experiment]:
    """The experiment as it is, then slower ones that need less memory."""
    yield experiment
    section = experiment.config.engine
    if section.strategy != "vectorised":
        return  # these compute task by task already
    together = int(experiment.config.outer.tasks_per_microbatch)
    together = min(section.tasks_together or together, together)
    if section.compile and not section.recompute:  # what is neither traced nor compiled recomputes anyway
        yield experiment.with_engine(recompute=True)
    while together > 1:
        together = -(-together // 2)
        yield experiment.with_engine(recompute=True, tasks_together=together)
