"""The format: stock tools read it, equal input gives equal bytes, and no damage goes unnoticed."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset as wds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shard_sets import SPLITS, flip, images, payload_byte, shard_paths

from metadist.data import Field, ShardSet, info, pack_arrays, seal, verify
from metadist.data.manifest import parse_manifest
from metadist.data.pack import pack_classes
from metadist.errors import DataError


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def edit_manifest(path: Path, **changes: object) -> None:
    file = path / "metadist.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_blocks_come_back_as_packed(packed: Path) -> None:
    shards = ShardSet(packed)
    assert shards.gather(np.arange(72)).tobytes() == images().tobytes()
    assert len(shard_paths(packed)) > 2 and len(shards.index) == 24
    assert shards.block(3).tobytes() == images()[1, 3:].tobytes()
    assert pickle.loads(pickle.dumps(shards)).block(3).tobytes() == shards.read(3).tobytes()


def test_two_packs_are_byte_for_byte_equal(packed: Path, tmp_path: Path) -> None:
    pack_arrays(images(), [f"k{i}" for i in range(12)], SPLITS, tmp_path / "b", block_examples=3, shard_bytes=8000)
    ours = {p.name: p.read_bytes() for p in packed.iterdir()}
    assert ours == {p.name: p.read_bytes() for p in (tmp_path / "b").iterdir()}
    with tarfile.open(shard_paths(packed)[0]) as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m in tar} == {(0, 0, 0, "", "")}


def test_content_id_is_of_the_content_alone(packed: Path, tmp_path: Path) -> None:
    names = [f"k{i}" for i in range(12)]
    one = pack_arrays(images(), names, SPLITS, tmp_path / "one", block_examples=3)
    assert one.content_id == info(packed)["content_id"]
    other = pack_arrays(images(seed=1), names, SPLITS, tmp_path / "other", block_examples=3)
    fewer = pack_arrays(images(), names, {"train": [0]}, tmp_path / "fewer", block_examples=3)
    assert len({one.content_id, other.content_id, fewer.content_id}) == 3


def test_stock_webdataset_reads_our_shards(packed: Path) -> None:
    urls = [str(p) for p in shard_paths(packed)]
    stock = {s["__key__"]: s for s in wds.WebDataset(urls, shardshuffle=False).decode()}
    assert len(stock) == 24
    assert stock["c00001-0001"]["x.npy"].tobytes() == images()[1, 3:].tobytes()
    assert stock["c00001-0001"]["json"] == {"class": 1, "name": "k1", "block": 1, "n": 3}


def test_we_read_a_set_written_by_the_stock_writer(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "theirs.tar")) as writer:
        for c in (1, 0):
            head = {"class": c, "block": 0, "n": 6}
            writer.write({"__key__": f"c{c:05d}-0000", "json": head, "x.npy": images()[c]})
    seal(tmp_path, name="theirs", field=Field("array", (4, 4)), classes=["a", "b"], splits={"train": [0, 1]})
    assert ShardSet(tmp_path).gather(np.arange(12)).tobytes() == images()[:2].tobytes()
    assert verify(tmp_path).examples == 12


def test_texts_and_encoded_images_are_kept_with_offsets(tmp_path: Path) -> None:
    texts = [["where is my card", "", "né"], ["pay", "the", "bill", "now"]]
    pack_classes(
        tmp_path / "texts",
        [(f"k{c}", lambda c=c: [t.encode() for t in texts[c]]) for c in range(2)],  # type: ignore[misc]
        {"train": [0, 1]},
        Field("utf-8"),
        name="texts",
    )
    shards = ShardSet(tmp_path / "texts")
    assert [[p.decode() for p in shards.parts(b)] for b in range(2)] == texts
    assert verify(tmp_path / "texts").examples == 7


def test_info_and_verify_tell_what_is_there(packed: Path) -> None:
    told = info(packed)
    assert told["splits"] == {"train": 7, "validation": 2, "test": 3}
    assert (told["classes"], told["examples"], told["blocks"], told["shape"]) == (12, 72, 24, [4, 4])
    seen: list[tuple[int, int]] = []
    report = verify(packed, progress=lambda done, total: seen.append((done, total)))
    assert (report.blocks, report.examples, report.content_id) == (24, 72, told["content_id"])
    assert report.bytes == told["bytes"] and seen[-1] == (report.shards, report.shards)


# Where a shard is damaged: how, and what verify says of it.
DAMAGE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "cut between members": (lambda p, s: cut(s, 2048), "its end mark is missing"),
    "cut within a payload": (lambda p, s: cut(s, 1600), "is cut or damaged"),
    "cut within a header": (lambda p, s: cut(s, 2048 + 100), "the header at byte 2048 cannot be read"),
    "cut to nothing": (lambda p, s: cut(s, 0), "is cut or damaged"),
    "header bit": (lambda p, s: flip(s, 2048 + 3), "the header at byte 2048 cannot be read"),
    "first header bit": (lambda p, s: flip(s, 3), "is cut or damaged"),
    "payload bit": (lambda p, s: flip(s, payload_byte(p)), "crc32 differ from the index"),
    "padding bit": (lambda p, s: flip(s, s.stat().st_size - 2000), "altered: its SHA-256 is not the manifest's"),
    "bytes after its end": (lambda p, s: s.write_bytes(s.read_bytes() + b"x"), "but the manifest says"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_verify_names_the_damaged_shard(spoilt: Path, kind: str) -> None:
    spoil, message = DAMAGE[kind]
    shard = shard_paths(spoilt)[0]
    spoil(spoilt, shard)
    with pytest.raises(DataError) as error:
        verify(spoilt)
    lines = str(error.value).splitlines()
    assert any(shard.name in line and message in line for line in lines), lines


@pytest.mark.parametrize("kind", [k for k in DAMAGE if k.startswith("cut")])
def test_a_cut_shard_is_refused_on_opening(spoilt: Path, kind: str) -> None:
    shard = shard_paths(spoilt)[0]
    DAMAGE[kind][0](spoilt, shard)
    with pytest.raises(DataError, match=rf"{shard.name}: is cut: \d+ bytes of 10240; pack or copy the set again"):
        ShardSet(spoilt)


def test_an_altered_block_is_refused_on_reading_it(spoilt: Path) -> None:
    flip(shard_paths(spoilt)[0], payload_byte(spoilt))
    shards = ShardSet(spoilt)
    shards.block(1)
    with pytest.raises(DataError, match=r"shard-00000.tar:c00001-0000.x.npy: altered: its crc32 is not the index's"):
        shards.block(2)


def test_a_shard_cut_while_it_is_read_is_noticed(spoilt: Path) -> None:
    shards = ShardSet(spoilt)
    cut(shard_paths(spoilt)[0], payload_byte(spoilt))
    with pytest.raises(DataError, match=r"c00001-0000.x.npy: is cut: 130 bytes of 176"):
        shards.block(2)


def test_stock_webdataset_misses_what_we_find(spoilt: Path) -> None:
    """Why sizes, checksums and counts are ours to check."""
    shard = shard_paths(spoilt)[0]
    whole = len(list(wds.WebDataset([str(shard)], shardshuffle=False)))
    flip(shard, 2048 + 3)
    assert len(list(wds.WebDataset([str(shard)], shardshuffle=False))) < whole


@given(data=st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_single_flipped_bit_passes_verify(packed: Path, tmp_path: Path, data: st.DataObject) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(packed, copy)
    file = data.draw(st.sampled_from([*shard_paths(copy), copy / "index.npz"]))
    flip(file, data.draw(st.integers(0, file.stat().st_size - 1)))
    with pytest.raises(DataError, match=file.name):
        verify(copy)


def test_verify_lists_every_problem(spoilt: Path) -> None:
    first, second, *_ = shard_paths(spoilt)
    flip(first, payload_byte(spoilt))
    second.unlink()
    (spoilt / "shard-99999.tar").write_bytes(b"")
    with pytest.raises(DataError) as error:
        verify(spoilt)
    text = str(error.value)
    assert f"{second}: is missing" in text and "c00001-0000: crc32 differ" in text
    assert "shard-99999.tar: is not named by the manifest" in text and "4 problems found" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": "metadist.shards/2"}, "schema 'metadist.shards/2', but this metadist reads 'metadist.shards/1'"),
        ({"schema": "other"}, "schema 'other' is not a shard set's"),
        ({"classes": None}, "lacks or garbles a field"),
        ({"unknown": 1}, "lacks or garbles a field"),
        ({"notes": [1]}, "notes are a list, not an object"),
        ({"splits": {"train": [0], "test": [0]}}, "class 'k0' is in splits 'train' and 'test'"),
        ({"splits": {"train": [12]}}, "split 'train' names class 12 of 12"),
        ({"shards": [{"name": "pipe:touch x.tar", "bytes": 1, "sha256": ""}]}, "is not a plain file name"),
        ({"shards": [{"name": "../a.tar", "bytes": 1, "sha256": ""}]}, "is not a plain file name"),
        ({"classes": ["same"] * 12}, "two classes have one name"),
        ({"blocks": 23}, "does not hold the manifest's 23 blocks of 72 examples"),
    ],
)
def test_a_bad_manifest_is_refused(spoilt: Path, changes: dict[str, object], message: str) -> None:
    edit_manifest(spoilt, **changes)
    with pytest.raises(DataError) as error:
        ShardSet(spoilt)
    assert message in str(error.value)


@given(text=st.binary(max_size=40) | st.recursive(st.none() | st.integers() | st.text(max_size=5), st.lists).map(
    lambda v: json.dumps({"schema": "metadist.shards/1", "fields": v, "classes": v}).encode()))  # fmt: skip
def test_no_bytes_crash_the_manifest_reader(text: bytes) -> None:
    with pytest.raises(DataError):
        parse_manifest(text, "metadist.json")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: [f.unlink() for f in p.iterdir()] and p.rmdir(), "no such shard set; make one with `metadist data"),
        (lambda p: (p / "metadist.json").unlink(), "not a shard set: it has no metadist.json"),
        (lambda p: (p / "metadist.json").write_text("{"), "metadist.json: is not JSON"),
        (lambda p: (p / "metadist.json").write_text("[]"), "metadist.json: is a JSON list, not an object"),
        (lambda p: (p / "index.npz").unlink(), "index.npz: cannot be read (No such file or directory)"),
        (lambda p: (p / "index.npz").write_bytes(b"x"), "index.npz: altered: its SHA-256 is not the manifest's"),
        (lambda p: shard_paths(p)[0].unlink(), "shard-00000.tar: is missing, but the manifest names it"),
    ],
)
def test_a_set_with_files_missing_is_refused(spoilt: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(spoilt)
    with pytest.raises(DataError) as error:
        ShardSet(spoilt)
    assert message in str(error.value)


def sealed(path: Path, members: dict[str, bytes], encoding: str = "array") -> None:
    """A set of one class from any members."""
    with tarfile.open(path / "a.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    shape = () if encoding == "utf-8" else (4, 4)
    seal(path, name="a", field=Field(encoding, shape), classes=["a"], splits={"train": [0]})


HEAD = b'{"class": 0, "block": 0, "n": 6}'


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        (npy(np.array([{"a": 1}], dtype=object)), "is not a plain .npy array (Object arrays cannot be loaded"),
        (npy(images()[0, :5]), "holds uint8 [5, 4, 4], but the index says uint8 [6, 4, 4]"),
        (npy(images()[0].astype(float)), "holds float64 [6, 4, 4]"),
        (b"not an array", "is not a plain .npy array"),
    ],
)
def test_a_payload_that_is_no_block_is_refused(tmp_path: Path, payload: bytes, message: str) -> None:
    sealed(tmp_path, {"c00000-0000.json": HEAD, "c00000-0000.x.npy": payload})
    with pytest.raises(DataError) as error:
        ShardSet(tmp_path).block(0)
    assert message in str(error.value) and "a.tar:c00000-0000.x.npy" in str(error.value)
    with pytest.raises(DataError, match="1 problem found"):
        verify(tmp_path)


@pytest.mark.parametrize("offsets", ["[0, 1]", "[0, 3, 2]", "[1, 2, 2]", '["0", 1, 2]', "null", "[0, 1, 9]"])
def test_offsets_that_do_not_cut_the_payload_are_refused(tmp_path: Path, offsets: str) -> None:
    head = f'{{"class": 0, "block": 0, "n": 2, "offsets": {offsets}}}'.encode()
    sealed(tmp_path, {"c00000-0000.json": head, "c00000-0000.x.bin": b"ab"}, "utf-8")
    with pytest.raises(DataError, match="offsets do not cut 2 bytes into 2 examples"):
        ShardSet(tmp_path).parts(0)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"c00000-0000.json": HEAD}, "are not a block's pair of .json and .x.npy"),
        ({"c00000-0000.x.npy": b"", "c00000-0000.json": HEAD}, "are not a block's pair"),
        ({"c00000-0001.json": HEAD, "c00000-0001.x.npy": b""}, "which is not c00000-0001"),
        ({"c00000-0000.json": b"{}", "c00000-0000.x.npy": b""}, "lacks class, block or n as whole numbers"),
    ],
)
def test_members_that_are_no_blocks_are_not_sealed(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with pytest.raises(DataError) as error:
        sealed(tmp_path, members)
    assert message in str(error.value)
    assert not (tmp_path / "metadist.json").exists()


def test_a_split_that_is_not_there_is_named(packed: Path) -> None:
    with pytest.raises(DataError, match="has no split 'dev'; it has test, train, validation"):
        ShardSet(packed).pool("dev")


def test_splits_can_be_joined_and_classes_turned(packed: Path) -> None:
    pool = ShardSet(packed).pool("train+validation", turned=True)
    assert len(pool) == 36 and pool.turns[:5].tolist() == [0, 1, 2, 3, 0]
    assert pool.examples.tolist() == [6] * 36
