"""What a run adds up over all its resumptions: kept in its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter, ValidationError

from metadist.checkpoint import Checkpoint
from metadist.errors import CheckpointError, first_line


@dataclass
class Totals:
    """Totals of a run, and where it stands in what it does besides its steps.

    Args:
        tasks_seen, train_s, wall_s: tasks trained on, seconds of the steps, seconds of the whole.
        releases, restarts: leases that were given out again, and processes that were, by kind.
        wandb_run: its id there.
        flow: of an asynchronous run, the state of :class:`metadist.staleness.Flow`.
        evaluated: the last version that was evaluated during training.
        best: which of them was the best, and how good.
    """

    tasks_seen: int = 0
    wall_s: float = 0.0
    train_s: float = 0.0
    releases: int = 0
    restarts: dict[str, int] = field(default_factory=lambda: {"worker": 0, "server": 0, "driver": 0})
    wandb_run: str | None = None
    flow: dict[str, Any] | None = None
    evaluated: int = 0
    best: dict[str, Any] | None = None

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Totals:
        """Those in a checkpoint.

        Raises:
            CheckpointError: they will not do.
        """
        known = {k: v for k, v in checkpoint.progress.items() if k in cls.__dataclass_fields__}
        try:
            return TypeAdapter(cls).validate_python(known)
        except ValidationError as e:
            raise CheckpointError(
                f"checkpoint {checkpoint.version}", f"its progress will not do: {first_line(e)}"
            ) from e
