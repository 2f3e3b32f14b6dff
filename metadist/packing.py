"""The folder that is sent with a job: which of its files, how large they are, and whether that is too much."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from metadist.config import in_words
from metadist.errors import ClusterError

EXCLUDES = (
    ".git",
    ".venv",
    "runs",
    "**/__pycache__",
    "*.pyc",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
)
"""Never sent, beside what ``.gitignore`` and ``.rayignore`` files name; patterns as in those."""

_LIMIT_ENV, _LIMIT = "RAY_max_grpc_message_size", 512 << 20
_NAMED = 5

Ignored = Callable[[Path], bool]


@dataclass(frozen=True)
class Tree:
    """What of a folder is sent.

    Args:
        root: the folder.
        files: how many.
        bytes: of all of them; Ray's package is no smaller.
        entries: bytes of each file or folder right below the root.
    """

    root: Path
    files: int
    bytes: int
    entries: dict[str, int]

    def __str__(self) -> str:
        return f"{self.root}, {self.files:,} file{'s' * (self.files != 1)} of {in_words(self.bytes)}"

    def check(self, limit: int | None = None) -> None:
        """Refuses what a cluster would not take, before anything is sent.

        Args:
            limit: bytes; None takes Ray's.

        Raises:
            ClusterError: it is larger, with what is large in it.
        """
        most = int(os.environ.get(_LIMIT_ENV, _LIMIT)) if limit is None else limit
        if self.bytes < most:
            return
        largest = sorted(self.entries.items(), key=lambda entry: -entry[1])[:_NAMED]
        named = ", ".join(f"{name} {in_words(size)}" for name, size in largest)
        raise ClusterError(
            self.root,
            f"would be sent with the job, {in_words(self.bytes)} in {self.files:,} files, and a cluster takes less "
            f"than {in_words(most)}: {named}",
            "name what the job does not need in .rayignore (data belong on storage that the nodes share), or run "
            "submit from a smaller folder",
        )


def tree_at(root: Path) -> Tree:
    """Measures a folder, without reading its files."""
    sizes: Counter[str] = Counter()
    files = 0
    for path in files_of(root):
        files += 1
        sizes[path.relative_to(root).parts[0]] += path.stat().st_size
    return Tree(root, files, sum(sizes.values()), dict(sizes))


def files_of(root: Path) -> Iterator[Path]:
    """The files that Ray packs of a folder."""
    yield from _walk(root, [_ignored(root, list(EXCLUDES))])


def _walk(path: Path, ignored: list[Ignored]) -> Iterator[Path]:
    ignored = [*ignored, *_ignore_files(path)]
    if any(matches(path) for matches in ignored):
        return
    if path.is_file():
        yield path
    elif path.is_dir():
        for below in path.iterdir():
            yield from _walk(below, ignored)


def _ignore_files(folder: Path) -> Iterator[Ignored]:
    git = [".gitignore"] if os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE") != "1" else []
    for name in [*git, ".rayignore"]:
        if (folder / name).is_file():
            yield _ignored(folder, (folder / name).read_text(errors="replace").splitlines())


def _ignored(folder: Path, patterns: list[str]) -> Ignored:
    from ray._private.thirdparty.pathspec import PathSpec  # the same matcher as the packing has

    spec = PathSpec.from_lines("gitwildmatch", patterns)
    return lambda path: bool(spec.match_file(str(path.relative_to(folder))))
