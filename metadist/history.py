"""What every update of an asynchronous run was made of, and the run made again from that.

An asynchronous run's weights depend on who was how fast. All of that is in ``updates.jsonl``: which microbatches, each
computed with which version, in which order and with which weight. The rest is arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from metadist.errors import RunDirError
from metadist.experiment import Experiment
from metadist.outer.gradient import Layout, placed
from metadist.rounds import lease_of
from metadist.server import ParameterServer
from metadist.staleness import Applied
from metadist.tracking.jsonl import append_line, keep_lines, read_lines, version_of
from metadist.worker import MetaWorker, training_round

UPDATES = "updates.jsonl"


class UpdateLog:
    """Writes ``RUN_DIR/updates.jsonl``, a line an update.

    Args:
        run_dir: the run's directory.
        version: the version the run goes on from; later lines are dropped.
    """

    def __init__(self, run_dir: Path, version: int = 0) -> None:
        self._path = run_dir / UPDATES
        keep_lines(self._path, [line for line in read_lines(self._path) if version_of(line) <= version])

    def append(
        self, version: int, slots: int, applied: list[Applied], dropped: list[tuple[int, int]], left_out: list[int]
    ) -> None:
        """One update.

        Args:
            version: that it made.
            slots: microbatches that its sum has room for.
            applied: what it was made of.
            dropped: (microbatch, base) of answers that were too old, and computed again.
            left_out: microbatches of the meta-batch that were not waited for.
        """
        made_of = [[a.slot, a.microbatch, a.base, a.weight] for a in applied]
        line = {"version": version, "slots": slots, "applied": made_of, "dropped": dropped, "left_out": left_out}
        append_line(self._path, line)


def updates(run_dir: Path) -> list[tuple[int, list[Applied]]]:
    """The updates of a run in their order: room for how many microbatches, and what they were made of.

    Raises:
        RunDirError: there is no log, or a line of it is missing.
    """
    lines = read_lines(run_dir / UPDATES)
    if not lines:
        raise RunDirError(
            run_dir / UPDATES,
            "is not there",
            "only runs with runtime.max_staleness above 0 or a runtime.quorum below 1 have one",
        )
    for number, line in enumerate(lines, 1):
        if line.get("version") != number:
            raise RunDirError(
                run_dir / UPDATES, f"lacks the update that made version {number}", "it cannot be replayed"
            )
    return [(line["slots"], [Applied(*entry) for entry in line["applied"]]) for line in lines]


def replayed(
    experiment: Experiment,
    outer: dict[str, Any],
    log: list[tuple[int, list[Applied]]],
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Makes a run's versions again, one worker and the server in this process.

    Args:
        experiment: the run's.
        outer: options of its meta-update.
        log: see :func:`updates`.

    Yields:
        Each version with its meta-parameters, from 1.
    """
    worker = MetaWorker(experiment)
    try:
        initial = experiment.learner().initial_meta_params()
        layout = Layout.of(initial)
        server = ParameterServer(layout.flatten(initial).numpy(), outer)
        weights, kept = {0: server.weights()}, experiment.config.runtime.max_staleness
        for version, (slots, applied) in enumerate(log):
            tasks = []
            for a in applied:
                lease = lease_of(a.microbatch, training_round(experiment, a.base), a.microbatch)
                _, blocks = worker.compute(lease, [weights[a.base]])
                server.add(version, slots, placed(blocks, a.slot, a.weight))
                tasks.append(a.weight * len(lease.round.episodes(lease.start)))
            filled = [a.slot for a in applied] if len(applied) < slots else None
            weights[version + 1], _ = server.commit(version, math.fsum(tasks), slots=filled)
            weights.pop(version - kept, None)
            yield version + 1, layout.unflatten(torch.from_numpy(weights[version + 1]))
    finally:
        worker.close()
