"""The page about a shard set tells what it holds, fetches nothing, and runs nothing that a set smuggles in."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from metadist.cli import main
from metadist.data import Field, pack_arrays, pack_classes, pack_csv, pack_ratings
from metadist.errors import DataError


def page(shards: Path) -> str:
    to = shards.parent / "page.html"
    told = CliRunner().invoke(main, ["data", "info", str(shards), "--html", str(to)])
    assert told.exit_code == 0 and f"page         {to}" in told.output, told.output
    return to.read_text()


def section(text: str, title: str) -> str:
    """Of a page, the section whose heading begins with ``title``."""
    return next(s for s in text.split("<section>") if f"<h2>{title}" in s)


def pictures(tmp_path: Path, counts: Sequence[int], shape: tuple[int, ...] = (6, 6)) -> Path:
    x = [np.full((n, *shape), 10 * c, dtype=np.uint8) for c, n in enumerate(counts)]
    splits = {"train": list(range(len(counts) - 1)), "test": [len(counts) - 1]}
    pack_arrays(x, [f"<b>{c}</b>" for c in range(len(counts))], splits, tmp_path / "set", block_examples=3)
    return tmp_path / "set"


@pytest.mark.parametrize("shape", [(6, 6), (6, 6, 3), (200, 100, 3), (6, 6, 5)])
def test_pictures_with_what_episodes_they_make(tmp_path: Path, shape: tuple[int, ...]) -> None:
    text = page(pictures(tmp_path, [20, 20, 7, 20], shape))
    assert re.search(r"<td>train</td><td>3</td><td>47</td><td>up to 3 ways, up to 6 shots with 1 query</td>", text)
    assert "<td>test</td><td>1</td><td>20</td><td>none by itself: it has one class</td>" in text
    assert text.index("<td>train</td>") < text.index("<td>test</td>")
    episode = section(text, "Episode 1, of train: 3 ways, 1 shot")
    support, query = episode.split("<h3>Query</h3>")
    assert len(re.findall("<figure>", support)) == 3 and len(re.findall("<figure>", query)) == 6
    letters = re.findall(r"<figcaption>([A-Z])</figcaption>", query)
    assert sorted(letters) == list("AABBCC") and letters != sorted(letters), "the query is mixed"
    assert "<b>1</b>" not in text and "&lt;b&gt;1&lt;/b&gt;" in text
    assert not re.search(r'(?:src|href)="(?!data:image/)', text) and "<script" not in text


def test_the_letters_of_an_episode_are_those_of_its_pictures(tmp_path: Path) -> None:
    episode = section(page(pictures(tmp_path, [20] * 6)), "Episode 1")
    by_letter: dict[str, set[str]] = {}
    for url, caption in re.findall(r'<img src="([^"]*)"[^>]*><figcaption>(.)', episode):
        by_letter.setdefault(caption, set()).add(url)
    assert len(by_letter) == 5 and all(len(urls) == 1 for urls in by_letter.values()), "one colour a class"
    assert len(set.union(*by_letter.values())) == 5


def test_how_many_classes_have_how_many_examples(tmp_path: Path) -> None:
    bars = section(page(pictures(tmp_path, [20, 20, 7, 45, 3])), "Examples of a class")
    found = re.findall(r'<span>([\d to]+)</span><i style="width: ([\d.]+)%"></i><span>(\d+)</span>', bars)
    assert [(a, n) for a, _, n in found if n != "0"] == [
        ("7 to 10", "1"),
        ("19 to 22", "2"),
        ("43 to 46", "1"),
        ("3", "1"),
    ]
    assert dict((a, w) for a, w, _ in found)["19 to 22"] == "100.0"


def test_a_class_of_one_example_makes_no_episode(tmp_path: Path) -> None:
    text = page(pictures(tmp_path, [3, 1, 3]))
    assert "<td>none: a class has a single example</td>" in text and "<h2>Episode" not in text


def test_texts(tmp_path: Path) -> None:
    rows = [f"text {c} {i} <script>alert(1)</script>,topic {c}" for i in range(4) for c in range(8)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows, f"{'x' * 5000},topic 0"]))
    pack_csv(tmp_path / "t.csv", tmp_path / "set", text_column="text", label_column="label")
    text = page(tmp_path / "set")
    assert "<script" not in text and html.escape("<script>") in text and "x" * 300 not in text
    episode = section(text, "Episode 1, of train: 5 ways")
    pairs = re.findall(r"<li><b>([A-E])(?:: topic (\d))?</b> text (\d)", episode)
    named = {letter: topic for letter, topic, _ in pairs if topic}
    assert len(pairs) == 15 and all(named[letter] == topic for letter, _, topic in pairs)


def test_ratings(tmp_path: Path) -> None:
    rows = [f"{u},{i},{0.5 * (1 + i % 10)},{86400 * i}" for u in range(1, 9) for i in range(30)]
    (tmp_path / "r.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]))
    pack_ratings(tmp_path / "r.csv", tmp_path / "set")
    text = page(tmp_path / "set")
    assert "ratings of 30 items, 0.5 to 5" in text and "of one user: up to 29 ratings to learn from with 1" in text
    past, future = section(text, "An episode of train").split("<h3>Query: the future</h3>")
    assert re.findall(r"<li>(.*)</li>", past)[0] == "0.5 for 0, 1970-01-01"
    assert [re.findall(r"1970-01-(\d\d)", part) for part in (past, future)] == [
        [f"{d:02d}" for d in range(1, 9)], [f"{d:02d}" for d in range(9, 13)],
    ]  # fmt: skip
    assert re.findall(r"<span>([\d.]+)</span><i", section(text, "Ratings"))[:3] == ["0.5", "1", "1.5"]


def test_ratings_that_are_none_are_shown_as_they_are(tmp_path: Path) -> None:
    good = json.dumps({"item": 0, "rating": 1, "time": 1e99}).encode()
    bad = [b"no json", b'{"item": 7, "rating": 1}', b'{"item": "x"}', b"[1]", good, b'{"item": 0, "rating": NaN}']
    bad += [json.dumps({"item": 0, "rating": 10.0**n}).encode() for n in range(40)]
    notes = {"kind": "ratings", "items": ["film"], "scale": ["a", None], "left_out": {"a": "b"}}
    users = [(str(u), lambda: bad) for u in range(3)]
    pack_classes(tmp_path / "set", users, {"train": [0, 1, 2]}, Field("utf-8"), name="odd", notes=notes)
    text = page(tmp_path / "set")
    assert "<li>no json</li>" in text and "<li>1 for film</li>" in text


def test_a_page_that_cannot_be_written_or_a_set_that_is_none(tmp_path: Path) -> None:
    shards = pictures(tmp_path, [3, 3])
    words = ["data", "info", str(shards), "--html", str(tmp_path / "none" / "page.html")]
    told = CliRunner().invoke(main, words)
    assert told.exit_code == 1 and "page.html: cannot be written (No such file or directory); choose" in told.output
    told = CliRunner().invoke(main, ["data", "info", str(tmp_path), "--html", str(tmp_path / "page.html")])
    assert told.exit_code == 1 and not (tmp_path / "page.html").exists()
    with pytest.raises(DataError, match="is cut"):
        from metadist.data_page import write_data_page

        tar = next(shards.glob("*.tar"))
        tar.write_bytes(tar.read_bytes()[:-1000])
        write_data_page(shards, tmp_path / "page.html")
