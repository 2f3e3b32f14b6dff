"""The errors a user can meet, each saying what was found, what was wanted and how to mend it."""

from __future__ import annotations

from typing import Any


def first_line(error: BaseException) -> str:
    """The first line of an error's text, or its type where it has none: enough of somebody else's error."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


class MetadistError(Exception):
    """A failure the user can act on; the command line prints it without a traceback.

    Args:
        where: the field, file or process at fault, e.g. ``tasks.ways`` or ``shards/000.tar``.
        problem: what is wrong, naming the value that was found.
        mend: what the user can do about it (optional).

    The message reads ``where: problem; mend``.
    """

    exit_code = 1

    def __init__(self, where: Any, problem: str, mend: str = "") -> None:
        self.where, self.problem, self.mend = str(where), problem, mend
        super().__init__(f"{where}: {problem}" + (f"; {mend}" if mend else ""))

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions with several arguments do not survive a process boundary by themselves.
        return type(self), (self.where, self.problem, self.mend)


class ConfigError(MetadistError):
    """A config, an override or a command line that cannot be used."""

    exit_code = 2


class DataError(MetadistError):
    """A shard set, an image or a class list that is missing, damaged or too small."""


class CheckpointError(MetadistError):
    """A checkpoint that is cut, altered, or made for something else."""


class RunDirError(MetadistError):
    """A run directory that exists already, is missing, or is not a run."""


class NonFiniteError(MetadistError):
    """A loss or gradient that is not finite; raised before the update is applied."""


class ClusterError(MetadistError):
    """Ray cannot be reached, or has not what the config asks for."""


class ServerLostError(ClusterError):
    """The parameter server, or the weights on its node, cannot be reached any more; a run goes on from a checkpoint."""


class TrackingError(MetadistError):
    """A tracker that was asked for cannot be started."""
