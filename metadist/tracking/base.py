"""What a tracker is told, and a list of trackers behind the same interface."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from metadist.errors import TrackingError

_log = logging.getLogger(__name__)

PARTS = ("data", "compute", "transfer", "wait", "update")
"""What the time of a step is made of, in its order; ``NAME_s`` in the metrics of a step, adding up to ``step_s``."""


@dataclass(frozen=True)
class RunInfo:
    """What a tracker knows of a run when it starts.

    Args:
        run_dir: where the run's files lie; exists.
        name: the run's name.
        config: the resolved config, made of what JSON can hold.
        total_steps: outer steps of the whole run, those before a resume included.
        start_version: the version the run starts from; 0 unless it is resumed.
        wandb_run_id: the Weights & Biases run to continue, if there is one.
        workers: how many workers it asks for.
        metric: what tasks are judged by, ``accuracy`` or for example ``mean_squared_error``.
        code: which code runs: see :func:`metadist.origin.code_version`.
        content_id: of the data set, if it has one.
    """

    run_dir: Path
    name: str = "run"
    config: Mapping[str, Any] = field(default_factory=dict)
    total_steps: int = 0
    start_version: int = 0
    wandb_run_id: str | None = None
    workers: int = 1
    metric: str = "accuracy"
    code: Mapping[str, str] = field(default_factory=dict)
    content_id: str | None = None


@dataclass(frozen=True)
class ShownEpisode:
    """One episode of an evaluation, as a picture.

    Args:
        number: of the episode, in the evaluation's order.
        picture: a PNG of support and query examples, with what the learner made of them.
        before: the task's metric before adaptation.
        after: the same after adaptation.
    """

    number: int
    picture: bytes
    before: float
    after: float


class Tracker:
    """Is told of a run by its one driver, in the order of the versions. Every method does nothing by default."""

    def start(self, run: RunInfo) -> None:
        """Called once, before anything else; an error here ends the run."""

    def log(self, version: int, metrics: Mapping[str, Any]) -> None:
        """One outer step.

        Args:
            version: the version that the step made, from 1.
            metrics: numbers and words by name, as in a line of ``metrics.jsonl``. Some are mappings: ``worker_s`` from
                workers to the seconds that each computed, ``utilisation`` to the share of the step that was, ``gpu``
                to what each tells of its GPU; ``restarts`` from kinds of processes to counts.
        """

    def log_evaluation(self, version: int, result: Mapping[str, Any]) -> None:
        """One evaluation of ``version``.

        Args:
            version: of the meta-parameters that were judged.
            result: ``split, episodes, metric, pre_adaptation, mean, ci95, batchnorm``; of learners that read sequences
                also ``by_instance``, of those that adapt in steps ``by_step``.
        """

    def log_picture(self, name: str, path: Path) -> None:
        """A picture file (PNG)."""

    def log_episodes(self, version: int, split: str, episodes: Sequence[ShownEpisode]) -> None:
        """Some episodes of the last evaluation of ``version`` on ``split``."""

    def log_checkpoint(
        self, version: int, files: Mapping[str, Path], aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        """A checkpoint that is to outlast the run directory.

        Args:
            version: of it.
            files: what it consists of, by name; they are there until the call returns.
            aliases: ``latest``, ``best`` or both.
            metadata: ``version``, ``meta_params_sha256``, ``content_id`` and the like.
        """

    def alert(self, title: str, text: str) -> None:
        """Something that needs a person; rare."""

    def rewind(self, version: int) -> None:
        """The run goes back to ``version``; the steps after it will be told of once more."""

    def message(self, text: str) -> None:
        """A line for whoever watches the run."""

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        """Called once, at the end.

        Args:
            summary: as in ``summary.json``; empty where the run did not get that far.
            exit_code: 0 if it succeeded.
        """


class Trackers(Tracker):
    """Tells several trackers.

    A tracker that cannot be started ends the run before its first step. Once started, one that fails is
    reported a single time and never ends the run.

    Args:
        members: the trackers, told in this order.
    """

    def __init__(self, members: Iterable[Tracker]) -> None:
        self.members = tuple(members)
        self._warned: set[int] = set()

    def start(self, run: RunInfo) -> None:
        """Starts all of them, or none.

        Raises:
            TrackingError: one cannot be started; those before it have been finished.
        """
        for n, member in enumerate(self.members):
            try:
                member.start(run)
            except Exception as error:
                for started in self.members[:n]:
                    self._safely(started, "finish", lambda t: t.finish({}, 1))
                if isinstance(error, TrackingError):
                    raise
                raise TrackingError(
                    f"tracking.{_name(member)}", f"cannot be started ({type(error).__name__}: {error})"
                ) from error

    def log(self, version: int, metrics: Mapping[str, Any]) -> None:
        self._each("log", lambda t: t.log(version, metrics))

    def log_evaluation(self, version: int, result: Mapping[str, Any]) -> None:
        self._each("log_evaluation", lambda t: t.log_evaluation(version, result))

    def log_picture(self, name: str, path: Path) -> None:
        self._each("log_picture", lambda t: t.log_picture(name, path))

    def log_episodes(self, version: int, split: str, episodes: Sequence[ShownEpisode]) -> None:
        self._each("log_episodes", lambda t: t.log_episodes(version, split, episodes))

    def log_checkpoint(
        self, version: int, files: Mapping[str, Path], aliases: Sequence[str], metadata: Mapping[str, Any]
    ) -> None:
        self._each("log_checkpoint", lambda t: t.log_checkpoint(version, files, aliases, metadata))

    def alert(self, title: str, text: str) -> None:
        self._each("alert", lambda t: t.alert(title, text))

    def rewind(self, version: int) -> None:
        self._each("rewind", lambda t: t.rewind(version))

    def message(self, text: str) -> None:
        self._each("message", lambda t: t.message(text))

    def finish(self, summary: Mapping[str, Any], exit_code: int) -> None:
        self._each("finish", lambda t: t.finish(summary, exit_code))

    def _each(self, what: str, call: Callable[[Tracker], None]) -> None:
        for member in self.members:
            self._safely(member, what, call)

    def _safely(self, member: Tracker, what: str, call: Callable[[Tracker], None]) -> None:
        try:
            call(member)
        except Exception as error:
            if id(member) not in self._warned:
                self._warned.add(id(member))
                _log.warning(
                    "tracking.%s: %s failed (%s: %s); the run goes on, and later failures of it are not reported",
                    _name(member), what, type(error).__name__, error,
                )  # fmt: skip


def _name(member: Tracker) -> str:
    return type(member).__name__.removesuffix("Tracker").lower() or "tracker"
