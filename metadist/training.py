"""A run from its first step to its report: the loop, and what it leaves behind."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from metadist.algorithms import Algorithm
from metadist.checkpoint import Checkpoint, check_fits, load_checkpoint, newest_whole_checkpoint, save_checkpoint
from metadist.errors import ConfigError, MetadistError, RunDirError
from metadist.evaluation import evaluation_round, summarise
from metadist.experiment import Experiment
from metadist.history import UPDATES, UpdateLog, replayed, updates
from metadist.outer.gradient import Layout, sha256_of
from metadist.resolve import in_words, resolve
from metadist.rundir import RunDirectory
from metadist.runtime.asynchronous import AsynchronousController
from metadist.runtime.backend import Backend
from metadist.runtime.controller import Controller, RoundResult, means
from metadist.runtime.local import LocalBackend
from metadist.staleness import Flow
from metadist.tracking import ConsoleTracker, JsonlTracker, RunInfo, Trackers, WandbTracker
from metadist.worker import Round, training_round

_EVALUATION_MICROBATCH = 25


class Interrupted(Exception):
    """The run was asked to stop; it has written a checkpoint. ``signum`` says by what."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"signal {signum}")
        self.signum = signum


@dataclass
class Progress:
    """Totals of a run over all its resumptions."""

    tasks_seen: int = 0
    wall_s: float = 0.0
    train_s: float = 0.0
    releases: int = 0
    restarts: dict[str, int] = field(default_factory=lambda: {"worker": 0, "server": 0, "driver": 0})
    wandb_run: str | None = None
    flow: dict[str, Any] | None = None


def train(experiment: Experiment, run_dir: Path | None = None) -> RunDirectory:
    """Meta-trains from the start.

    Args:
        experiment: what to run.
        run_dir: a directory that does not exist; None makes ``runs/NAME-TIME``.

    Returns:
        The run directory, with summary, report and checkpoints in it.

    Raises:
        MetadistError: what a user can mend; nothing half-written stays behind.
        Interrupted: the run was stopped and can be resumed.
    """
    run = RunDirectory.create(run_dir, experiment.config.name)
    try:
        with _Training(experiment, run) as training:
            training.run_all(None)
    except BaseException:
        run.discard()
        raise
    return run


def resume(run_dir: Path, overrides: tuple[str, ...] = (), stand_ins: dict[str, Any] | None = None) -> RunDirectory:
    """Goes on from the newest whole checkpoint of a run; see :func:`train`."""
    run = RunDirectory.open(run_dir)
    experiment = Experiment(run.load_config(overrides), **(stand_ins or {}))
    try:
        checkpoint, faults = newest_whole_checkpoint(run.checkpoints)
    except MetadistError as e:
        if e.problem != "holds no whole checkpoint":
            raise
        checkpoint, faults = None, []
    with _Training(experiment, run) as training:
        training.run_all(checkpoint, faults)
    return run


def open_backend(experiment: Experiment) -> Backend:
    """Where the config's ``runtime`` section puts workers and server."""
    if experiment.config.runtime.type == "local":
        return LocalBackend(experiment)
    if experiment.config.runtime.topology != "server":
        from metadist.runtime.ray_allreduce import AllReduceBackend

        return AllReduceBackend(experiment)
    from metadist.runtime.ray import RayBackend

    return RayBackend(experiment)


def outer_options(experiment: Experiment, learner: Algorithm, layout: Layout) -> dict[str, Any]:
    """The ``outer`` section, with the sizes of the tensors and the places of what the optimizer is not to move."""
    rules = {name: rule.__dict__ for name, rule in learner.update_rules().items()}
    return {**experiment.config.outer.model_dump(), "sizes": layout.sizes, "rules": layout.places(rules)}


