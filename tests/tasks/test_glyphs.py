"""The embedded letters: whole scripts held out, the same bytes everywhere, episodes by arithmetic."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from metadist.errors import ConfigError
from metadist.seeding import Rng
from metadist.tasks import glyphs, rendering
from metadist.tasks.glyphs import DRAWINGS, GlyphTasks, glyph_images


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Builds the set once for this module, in a cache folder of its own."""
    folder, before = tmp_path_factory.mktemp("cache"), os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    glyphs._table.cache_clear()
    yield folder
    glyphs._table.cache_clear()
    os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.update(XDG_CACHE_HOME=before)


def test_every_class_has_twenty_different_drawings_with_ink() -> None:
    pictures, names, splits = glyph_images()
    assert pictures.dtype == np.uint8
    assert pictures.shape == (len(names), DRAWINGS, 28, 28)
    assert len(set(names)) == len(names)
    ink = (pictures > 127).sum(axis=(2, 3))
    assert ink.min() >= 10 and ink.max() < 28 * 28 * 0.75
    assert all(len({d.tobytes() for d in drawings}) == DRAWINGS for drawings in pictures)
    assert len(splits["train"]) >= 1500 and len(splits["validation"]) >= 100 and len(splits["test"]) >= 100


def test_splits_share_no_class_and_no_script() -> None:
    _, names, splits = glyph_images()
    assert sorted(sum(splits.values(), [])) == list(range(len(names)))
    scripts = {split: {names[c].split()[0] for c in classes} for split, classes in splits.items()}
    assert scripts["test"] == {"ARMENIAN", "HEBREW", "TIFINAGH", "LAO"}
    assert scripts["validation"] == {"GEORGIAN", "NKO"}
    assert not scripts["train"] & (scripts["test"] | scripts["validation"])


def test_letters_that_look_alike_are_kept_once_and_for_the_training() -> None:
    _, names, splits = glyph_images()
    assert "LATIN CAPITAL LETTER O" in names and "LATIN CAPITAL LETTER A" in names
    twins = ("GREEK CAPITAL LETTER ALPHA", "CYRILLIC CAPITAL LETTER A", "ARMENIAN CAPITAL LETTER OH", "LISU LETTER A")
    for twin in twins:
        assert unicodedata.lookup(twin) and twin not in names
    reference = rendering.font_folder() / glyphs.REFERENCE
    printed = rendering.rasterise(reference, [ord(unicodedata.lookup(n)) for n in names], 28).astype(np.float32)
    flat = printed.reshape(len(names), -1) / 255
    held_out = splits["validation"] + splits["test"]
    ink = (flat**2).sum(axis=1)
    apart = ink[held_out, None] + ink[splits["train"]] - 2 * flat[held_out] @ flat[splits["train"]].T
    assert (apart / np.minimum(ink[held_out, None], ink[splits["train"]])).min() > 0.09


def test_a_letter_no_face_has_is_left_out() -> None:
    _, names, _ = glyph_images()
    known = rendering.letters_of(rendering.font_folder() / glyphs.REFERENCE)
    assert all(ord(unicodedata.lookup(name)) in known for name in names)
    assert not any("DEVANAGARI" in name or "LIGATURE LAM" in name for name in names)


def test_nearest_pixels_are_a_fair_baseline_on_held_out_scripts() -> None:
    batch = GlyphTasks(split="test").episodes(0, "evaluation/test", range(400))
    apart = torch.cdist(batch.query.x.flatten(2), batch.support.x.flatten(2))
    accuracy = (apart.argmin(dim=2) == batch.query.y).float().mean().item()
    assert 0.55 < accuracy < 0.75


def test_an_episode_is_drawn_as_promised() -> None:
    batch = GlyphTasks(ways=7, shots=3, query_shots=2).episodes(1, "train", range(20))
    assert batch.support.x.shape == (20, 21, 1, 28, 28) and batch.query.x.shape == (20, 14, 1, 28, 28)
    assert batch.support.x.dtype == torch.float32 and batch.support.y.dtype == torch.int64
    assert batch.support.x.min() == 0 and batch.support.x.max() == 1
    assert batch.support.y[4].tolist() == [c for c in range(7) for _ in range(3)]
    assert batch.query.y[4].tolist() == [c for c in range(7) for _ in range(2)]
    pictures, names, splits = glyph_images()
    of_name = dict(zip(names, pictures, strict=True))
    for episode in batch:
        assert len(set(episode.info["classes"])) == 7
        assert {names.index(n) for n in episode.info["classes"]} <= set(splits["train"])
        for c, name in enumerate(episode.info["classes"]):
            drawings = {d.tobytes() for d in of_name[name]}
            chosen = torch.cat([s.x[s.y == c] for s in (episode.support, episode.query)])
            picked = [(x.numpy() * 255).round().astype(np.uint8).tobytes() for x in chosen]
            assert set(picked) <= drawings, "a picture of another letter"
            assert len(set(picked)) == 5, "a query picture was in the support set"


