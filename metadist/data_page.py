"""A page about a shard set: what it holds, what its classes look like, and an episode as a learner meets it."""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from metadist.data import ShardSet, UniformSampler
from metadist.data.samplers import Ints
from metadist.files import write_for_a_person
from metadist.report_page import HEAD
from metadist.seeding import Rng

_CLASSES, _EXAMPLES, _TEXTS = 6, 8, 3  # shown of a split; of a class; of a class of texts
_WAYS, _QUERY, _PAST, _FUTURE = 5, 2, 8, 4
_BINS, _LONGEST, _SIDE = 10, 240, 112
_MOST = 1e9  # a rating that is shown as a number
_LETTERS = "ABCDE"
_ORDER = {"train": 0, "validation": 1, "test": 2}

_PAGE = (
    HEAD
    + """h3 { font-size: .95rem; margin: 1rem 0 .25rem; overflow-wrap: anywhere; }
h3:first-child { margin-top: 0; }
.count { display: grid; grid-template-columns: 7rem 1fr 3rem; gap: .25rem .6rem; align-items: center;
  font-size: .85rem; font-variant-numeric: tabular-nums; }
.count i { display: block; height: 1rem; border-radius: 3px; background: var(--after); min-width: 2px; }
.thumbs { display: flex; flex-wrap: wrap; gap: .3rem; }
.thumbs img { width: 3.2rem; border-radius: 4px; border: 1px solid var(--line); image-rendering: auto; }
.small img { image-rendering: pixelated; }
.items { display: flex; flex-wrap: wrap; gap: .5rem; }
.items figure { margin: 0; width: 4.6rem; } figcaption { font-size: .75rem; overflow-wrap: anywhere; }
.splits :is(th, td):first-child { white-space: nowrap; overflow-wrap: normal; }
ul { margin: 0; padding-left: 1.1rem; overflow-wrap: anywhere; } p { margin: .4rem 0; overflow-wrap: anywhere; }
.quiet { color: var(--quiet); font-size: .85rem; }
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<section>
<div class="hero">
{% for label, value in hero %}
<div><span>{{ label }}</span><b>{{ value }}</b></div>
{% endfor %}
</div>
<table class="facts">
{% for label, value in facts %}
<tr><th>{{ label }}</th><td>{{ value }}</td></tr>
{% endfor %}
</table>
</section>
<section>
<h2>Splits, and the episodes they can make</h2>
<table class="splits">
<tr><th>split</th><th>{{ units }}</th><th>examples</th><th>episodes</th></tr>
{% for split in splits %}
<tr><td>{{ split.name }}</td><td>{{ split.classes }}</td><td>{{ split.examples }}</td><td>{{ split.makes }}</td></tr>
{% endfor %}
</table>
</section>
<section>
<h2>Examples of {{ unit }}</h2>
{% for split in splits %}
<h3>{{ split.name }}</h3>
<div class="count">
{% for label, count, share in split.bars %}
<span>{{ label }}</span><i style="width: {{ '%.1f' | format(100 * share) }}%"></i><span>{{ count }}</span>
{% endfor %}
</div>
{% endfor %}
<p class="quiet">How many {{ units }} have how many examples.</p>
</section>
{% if ratings %}
<section>
<h2>Ratings</h2>
<div class="count">
{% for label, count, share in ratings %}
<span>{{ label }}</span><i style="width: {{ '%.1f' | format(100 * share) }}%"></i><span>{{ count }}</span>
{% endfor %}
</div>
<p class="quiet">Of the {{ units }} shown below.</p>
</section>
{% endif %}
{% macro examples(shown) %}
{% if shown.pictures %}
<div class="thumbs{% if small %} small{% endif %}">
{% for url in shown.pictures %}
<img src="{{ url }}" alt="an example of {{ shown.name }}">
{% endfor %}
</div>
{% elif shown.bars %}
<div class="count">
{% for label, count, share in shown.bars %}
<span>{{ label }}</span><i style="width: {{ '%.1f' | format(100 * share) }}%"></i><span>{{ count }}</span>
{% endfor %}
</div>
{% else %}
<ul>
{% for text in shown.texts %}
<li>{{ text }}</li>
{% endfor %}
</ul>
{% endif %}
{% endmacro %}
{% for episode in episodes %}
<section>
<h2>{{ episode.title }}</h2>
<p class="quiet">{{ episode.told }}</p>
{% for part in episode.parts %}
<h3>{{ part.title }}</h3>
{% if part.pictures %}
<div class="items{% if small %} small{% endif %}">
{% for name, url in part.pictures %}
<figure><img src="{{ url }}" alt="an example of {{ name }}"><figcaption>{{ name }}</figcaption></figure>
{% endfor %}
</div>
{% else %}
<ul>
{% for name, text in part.texts %}
<li>{% if name %}<b>{{ name }}</b> {% endif %}{{ text }}</li>
{% endfor %}
</ul>
{% endif %}
{% endfor %}
</section>
{% endfor %}
{% for split in splits %}
<section>
<h2>Some {{ units }} of {{ split.name }}</h2>
{% for shown in split.shown %}
<h3>{{ shown.name }}</h3>
{{ examples(shown) }}
{% endfor %}
</section>
{% endfor %}
<footer><code>{{ content_id }}</code></footer>
</main>
</body>
</html>
"""
)