class _Training:
    """One process's part of a run."""

    def __init__(self, experiment: Experiment, run: RunDirectory) -> None:
        decided = resolve(experiment)
        self.experiment, self.run, self.config = decided.experiment, run, decided.experiment.config
        self.learner: Algorithm = self.experiment.learner()
        self.initial = self.learner.initial_meta_params()
        self.layout = Layout.of(self.initial)
        self.metric = self.learner.objective.metric
        self.decided, self.memory, self.programs = decided, 0, 0
        self.progress = Progress()
        self.backend: Backend | None = None

    def __enter__(self) -> _Training:
        return self

    def __exit__(self, *_: object) -> None:
        if self.backend is not None:
            self.backend.close()
        self.experiment.close()

    def _about_the_engine(self) -> Iterator[str]:
        """What a person should know of how tasks are computed."""
        engine, decided = self.config.engine, self.decided
        if decided.reason:
            yield f"tasks are computed by the {engine.strategy}: {decided.reason}"
        if engine.memory is not None and decided.memory is not None:
            how = ", inner steps recomputed" if engine.recompute else ""
            how += f", {engine.tasks_together} tasks at once" if engine.tasks_together else ""
            yield f"memory: {in_words(decided.memory)} predicted of {in_words(engine.memory)}{how}"

    # ----------------------------------------------------------------- from start to end

    def run_all(self, checkpoint: Checkpoint | None, faults: list[str] | None = None) -> None:
        """Trains from ``checkpoint`` to the last step, evaluates and reports."""
        started = time.perf_counter()
        # Whatever can be refused is refused before anything is written.
        self._refuse_what_cannot_be_partial()
        content_id = self.experiment.source(self.experiment.train_split).describe().get("content_id")
        self._open_evaluation_sources()
        snapshot = self._first_snapshot(checkpoint, content_id)
        self.backend = open_backend(self.experiment)
        self.run.claim()
        try:
            self._run(snapshot, content_id, faults or [], started, resumed=checkpoint is not None)
        finally:
            self.run.release()

    def _run(
        self, snapshot: dict[str, Any], content_id: str | None, faults: list[str], started: float, resumed: bool
    ) -> None:
        assert self.backend is not None
        self.content_id, self.base_wall_s, self.started = content_id, self.progress.wall_s, started
        self.backend.start(snapshot, outer_options(self.experiment, self.learner, self.layout))
        self.run.save_config(self.config)
        wandb = self._start_trackers(snapshot["version"])
        code = 1
        summary: dict[str, Any] = {}
        try:
            if wandb is not None:
                self.progress.wandb_run = wandb.run_id
            for fault in faults:
                self.trackers.message(f"passed over a damaged checkpoint: {fault}")
            for line in self._about_the_engine():
                self.trackers.message(line)
            if self.config.runtime.type == "ray" and self.config.runtime.topology == "allreduce_unordered":
                self.trackers.message(
                    "gradients are added in any order: this run is not reproducible (runtime.topology=allreduce is)"
                )
            self.controller = self._controller(snapshot["version"])
            if not resumed:
                self._checkpoint(snapshot)
            self._steps(snapshot["version"])
            summary = self._conclude()
            code = 0
        except Interrupted as e:
            code = 128 + e.signum
            raise
        finally:
            self.trackers.finish(summary, code)

    def _controller(self, version: int) -> Controller:
        """What gathers updates: those of whole meta-batches, or of what comes first. The latter two keep a log."""
        assert self.backend is not None
        runtime, told = self.config.runtime, self.trackers.message
        timeout = runtime.lease_timeout_s
        self.log = UpdateLog(self.run.path, version) if runtime.max_staleness or runtime.quorum < 1 else None
        if not runtime.max_staleness:
            return Controller(self.backend, timeout, told, quorum=runtime.quorum)
        enough = runtime.microbatches_per_update or training_round(self.experiment, 0).microbatches
        flow = Flow(
            self.config.outer.steps * enough, enough, runtime.max_staleness, runtime.staleness_weighting,
            self.progress.flow,
        )  # fmt: skip
        return AsynchronousController(self.backend, flow, lease_timeout_s=timeout, on_event=told)

    def _refuse_what_cannot_be_partial(self) -> None:
        """Learners whose update needs each microbatch of a meta-batch, once.

        Raises:
            ConfigError: such a learner, and updates that do not wait for all.
        """
        runtime = self.config.runtime
        whole = any(rule.kind == "replace" for rule in self.learner.update_rules().values())
        if (whole or self.learner.tasks_held_for > 1) and (runtime.max_staleness or runtime.quorum < 1):
            name = "runtime.max_staleness" if runtime.max_staleness else "runtime.quorum"
            raise ConfigError(
                name,
                f"is {getattr(runtime, name.partition('.')[2]):g}, but {self.config.algorithm.type} carries state from "
                "each meta-batch to the next, so an update needs the whole of it",
                "write max_staleness: 0 and quorum: 1.0",
            )

    def _first_snapshot(self, checkpoint: Checkpoint | None, content_id: str | None) -> dict[str, Any]:
        if checkpoint is None:
            return {"version": 0, "weights": self.layout.flatten(self.initial).numpy(), "outer_state": {}}
        check_fits(checkpoint, self.layout, content_id, self.run.path)
        if checkpoint.version > self.config.outer.steps:
            raise RunDirError(
                self.run.path,
                f"is at step {checkpoint.version}, past outer.steps={self.config.outer.steps}",
                f"raise it: `metadist resume {self.run.path} outer.steps=...`",
            )
        known = {k: v for k, v in checkpoint.progress.items() if k in Progress.__dataclass_fields__}
        self.progress = Progress(**known)
        self.progress.restarts["driver"] = self.progress.restarts.get("driver", 0) + 1
        return checkpoint.snapshot

    def _open_evaluation_sources(self) -> None:
        evaluation = self.config.evaluation
        splits = {evaluation.split} | ({evaluation.validation_split} if evaluation.every else set())
        for split in splits:
            self.experiment.source(split, self.experiment.evaluation_size)

    def _start_trackers(self, version: int) -> WandbTracker | None:
        tracking = self.config.tracking
        members: list[Any] = [JsonlTracker()]
        wandb = None
        if tracking.wandb.mode != "disabled":
            w = tracking.wandb
            wandb = WandbTracker(mode=w.mode, project=w.project, entity=w.entity, tags=w.tags)
            members.append(wandb)
        if tracking.console:
            members.append(ConsoleTracker())
        self.trackers = Trackers(members)
        assert self.backend is not None
        info = RunInfo(
            run_dir=self.run.path, name=self.config.name, config=self.config.model_dump(mode="json"),
            total_steps=self.config.outer.steps, start_version=version, wandb_run_id=self.progress.wandb_run,
            workers=self.backend.describe()["workers"], metric=self.metric,
        )  # fmt: skip
        self.trackers.start(info)
        return wandb

    # ----------------------------------------------------------------- the loop

    def _steps(self, version: int) -> None:
        """Rounds until the last step. The next round is given out before the last one is written down."""
        with _StopSignals() as stop:
            if version < self.config.outer.steps:
                self.controller.begin(self._round(version))
            while version < self.config.outer.steps:
                result = self.controller.finish()
                assert self.backend is not None
                before = time.perf_counter()
                stats = self.backend.commit(version, result.tasks, result.slots)
                self.controller.committed()
                server_s = time.perf_counter() - before
                version += 1
                due = self._due(version, stop.signum is not None)
                snapshot = self.backend.snapshot() if due["checkpoint"] else None
                if version < self.config.outer.steps and not due["evaluate"] and stop.signum is None:
                    self.controller.begin(self._round(version))
                self._record(version, result, stats, server_s)
                if snapshot is not None:
                    self._checkpoint(snapshot)
                if stop.signum is not None:
                    raise Interrupted(stop.signum)
                if due["evaluate"]:
                    self._evaluate(
                        version, self.config.evaluation.validation_split, self.config.evaluation.validation_episodes
                    )
                    if version < self.config.outer.steps:
                        self.controller.begin(self._round(version))

    def _due(self, version: int, stopping: bool) -> dict[str, bool]:
        last = version == self.config.outer.steps
        every = self.config.evaluation.every
        return {
            "checkpoint": stopping or last or version % self.config.checkpoint.every == 0,
            "evaluate": bool(every) and version % every == 0 and not stopping,
        }

    def _round(self, version: int) -> Round:
        return training_round(self.experiment, version, self.learner.tasks_held_for)

    def _record(self, version: int, result: RoundResult, stats: dict[str, float], server_s: float) -> None:
        assert self.backend is not None
        tasks = len(result.metrics["loss"])
        step_s = max(result.seconds + server_s, 1e-9)
        self.memory = max(self.memory, result.memory)
        self._note_programs(version, result.programs)
        self.progress.tasks_seen += tasks
        self.progress.train_s += step_s
        line: dict[str, Any] = {
            **means(result.metrics), **stats, "tasks_per_s": tasks / step_s, "step_s": step_s,
            "data_wait_s": result.data_wait_s, "server_s": server_s, **self._lags(result),
            "worker_memory_mb": self.memory / 1e6,
            "workers": len(self.backend.workers()), "worker_s": {str(k): v for k, v in result.worker_s.items()},
        }  # fmt: skip
        if self.log is not None:
            self.log.append(
                version, result.round.microbatches if result.left_out else len(result.applied),
                result.applied, result.dropped, result.left_out,
            )  # fmt: skip
        self.trackers.log(version, line)

    def _lags(self, result: RoundResult) -> dict[str, float]:
        """How far gradients lagged behind the update they were used in, and what was not used."""
        lags = result.staleness or [0]
        found: dict[str, float] = {"staleness": sum(lags) / len(lags)}
        if self.config.runtime.max_staleness:
            found |= {"staleness_max": max(lags), "dropped": len(result.dropped)}
        if self.config.runtime.quorum < 1:
            found["left_out"] = len(result.left_out)
        return found

    def _note_programs(self, version: int, programs: int) -> None:
        """Says so if a worker had to trace or compile again in the middle of the run."""
        if self.programs and programs > self.programs:
            made = "compiled" if self.config.engine.compile is True else "traced"
            self.trackers.message(
                f"step {version}: the meta-gradient was {made} again, for other shapes or another phase of the learner"
            )
        self.programs = max(self.programs, programs)

    def _evaluate(self, version: int, split: str, episodes: int) -> dict[str, Any]:
        size = self.experiment.evaluation_size
        round = evaluation_round(version, split, episodes, _EVALUATION_MICROBATCH, size)
        result = self.controller.run(round)
        summary = summarise(result.metrics, self.metric, split, self.learner.model.batchnorm)
        self.trackers.log_evaluation(version, summary)
        return summary

    def _checkpoint(self, snapshot: dict[str, Any]) -> None:
        config = self.config
        save_checkpoint(
            self.run.checkpoints,
            snapshot,
            self.layout,
            config.model_dump(mode="json"),
            self.content_id,
            self._totals().__dict__,
            config.checkpoint.keep,
        )

    def _totals(self) -> Progress:
        assert self.backend is not None
        p = self.progress
        restarts = {k: p.restarts.get(k, 0) + self.backend.restarts().get(k, 0) for k in p.restarts}
        wall = self.base_wall_s + time.perf_counter() - self.started
        releases = p.releases + (self.controller.releases if hasattr(self, "controller") else 0)
        controller = getattr(self, "controller", None)
        flow = controller.flow.state() if isinstance(controller, AsynchronousController) else None
        return Progress(p.tasks_seen, wall, p.train_s, releases, restarts, p.wandb_run, flow)

    # ----------------------------------------------------------------- the end

    def _conclude(self) -> dict[str, Any]:
        assert self.backend is not None
        evaluation = self.config.evaluation
        version = self.config.outer.steps
        result = self._evaluate(version, evaluation.split, evaluation.episodes)
        snapshot = self.backend.snapshot()
        meta_params = self.layout.unflatten(torch.from_numpy(np.array(snapshot["weights"])))
        totals = self._totals()
        summary = {
            "name": self.config.name,
            "version": version,
            "tasks_seen": totals.tasks_seen,
            "tasks_per_s": totals.tasks_seen / totals.train_s if totals.train_s else 0.0,
            "wall_s": totals.wall_s,
            "workers": len(self.backend.workers()),
            "programs": self.programs,
            "worker_memory": {"predicted": self.decided.memory, "measured": self.memory},
            "meta_params_sha256": sha256_of(meta_params),
            "evaluation": result,
            "restarts": totals.restarts,
            "releases": totals.releases,
            "wandb_run": totals.wandb_run,
            "content_id": self.content_id,
            "runtime": {
                **self.backend.describe(),
                "torch": torch.__version__,
                "threads_per_worker": self.config.runtime.threads_per_worker,
            },
        }
        self.run.save_summary(summary)
        self._pictures(meta_params)
        return summary

    def _pictures(self, meta_params: dict[str, torch.Tensor]) -> None:
        from metadist.figures import CURVE, INSTANCES, draw_episodes
        from metadist.report import write_report

        evaluation = self.config.evaluation
        source = self.experiment.source(evaluation.split, self.experiment.evaluation_size)
        batch = source.episodes(self.config.seed, f"evaluation/{evaluation.split}", [0, 1, 2, 3])
        before, after = self.learner.outputs(meta_params, batch.to("cpu", next(iter(meta_params.values())).dtype))
        picture = draw_episodes(batch, self.run.path / "episodes.png", before, after)
        write_report(self.run.path)
        if (by_instance := self.run.path / INSTANCES).is_file():
            self.trackers.log_picture("accuracy_by_instance", by_instance)
        self.trackers.log_picture("learning_curve", self.run.path / CURVE)
        if picture is not None:
            self.trackers.log_picture("episodes", picture)