def test_an_episode_depends_on_seed_stream_and_number_alone() -> None:
    tasks = GlyphTasks(shots=2)
    batch = tasks.episodes(5, "train", [100_000, 3])
    alone = tasks.episodes(5, "train", [3])
    assert torch.equal(batch[1].support.x, alone[0].support.x) and torch.equal(batch[1].query.x, alone[0].query.x)
    assert torch.equal(batch[0].query.x, tasks.sample(Rng(5, "train", 100_000)).query.x)
    assert batch[1].info == alone[0].info
    for other in (tasks.episodes(6, "train", [3]), tasks.episodes(5, "test", [3]), tasks.episodes(5, "train", [4])):
        assert not torch.equal(alone.support.x, other.support.x)


def test_every_class_and_drawing_turns_up() -> None:
    tasks = GlyphTasks(ways=5, shots=10, query_shots=10, split="test")
    batch = tasks.episodes(0, "train", range(300))
    assert len({name for info in batch.info for name in info["classes"]}) == len(glyph_images()[2]["test"])


def test_the_pictures_are_the_same_wherever_they_are_drawn(_own_cache: Path) -> None:
    table, content_id = glyphs._table(28)
    started = time.process_time()
    again = glyphs._build(28)
    assert time.process_time() - started < 8
    assert again.tobytes() == table.tobytes()
    assert GlyphTasks(split="test").describe()["content_id"] == content_id
    assert GlyphTasks(split="test").describe()["classes"] == len(glyph_images()[2]["test"])


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "folder", "gone"])
def test_a_damaged_cache_entry_is_drawn_again(_own_cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    table, content_id = glyphs._table(28)
    path = glyphs._cache_file(28)
    assert path.parent == _own_cache / "metadist"
    glyphs._write_cache(path, whole := _entry(table))
    changed = bytearray(whole)
    changed[len(whole) // 2] ^= 1
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "gone":
        path.write_bytes({"cut": whole[: len(whole) // 2], "bit": bytes(changed), "empty": b""}[damage])
    drawn: list[int] = []
    monkeypatch.setattr(glyphs, "_build", lambda size: drawn.append(size) or table.copy())
    glyphs._table.cache_clear()
    assert glyphs._table(28)[1] == content_id
    assert drawn == [28]
    if damage == "folder":
        path.rmdir()
    else:
        glyphs._table.cache_clear()
        assert glyphs._table(28)[0].tobytes() == table.tobytes() and drawn == [28], "the mended entry is not used"
    assert sorted(p.name for p in path.parent.iterdir()) == ([] if damage == "folder" else [path.name])


def _entry(table: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, table, allow_pickle=False)
    return buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest()


def test_a_cache_that_cannot_be_written_is_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table, content_id = glyphs._table(28)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(glyphs, "_build", lambda size: table.copy())
    glyphs._table.cache_clear()
    assert glyphs._table(28)[1] == content_id
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_pickled_source_carries_no_pictures() -> None:
    tasks = GlyphTasks(ways=3, split="test")
    sent = pickle.dumps(tasks)
    assert len(sent) < 1000
    assert torch.equal(pickle.loads(sent).episodes(0, "a", [1]).query.x, tasks.episodes(0, "a", [1]).query.x)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ways": 5000}, r"^tasks\.ways: is 5000, but the train split of glyphs has \d+ classes; give at most \d+$"),
        ({"ways": 1}, r"^tasks\.ways: is 1; give at least 2$"),
        ({"shots": 0}, r"^tasks\.shots: is 0; give at least 1$"),
        ({"query_shots": 0}, r"^tasks\.query_shots: is 0; give at least 1$"),
        (
            {"shots": 15, "query_shots": 6},
            r"^tasks\.shots: shots \+ query_shots is 15 \+ 6 = 21, but a letter of glyphs has 20 drawings; "
            r"make them add up to at most 20$",
        ),
        ({"split": "tset"}, r"^tasks\.split: is 'tset'; choose one of train, validation, test$"),
        ({"size": 4}, r"^tasks\.size: is 4 pixels; give 12 to 112$"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GlyphTasks(**arguments)  # type: ignore[arg-type]


def test_other_sizes_are_drawn_too(_own_cache: Path) -> None:
    batch = GlyphTasks(size=14, split="test").episodes(0, "a", [0, 1])
    assert batch.query.x.shape == (2, 5, 1, 14, 14) and batch.query.x.mean() > 0.05
