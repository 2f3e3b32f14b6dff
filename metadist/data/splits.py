"""Which classes are for training, which for validation and test: dealt at random, by group, or as somebody says."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from metadist.data import decode
from metadist.data.tolerance import named, short
from metadist.errors import DataError
from metadist.seeding import Rng

FRACTIONS = {"train": 0.64, "validation": 0.16, "test": 0.20}
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(("val", "valid", "validation", "dev"), "validation")
StrPath = str | os.PathLike[str]


class Membership:
    """What each class belongs to, a group or a split, as rows tell it one after another.

    Args:
        kind: ``group`` or ``split``, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.of: dict[str, str] = {}
        self._where: dict[str, str] = {}

    def add(self, klass: str, value: str, where: str) -> None:
        """A row says that ``klass`` is in ``value``.

        Raises:
            DataError: if another row said otherwise.
        """
        first = self.of.setdefault(klass, value)
        if first == value:
            self._where.setdefault(klass, where)
            return
        told = f"class {short(klass)} is in {self.kind} {value!r}, but in {first!r} at {self._where[klass]}"
        raise DataError(where, told, "keep it in one")


def deal(classes: int, fractions: Mapping[str, float], seed: int) -> dict[str, list[int]]:
    """Deals classes to splits at random; the first split takes what rounding leaves.

    Raises:
        DataError: if the fractions are negative or do not sum to 1.
    """
    if min(fractions.values(), default=-1.0) < 0 or abs(sum(fractions.values()) - 1) > 1e-6:
        mend = "give shares of the classes, e.g. 0.64 0.16 0.20"
        raise DataError("fractions", f"{dict(fractions)} do not sum to 1", mend)
    order = Rng(seed, "data/split").permutation(classes).tolist()
    splits: dict[str, list[int]] = {}
    first, *others = fractions
    for split in others:
        count = round(fractions[split] * classes)
        splits[split], order = sorted(order[:count]), order[count:]
    return {first: sorted(order), **splits}


def choose(
    names: Sequence[str],
    *,
    groups: Mapping[str, str] | None = None,
    told: Mapping[str, str] | None = None,
    listed: StrPath | None = None,
    fractions: Mapping[str, float] | None = None,
    seed: int = 0,
) -> dict[str, list[str]]:
    """The classes of each split. Those that a list leaves out are in none.

    Args:
        names: all classes.
        groups: group of each class: a group is in one split as a whole.
        told: split of each class, where the source says it.
        listed: JSON file of lists, ``{"train": [names of classes or groups], ...}``.
        fractions, seed: of the deal of classes or groups, where neither is given.

    Raises:
        DataError: if the list cannot be read, names what is not there, or names something twice.
    """
    if told is not None:
        by_split: dict[str, list[str]] = {}
        for name in names:
            by_split.setdefault(canonical(told[name]), []).append(name)
        return {split: by_split[split] for split in sorted(by_split)}
    units = list(names) if groups is None else sorted({groups[n] for n in names})
    if listed is None:
        dealt = deal(len(units), FRACTIONS if fractions is None else fractions, seed)
        chosen = {split: [units[i] for i in members] for split, members in dealt.items()}
    else:
        chosen = _listed(Path(listed), units, "class" if groups is None else "group")
    if groups is None:
        return chosen
    return {s: [n for n in names if groups[n] in set(members)] for s, members in chosen.items()}


def canonical(split: str) -> str:
    """``validation`` for ``val`` and the like; other names as they are."""
    return SPLIT_NAMES.get(split.lower(), split)


def numbered(splits: Mapping[str, Sequence[str]], names: Sequence[str]) -> dict[str, list[int]]:
    """The same by the numbers of the classes."""
    numbers = {name: i for i, name in enumerate(names)}
    return {split: sorted(numbers[name] for name in members) for split, members in splits.items()}


def _listed(path: Path, units: Sequence[str], kind: str) -> dict[str, list[str]]:
    owner: dict[str, str] = {}
    chosen: dict[str, list[str]] = {}
    for key, members in _lists(path).items():
        split = canonical(key)
        for name in members:
            where = f"{path}: {key}"
            if name not in units:
                raise DataError(where, f"no {kind} is named {short(name)}", _nearest(name, units))
            if name in owner:
                raise DataError(where, f"{kind} {short(name)} is also in {owner[name]!r}", "name it once")
            owner[name] = key
            chosen.setdefault(split, []).append(name)
    if not owner:
        raise DataError(path, f"names no {kind}", 'write {"train": [...], "validation": [...], "test": [...]}')
    return {split: sorted(members) for split, members in chosen.items()}


def _lists(path: Path) -> dict[str, list[str]]:
    try:
        if path.stat().st_size > decode.MAX_JSON_BYTES:
            raise DataError(path, f"{path.stat().st_size} bytes of JSON, more than {decode.MAX_JSON_BYTES}")
        body = decode.json_object(path.read_bytes(), str(path))
    except OSError as e:
        raise DataError(path, f"cannot be read ({e.strerror})", "give a JSON file of lists with --splits") from None
    for key, members in body.items():
        if not isinstance(members, list) or not all(isinstance(m, str) for m in members) or not key or "+" in key:
            raise DataError(f"{path}: {key}", "is not a split's list of names", 'write {"train": ["a", "b"], ...}')
    return body


def _nearest(name: str, units: Iterable[str]) -> str:
    every = list(units)
    close = difflib.get_close_matches(name, every, n=1)
    return f"did you mean {close[0]!r}?" if close else f"there are {named(every)}"
