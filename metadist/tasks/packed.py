"""What sources over a shard set have in common."""

from __future__ import annotations

from typing import Self

from metadist.data.shards import ShardSet
from metadist.errors import DataError
from metadist.tasks.base import TaskSource


def check_sizes(**sizes: int) -> None:
    """Fails where a size of an episode is below 1.

    Raises:
        DataError: it names the field of ``tasks``.
    """
    for name, size in sizes.items():
        if size < 1:
            raise DataError(f"tasks.{name}", f"{size} is too few", "it must be at least 1")


class PackedTasks(TaskSource):
    """Tasks over a shard set, whose splits share its files and whatever of it is in memory.

    A subclass opens the set as ``self._shards`` and takes a split up in :meth:`_use`.
    """

    _shards: ShardSet

    def _use(self, split: str) -> None:
        """Takes the classes of ``split``.

        Raises:
            DataError: the set lacks it, or it is too small.
        """
        raise NotImplementedError

    def split(self, name: str) -> Self:
        """The tasks of another split, over the same files and memory."""
        other = object.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._use(name)
        return other

    def close(self) -> None:
        """Closes the shards."""
        self._shards.close()