class _StopSignals(contextlib.AbstractContextManager["_StopSignals"]):
    """Ctrl-C and SIGTERM finish the step; a second one leaves at once."""

    signum: int | None = None

    def __enter__(self) -> _StopSignals:
        self._old = {}
        with contextlib.suppress(ValueError):  # not the main thread: leave signals to whoever owns them
            for s in (signal.SIGINT, signal.SIGTERM):
                self._old[s] = signal.signal(s, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:
            raise Interrupted(signum)
        self.signum = signum


def evaluate(run_dir: Path, episodes: int | None = None, stand_ins: dict[str, Any] | None = None) -> dict[str, Any]:
    """The evaluation of a run's newest checkpoint, computed in this process."""
    learner, experiment, checkpoint = load_learner(run_dir, stand_ins)
    config = experiment.config.evaluation
    count = episodes or config.episodes
    size = experiment.evaluation_size
    round = evaluation_round(checkpoint.version, config.split, count, _EVALUATION_MICROBATCH, size)
    source = experiment.source(config.split, size)
    pieces: dict[str, list[np.ndarray]] = {}
    dtype = next(iter(checkpoint.meta_params.values())).dtype
    for m in range(round.microbatches):
        batch = source.episodes(experiment.config.seed, round.stream, round.episodes(m))
        with torch.no_grad():
            for name, values in learner.evaluate(checkpoint.meta_params, batch.to("cpu", dtype)).items():
                pieces.setdefault(name, []).append(values.double().numpy().reshape(-1))
    metrics = {k: np.concatenate(v) for k, v in pieces.items()}
    result = summarise(metrics, learner.objective.metric, config.split, learner.model.batchnorm)
    return {"run_dir": str(run_dir), "version": checkpoint.version, **result}


def replay(run_dir: Path, version: int | None = None) -> dict[str, Any]:
    """Makes an asynchronous run's weights again from its log of updates, in this process.

    The options are those of the run's config: a run whose schedule or optimizer was changed at a resume cannot be made
    again.

    Args:
        run_dir: the run's directory.
        version: as far as this one, of which there must be a checkpoint; None: the newest.

    Returns:
        ``run_dir, version, meta_params_sha256, same``: whether they are the bits of the checkpoint.

    Raises:
        RunDirError: there is no log, it is cut, or it does not reach the version.
    """
    run = RunDirectory.open(run_dir)
    log = updates(run_dir)
    if version is None:
        checkpoint, _ = newest_whole_checkpoint(run.checkpoints)
    else:
        checkpoint = load_checkpoint(run.checkpoints / f"{version:08d}")
    if not 0 < checkpoint.version <= len(log):
        found = f"has {len(log)} updates, but the checkpoint is of version {checkpoint.version}"
        raise RunDirError(run_dir / UPDATES, found, "name a version that both have")
    experiment = Experiment(run.load_config())
    learner = experiment.learner()
    options = outer_options(experiment, learner, Layout.of(learner.initial_meta_params()))
    last: dict[str, torch.Tensor] = {}
    steps = replayed(experiment, options, log[: checkpoint.version])
    for _, made in track(steps, "replaying", checkpoint.version, console=Console(stderr=True), transient=True):
        last = made
    digest = sha256_of(last)
    same = digest == sha256_of(checkpoint.meta_params)
    return {"run_dir": str(run_dir), "version": checkpoint.version, "meta_params_sha256": digest, "same": same}


def load_learner(run_dir: Path, stand_ins: dict[str, Any] | None = None) -> tuple[Algorithm, Experiment, Checkpoint]:
    """The learner of a run with its newest checkpoint."""
    run = RunDirectory.open(run_dir)
    experiment = Experiment(run.load_config(), **(stand_ins or {}))
    torch.set_num_threads(experiment.config.runtime.threads_per_worker)
    checkpoint, _ = newest_whole_checkpoint(run.checkpoints)
    learner = experiment.learner()
    check_fits(checkpoint, Layout.of(learner.initial_meta_params()), None, run_dir)
    return learner, experiment, checkpoint
