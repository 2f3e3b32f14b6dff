"""Changes to bytes and to what JSON or YAML holds, drawn from a generator."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

INTERESTING = (0, 1, 0x7F, 0x80, 0xFF)
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, 10**30, -(2**63), 0.5, 1e308, -0.0, "", "x", "../../etc/passwd", "/etc/passwd",
    "pipe:touch pwned", "a" * 5000, "\x00", "\ud7ff", [], {}, [[]], [1, 2, 3], {"a": {"b": []}}, [None] * 50,
)  # fmt: skip


def changed(data: bytes, rng: random.Random) -> bytes:
    """``data`` with one to four changes, never the same as before."""
    out = bytearray(data)
    while True:
        for _ in range(rng.randint(1, 4)):
            _change(out, rng)
        if out != data:
            return bytes(out)


def _change(out: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(out) + 1)
    length = min(rng.choice((1, 1, 2, 8, 64, 512)), len(out) - at)
    kind = rng.randrange(8)
    if kind == 0 and at < len(out):
        out[at] ^= 1 << rng.randrange(8)
    elif kind == 1 and at < len(out):
        out[at] = rng.choice(INTERESTING)
    elif kind == 2:
        del out[at:]
    elif kind == 3:
        del out[at : at + length]
    elif kind == 4:
        out[at:at] = rng.randbytes(rng.choice((1, 2, 16, 512)))
    elif kind == 5:
        out[at:at] = out[at : at + length]
    elif kind == 6:
        out[at : at + length] = rng.randbytes(length)
    else:
        other = rng.randrange(len(out) + 1)
        out[at : at + length] = out[other : other + length]


def restructured(value: Any, rng: random.Random) -> Any:
    """A JSON value with one to three of its parts gone, doubled, or replaced by something strange."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        value = _restructure(value, rng)
    return value


def _restructure(value: Any, rng: random.Random) -> Any:
    places = list(_places(value))
    if not places:
        return rng.choice(STRANGE)
    holder, key = rng.choice(places)
    kind = rng.randrange(4)
    if kind == 0:
        del holder[key]
    elif kind == 1:
        _, other = rng.choice(places)
        if isinstance(holder, dict):
            holder[str(other)] = copy.deepcopy(holder[key])
        else:
            holder.insert(key, copy.deepcopy(holder[key]))
    elif kind == 2:
        there, other = rng.choice(places)
        holder[key] = copy.deepcopy(there[other])
    else:
        holder[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def _places(value: Any) -> Any:
    if isinstance(value, dict):
        for key in value:
            yield value, key
            yield from _places(value[key])
    elif isinstance(value, list):
        for i in range(len(value)):
            yield value, i
            yield from _places(value[i])


def as_json(value: Any) -> bytes:
    """JSON as anybody's program may write it: NaN and all."""
    return json.dumps(value, indent=1).encode("utf-8", "surrogatepass")