def write_data_page(path: Path, to: Path) -> Path:
    """Writes a page about the shard set ``path``: one HTML file that fetches nothing.

    Raises:
        DataError: if the set is missing or damaged, or the page cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(_PAGE).render(**_Described(ShardSet(path)).contents())
    write_for_a_person(to, page)
    return to


@dataclass(frozen=True)
class _Shown:
    """Some examples of a class, in one of three forms."""

    name: str
    pictures: Sequence[str] = ()
    texts: Sequence[str] = ()
    bars: Sequence[tuple[str, str, float]] = ()


class _Described:
    """What the page says of one set."""

    def __init__(self, shards: ShardSet) -> None:
        self.shards, self.manifest = shards, shards.manifest
        notes = self.manifest.notes
        self.is_text = self.manifest.field.encoding == "utf-8"
        self.is_ratings = self.is_text and notes.get("kind") == "ratings" and isinstance(notes.get("items"), list)
        self.unit, self.units = ("a user", "users") if self.is_ratings else ("a class", "classes")
        edges = np.searchsorted(shards.index["class"], np.arange(len(self.manifest.classes) + 1))
        self.first_rows = shards.rows[edges]

    def contents(self) -> dict[str, Any]:
        m, notes = self.manifest, self.manifest.notes
        size = sum(s.bytes for s in m.shards) + m.index.bytes
        facts = [
            ("what", self._what()),
            ("size", f"{size / 1e6:,.1f} MB, {len(m.shards):,} shard{'s' * (len(m.shards) != 1)}"),
        ]
        facts += [(label, text) for label, text in (("licence", m.licence), ("source", m.source)) if text]
        if isinstance(left := notes.get("left_out"), Mapping):
            facts.append(("left out", f"{sum(n for n in left.values() if isinstance(n, int)):,} that cannot be read"))
        order = sorted(m.splits, key=lambda split: (_ORDER.get(split, len(_ORDER)), split))
        classes = [(split, self.shards.classes_of(split)) for split in order]
        classes = [(split, members) for split, members in classes if len(members)]
        splits = [self._split(split, members) for split, members in classes]
        drawn = [self._episodes(split, members) for split, members in classes]
        return {
            "title": m.name,
            "hero": [(self.units, f"{len(m.classes):,}"), ("examples", f"{m.examples:,}")],
            "facts": facts,
            "unit": self.unit,
            "units": self.units,
            "splits": splits,
            "ratings": self._ratings([c for _, members in classes for c in _spread(members, _CLASSES)]),
            "episodes": next((episodes for episodes in drawn if episodes), []),
            "small": max(m.field.shape[:2], default=0) <= 48,
            "content_id": m.content_id,
        }

    def _what(self) -> str:
        if self.is_ratings:
            scale, items = self.manifest.notes.get("scale"), self.manifest.notes["items"]
            numbers = isinstance(scale, list) and [s for s in scale if isinstance(s, (int, float))]
            on = f", {numbers[0]:g} to {numbers[1]:g}" if numbers and len(numbers) == 2 else ""
            return f"ratings of {len(items):,} items{on}"
        if self.is_text:
            return "texts"
        height, width, *channels = self.manifest.field.shape
        colours = {1: "gray", 3: "colour"}.get(channels[0] if channels else 1, f"{channels} channels")
        return f"pictures of {width} x {height}, {colours}"

    def _rows(self, klass: int) -> Ints:
        return np.arange(self.first_rows[klass], self.first_rows[klass + 1], dtype=np.int64)

    def _split(self, split: str, members: Ints) -> dict[str, Any]:
        counts = self.first_rows[members + 1] - self.first_rows[members]
        return {
            "name": split,
            "classes": f"{len(members):,}",
            "examples": f"{counts.sum():,}",
            "makes": _makes(len(members), int(counts.min()), self.is_ratings),
            "bars": _bars(counts),
            "shown": [self._class(int(c)) for c in _spread(members, _CLASSES)],
        }

    def _class(self, klass: int) -> _Shown:
        name = self.manifest.classes[klass]
        rows = self._rows(klass)
        if self.is_ratings:
            values = [r["rating"] for r in map(_rating, self._texts(rows)) if r is not None]
            return _Shown(f"{name}: {len(rows):,} ratings", bars=_value_bars(values))
        return self._shown(name, rows[: _TEXTS if self.is_text else _EXAMPLES])

    def _shown(self, name: str, rows: Ints) -> _Shown:
        if not self.is_text:
            return _Shown(name, pictures=[_data_url(pixels) for pixels in self.shards.gather(rows)])
        texts = [self._texts(rows[i : i + 1])[0] for i in range(len(rows))]
        return _Shown(name, texts=[self._read(t) for t in texts] if self.is_ratings else [_cut(t) for t in texts])

    def _texts(self, rows: Ints) -> list[str]:
        """The texts of some rows in ascending order."""
        found: list[str] = []
        blocks = np.searchsorted(self.shards.rows, rows, side="right") - 1
        for block in dict.fromkeys(blocks.tolist()):
            texts = self.shards.texts(block)
            found += [texts[i] for i in (rows[blocks == block] - self.shards.rows[block]).tolist()]
        return found

    def _read(self, text: str) -> str:
        """A rating in words."""
        rating, items = _rating(text), self.manifest.notes["items"]
        if rating is None or not 0 <= rating["item"] < len(items):
            return _cut(text)
        when = rating.get("time")
        day = ""
        if isinstance(when, (int, float)) and 0 <= when < 1 << 35:
            day = f", {datetime.fromtimestamp(when, UTC):%Y-%m-%d}"
        return f"{rating['rating']:g} for {items[rating['item']]}{day}"

    def _ratings(self, users: Sequence[int]) -> list[tuple[str, str, float]]:
        if not self.is_ratings:
            return []
        texts = [text for user in users for text in self._texts(self._rows(user))]
        return _value_bars([r["rating"] for r in map(_rating, texts) if r is not None])

    def _episodes(self, split: str, members: Ints) -> list[dict[str, Any]]:
        """Two episodes of a split; none where it cannot make any."""
        counts = self.first_rows[members + 1] - self.first_rows[members]
        if self.is_ratings:
            return [self._user_episode(split, int(c)) for c in members[counts > 1][:2]]
        if len(members) < 2 or counts.min() < 2:
            return []
        ways, query = min(_WAYS, len(members)), min(_QUERY, int(counts.min()) - 1)
        drawn = UniformSampler(self.shards.pool(split), ways, 1 + query, False).draw(0, "page", [0, 1])
        return [self._episode(n, split, drawn.classes[n], drawn.rows[n]) for n in range(2)]

    def _episode(self, number: int, split: str, classes: Ints, rows: Ints) -> dict[str, Any]:
        names = self.shards.pool(split).names
        ways, each = rows.shape
        support = [f"{_LETTERS[n]}: {names[c]}" for n, c in enumerate(classes)]
        mixed = Rng(0, "page/order", number).permutation(ways * (each - 1))
        query = [_LETTERS[n] for n in range(ways) for _ in range(each - 1)]
        return {
            "title": f"Episode {number + 1}, of {split}: {ways} ways, 1 shot",
            "told": f"A learner sees the support with its letters, and must find those of the {len(query)} others.",
            "parts": [
                self._part("Support", support, rows[:, 0]),
                self._part("Query", [query[i] for i in mixed], rows[:, 1:].ravel()[mixed]),
            ],
        }

    def _user_episode(self, split: str, user: int) -> dict[str, Any]:
        rows = self._rows(user)
        past = min(_PAST, len(rows) - 1)
        parts = (("Support: the past", rows[:past]), ("Query: the future", rows[past : past + _FUTURE]))
        return {
            "title": f"An episode of {split}: user {self.manifest.classes[user]}",
            "told": "A learner sees what the user rated first, and must find what comes after.",
            "parts": [self._part(title, [""] * len(some), some) for title, some in parts],
        }

    def _part(self, title: str, names: Sequence[str], rows: Ints) -> dict[str, Any]:
        shown = self._shown(title, rows)
        pictures, texts = (list(zip(names, some)) for some in (shown.pictures, shown.texts))
        return {"title": title, "pictures": pictures, "texts": texts}


def _makes(classes: int, least: int, users: bool) -> str:
    """Which episodes a split can make, by the class with the fewest examples."""
    if users:
        return f"of one user: up to {least - 1} ratings to learn from with 1 to find" if least > 1 else "none"
    if classes < 2:
        return "none by itself: it has one class"
    if least < 2:
        return "none: a class has a single example"
    return f"up to {classes:,} ways, up to {least - 1:,} shots with 1 query"


def _spread(members: Ints, most: int) -> list[int]:
    """Up to ``most`` of them, evenly spread."""
    places = np.unique(np.linspace(0, len(members) - 1, min(most, len(members))).round().astype(int))
    return [int(members[i]) for i in places]


def _bars(counts: Ints) -> list[tuple[str, str, float]]:
    """How often which number occurs: (numbers, how often, share of the largest)."""
    low, high = int(counts.min()), int(counts.max())
    width = -(-(high - low + 1) // _BINS)
    found = []
    for start in range(low, high + 1, width):
        many = int(((counts >= start) & (counts < start + width)).sum())
        found.append((f"{start:,}" if width == 1 else f"{start:,} to {start + width - 1:,}", many))
    most = max(many for _, many in found)
    return [(label, f"{many:,}", many / most) for label, many in found]


def _value_bars(values: Sequence[float]) -> list[tuple[str, str, float]]:
    """How often each value occurs; values are joined to whole numbers where there are many."""
    kept = values if len(set(values)) <= 2 * _BINS else [float(round(v)) for v in values]
    counted = sorted(Counter(kept).items())
    if len(counted) > 2 * _BINS:
        return _bars(np.array([round(v) for v in values], dtype=np.int64))
    most = max((many for _, many in counted), default=1)
    return [(f"{value:g}", f"{many:,}", many / most) for value, many in counted]


def _rating(text: str) -> dict[str, Any] | None:
    """A rating from its JSON, or None if it is none."""
    try:
        found = json.loads(text)
        item, rating = int(found["item"]), float(found["rating"])
        return {**found, "item": item, "rating": rating} if abs(rating) <= _MOST else None  # NaN is not
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        return None


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "…"


def _data_url(pixels: NDArray[np.uint8]) -> str:
    """A small picture for the page; of other than one or three channels the first is shown."""
    from PIL import Image

    if pixels.ndim == 3 and pixels.shape[2] != 3:
        pixels = pixels[..., 0]
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.thumbnail((_SIDE, _SIDE))
    kind = "png" if max(image.size) <= 48 or image.mode == "L" else "jpeg"
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 85} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64," + base64.b64encode(out.getvalue()).decode()
