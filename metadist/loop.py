"""The loop of a run: rounds, updates, evaluations and checkpoints, from its first step to its summary."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from metadist.algorithms import Algorithm
from metadist.checkpoint import Checkpoint, check_fits, newest_whole_checkpoint
from metadist.checkpoint_writer import CheckpointWriter
from metadist.errors import ConfigError, NonFiniteError, RunDirError, ServerLostError
from metadist.evaluation import evaluation_round, summarise, tasks_together
from metadist.experiment import Experiment
from metadist.history import UpdateLog
from metadist.origin import code_version
from metadist.outer.gradient import Layout, sha256_of
from metadist.recording import Recorder
from metadist.resolve import resolve
from metadist.rounds import Round
from metadist.rundir import RunDirectory
from metadist.runtime import open_backend
from metadist.runtime.asynchronous import AsynchronousController
from metadist.runtime.backend import Backend
from metadist.runtime.controller import Controller, RoundResult
from metadist.sending import send_checkpoints
from metadist.server import outer_options
from metadist.showing import show_run
from metadist.staleness import Flow
from metadist.stopping import Interrupted, StopSignals
from metadist.totals import Totals
from metadist.tracking import ConsoleTracker, JsonlTracker, PrometheusTracker, RunInfo, Trackers, WandbTracker
from metadist.tracking.wandb import sweeps_run
from metadist.worker import training_round


class Training:
    """One process's part of a run."""

    def __init__(self, experiment: Experiment, run: RunDirectory) -> None:
        decided = resolve(experiment)
        self.experiment, self.run, self.config = decided.experiment, run, decided.experiment.config
        self.learner: Algorithm = self.experiment.learner()
        initial = self.learner.initial_meta_params()
        self.layout = Layout.of(initial)
        self.start: dict[str, Any] = {"version": 0, "weights": self.layout.flatten(initial).numpy(), "outer_state": {}}
        self.learner.model.let_go_of_initial_params()
        self.metric = self.learner.objective.metric
        self.decided = decided
        self.totals = Totals()
        self.backend: Backend | None = None
        self.store = run.store(self.config)
        self.stop = StopSignals()
        self.wandb: WandbTracker | None = None

    def __enter__(self) -> Training:
        self.stop.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            if self.backend is not None:
                self.backend.close()
            self.experiment.close()
        finally:
            self.stop.__exit__()

    # ----------------------------------------------------------------- from start to end

    def run_all(self, checkpoint: Checkpoint | None, faults: list[str]) -> None:
        """Trains from ``checkpoint`` to the last step, evaluates and reports."""
        started = time.perf_counter()
        # Whatever can be refused is refused before anything is written.
        self._refuse_what_cannot_be_partial()
        self.outer = outer_options(self.experiment, self.learner, self.layout)
        content_id = self.experiment.source(self.experiment.train_split).describe().get("content_id")
        self._open_evaluation_sources()
        if checkpoint is not None:
            self.start = self._checked_snapshot(checkpoint, content_id)
        self.backend = open_backend(self.experiment)
        self.stop.listen()
        self.run.claim()
        self._count_restarts(resumed=checkpoint is not None)
        try:
            self._run(content_id, faults, started, resumed=checkpoint is not None)
        finally:
            self.run.release()

    def _run(self, content_id: str | None, faults: list[str], started: float, resumed: bool) -> None:
        assert self.backend is not None
        self.content_id, self.base_wall_s, self.started = content_id, self.totals.wall_s, started
        self.code = code_version()
        version = self.start["version"]
        self.backend.start(self.start, self.outer)
        if self.config.checkpoint.path is not None:
            self.run.take(self.store)
        self.run.save_config(self.config)
        self._start_trackers(version)
        self.writer = CheckpointWriter(
            self.store, self.layout, self.config.model_dump(mode="json"), content_id, self.config.checkpoint,
            self.trackers.message, self.experiment.inputs().told(),
        )  # fmt: skip
        code = 1
        summary: dict[str, Any] = {}
        try:
            if self.wandb is not None:
                self.totals.wandb_run = self.wandb.run_id
            for fault in faults:
                self.trackers.message(f"passed over a damaged checkpoint: {fault}")
            for line in self.decided.notable():
                self.trackers.message(line)
            self.controller = self._controller(version)
            if not resumed:
                self._checkpoint(self.start, last=True)  # a place that cannot be written is found now
            self.start = {}  # the server has it: of a large model it would fill memory to no end
            self.run.begun = True
            summary = self._through(version)
            code = 0
        except Interrupted as e:
            code = 128 + e.signum
            raise
        except NonFiniteError as e:
            self.trackers.alert("diverging", f"{e.where}: {e.problem}")
            raise
        finally:
            self.writer.close()
            self.trackers.finish(summary, code)

    def _through(self, version: int) -> dict[str, Any]:
        """The steps and the conclusion; from the last checkpoint again, as often as the server is lost."""
        while True:
            try:
                self._steps(version)
                return self._conclude()
            except ServerLostError as e:
                version = self._restore(e)

    def _count_restarts(self, resumed: bool) -> None:
        """Goes on from the counts of the checkpoint, or of the run directory if it has seen more."""
        counts, kept = self.totals.restarts, self.run.restarts()
        for kind, count in kept.items():
            counts[kind] = max(counts.get(kind, 0), count)
        counts["driver"] = counts.get("driver", 0) + (resumed or bool(kept))
        self.run.keep_restarts(counts)

    def _tell(self, text: str) -> None:
        """Says what has happened; if something was lost, that is kept at once."""
        self.trackers.message(text)
        self.run.keep_restarts(self._restarts())

    def _restore(self, error: ServerLostError) -> int:
        """Goes back to the newest whole checkpoint, with the workers there are; returns its version."""
        assert self.backend is not None
        self.writer.settle()
        checkpoint, faults = newest_whole_checkpoint(self.store)
        self.backend.restore(checkpoint.snapshot, error)
        kept = {name: getattr(self.totals, name) for name in ("wall_s", "restarts", "releases", "wandb_run")}
        self.totals = replace(Totals.of(checkpoint), **kept)
        self.trackers.rewind(checkpoint.version)
        self.recorder.rewind()
        for fault in faults:
            self.trackers.message(f"passed over a damaged checkpoint: {fault}")
        self._tell(f"{error.where} {error.problem}; going on from step {checkpoint.version}")
        earlier, self.controller = self.controller, self._controller(checkpoint.version)
        self.controller.take_over(earlier)
        return checkpoint.version

    def _controller(self, version: int) -> Controller:
        """What gathers updates: those of whole meta-batches, or of what comes first. The latter two keep a log."""
        assert self.backend is not None
        runtime, told = self.config.runtime, self._tell
        timeout = runtime.lease_timeout_s
        self.log = UpdateLog(self.run.path, version) if runtime.max_staleness or runtime.quorum < 1 else None
        if not runtime.max_staleness:
            return Controller(self.backend, timeout, told, quorum=runtime.quorum)
        enough = runtime.microbatches_per_update or training_round(self.experiment, 0).microbatches
        flow = Flow(
            self.config.outer.steps * enough, enough, runtime.max_staleness, runtime.staleness_weighting,
            self.totals.flow,
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

    def _checked_snapshot(self, checkpoint: Checkpoint, content_id: str | None) -> dict[str, Any]:
        check_fits(checkpoint, self.layout, content_id, self.run.path)
        if checkpoint.version > self.config.outer.steps:
            raise RunDirError(
                self.run.path,
                f"is at step {checkpoint.version}, past outer.steps={self.config.outer.steps}",
                f"raise it: `metadist resume {self.run.path} outer.steps=...`",
            )
        self.totals = Totals.of(checkpoint)
        return checkpoint.snapshot

    def _open_evaluation_sources(self) -> None:
        evaluation = self.config.evaluation
        splits = {evaluation.split} | ({evaluation.validation_split} if evaluation.every else set())
        for split in splits:
            self.experiment.source(split, self.experiment.evaluation_size)

    def _start_trackers(self, version: int) -> None:
        tracking = self.config.tracking
        members: list[Any] = [JsonlTracker()]
        if tracking.wandb.mode != "disabled":
            w = tracking.wandb
            self.wandb = WandbTracker(mode=w.mode, project=w.project, entity=w.entity, tags=w.tags)
            members.append(self.wandb)
            # Known before the client is: a run that is killed at once is the same one afterwards.
            self.totals.wandb_run = self.totals.wandb_run or sweeps_run() or self.run.run_id()
        if tracking.prometheus and self.config.runtime.type == "ray":
            members.append(PrometheusTracker())
        if tracking.console:
            members.append(ConsoleTracker())
        self.trackers = Trackers(members)
        self.recorder = Recorder(self.config, self.trackers)
        assert self.backend is not None
        info = RunInfo(
            run_dir=self.run.path, name=self.config.name, config=self.config.model_dump(mode="json"),
            total_steps=self.config.outer.steps, start_version=version, wandb_run_id=self.totals.wandb_run,
            workers=self.backend.describe()["workers"], metric=self.metric, code=self.code, content_id=self.content_id,
        )  # fmt: skip
        self.trackers.start(info)

    # ----------------------------------------------------------------- the loop

    def _steps(self, version: int) -> None:
        """Rounds until the last step."""
        if self._evaluates(version) and self.totals.evaluated < version:
            self._validate(version)  # the run was stopped before it
        with self.stop.after_the_step():
            while version < self.config.outer.steps:
                version = self._step(version)
                if self.stop.signum is not None:
                    raise Interrupted(self.stop.signum)

    def _step(self, version: int) -> int:
        """Makes the next version. The round after it is given out before this one is written down."""
        assert self.backend is not None
        round = self._round(version)
        if self.controller.begun != round:
            self.controller.begin(round)
        result = self.controller.finish()
        following = self._round(version + 1)
        before = time.perf_counter()
        stats = self._commit(version, result)
        self.controller.committed()
        server_s = time.perf_counter() - before
        version += 1
        last, stopping = version == self.config.outer.steps, self.stop.signum is not None
        evaluates = self._evaluates(version) and not stopping
        keeps = stopping or last or version % self.config.checkpoint.every == 0
        snapshot = self.backend.snapshot() if keeps else None
        if self._goes_on(version) and self.controller.begun != following:
            self.controller.begin(following)
        self.recorder.step(version, result, stats, server_s, self.totals, self.log, self._standing())
        best = evaluates and self._validate(version)
        if keeps or best:
            self._checkpoint(snapshot or self.backend.snapshot(), best, last=last or stopping)
        return version

    def _commit(self, version: int, result: RoundResult) -> dict[str, float]:
        assert self.backend is not None
        try:
            return self.backend.commit(version, result.tasks, result.slots)
        except FloatingPointError as e:
            raise NonFiniteError(
                f"step {version + 1}", f"{e}; no update was made of it", "lower outer.lr or algorithm.inner_lr"
            ) from e

    def _goes_on(self, version: int) -> bool:
        """Whether the round of ``version`` begins with it: nothing else is to be computed first, and nothing ends."""
        ends = version == self.config.outer.steps or self.stop.signum is not None
        return not (ends or self._evaluates(version))

    def _evaluates(self, version: int) -> bool:
        every = self.config.evaluation.every
        return bool(every) and version > 0 and version % every == 0

    def _validate(self, version: int) -> bool:
        """An evaluation during training; whether it is the best so far."""
        evaluation = self.config.evaluation
        found = self._evaluate(version, evaluation.validation_split, evaluation.validation_episodes)
        self.totals.evaluated, best = version, self.totals.best
        sign = 1 if self.learner.objective.higher_is_better else -1
        if best is not None and sign * found["mean"] <= sign * best["mean"]:
            return False
        self.totals.best = {"version": version, "mean": found["mean"], "split": found["split"]}
        return True

    def _round(self, version: int) -> Round:
        return training_round(self.experiment, version, self.learner.tasks_held_for)

    def _evaluate(self, version: int, split: str, episodes: int) -> dict[str, Any]:
        size = self.experiment.evaluation_size
        round = evaluation_round(version, split, episodes, tasks_together(self.layout.numel), size)
        result = self.controller.run(round)
        summary = summarise(result.metrics, self.metric, split, self.learner.model.batchnorm)
        self.trackers.log_evaluation(version, summary)
        return summary

    def _checkpoint(self, snapshot: dict[str, Any], best: bool = False, last: bool = False) -> None:
        self.writer.write(snapshot, asdict(self._totals_now()), best, last)

    def _totals_now(self) -> Totals:
        assert self.backend is not None
        p = self.totals
        wall = self.base_wall_s + time.perf_counter() - self.started
        controller = getattr(self, "controller", None)
        flow = controller.flow.state() if isinstance(controller, AsynchronousController) else None
        return replace(p, wall_s=wall, releases=self._releases(), restarts=self._restarts(), flow=flow)

    def _standing(self) -> dict[str, Any]:
        """Of the cluster: who is there, and what was lost so far."""
        assert self.backend is not None
        return {"workers": len(self.backend.workers()), "restarts": self._restarts(), "releases": self._releases()}

    def _releases(self) -> int:
        """Those of all resumptions."""
        return self.totals.releases + (self.controller.releases if hasattr(self, "controller") else 0)

    def _restarts(self) -> dict[str, int]:
        """Those of all resumptions, this one's included."""
        assert self.backend is not None
        now = self.backend.restarts()
        return {kind: count + now.get(kind, 0) for kind, count in self.totals.restarts.items()}

    # ----------------------------------------------------------------- the end

    def _conclude(self) -> dict[str, Any]:
        assert self.backend is not None
        evaluation = self.config.evaluation
        version = self.config.outer.steps
        result = self._evaluate(version, evaluation.split, evaluation.episodes)
        weights = np.require(self.backend.snapshot()["weights"], requirements="W")
        meta_params = self.layout.unflatten(torch.from_numpy(weights))
        totals = self._totals_now()
        summary = {
            "name": self.config.name,
            "version": version,
            "tasks_seen": totals.tasks_seen,
            "tasks_per_s": totals.tasks_seen / totals.train_s if totals.train_s else 0.0,
            "wall_s": totals.wall_s,
            "workers": len(self.backend.workers()),
            "programs": self.recorder.programs,
            "worker_memory": {"predicted": self.decided.memory, "measured": self.recorder.memory},
            "meta_params_sha256": sha256_of(meta_params),
            "evaluation": result,
            "restarts": totals.restarts,
            "releases": totals.releases,
            "best": totals.best,
            "checkpoints_failed": self.writer.failed,
            "wandb_run": totals.wandb_run,
            "content_id": self.content_id,
            "left_out": self.decided.left_out,
            "runtime": {
                **self.backend.describe(),
                "torch": torch.__version__,
                "threads_per_worker": self.config.runtime.threads_per_worker,
            },
            "code": self.code,
        }
        self.run.save_summary(summary)
        show_run(self.experiment, self.learner, meta_params, self.run.path, self.trackers, self._is_kept_elsewhere())
        if self._is_kept_elsewhere() and self.config.tracking.wandb.artifacts:
            self.writer.settle()
            send_checkpoints(self.store, version, self.trackers)
        return summary

    def _is_kept_elsewhere(self) -> bool:
        """Whether Weights & Biases has this run, online or offline."""
        return self.wandb is not None and self.wandb.run_id is not None
