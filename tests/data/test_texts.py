"""Texts: tables of several kinds become one and the same set, split by class, group, column or list."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from metadist.cli import main
from metadist.data import Manifest, ShardSet, load_manifest, pack_clinc150, pack_csv, verify
from metadist.data.clinc150 import DOMAINS
from metadist.errors import DataError

ROWS = [(f'say "{c}", {i}\nör 日本 🎉', f"intent {c}", f"domain{c % 5}") for i in range(3) for c in range(10)]


def write_csv(path: Path, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    quoted = [delimiter.join('"' + v.replace('"', '""') + '"' for v in row) for row in ROWS]
    path.write_text("\n".join([delimiter.join(["text", "label", "domain"]), *quoted]) + "\n", encoding=encoding)
    return path


def write_jsonl(path: Path) -> Path:
    path.write_text("".join(json.dumps({"domain": d, "label": c, "text": t}) + "\n" for t, c, d in ROWS))
    return path


def pack(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", "pack", "csv", *map(str, arguments)])


def texts_of(path: Path) -> dict[str, list[str]]:
    """All texts of a set by class, in order."""
    shards = ShardSet(path)
    found: dict[str, list[str]] = {}
    for b in range(len(shards.index)):
        found.setdefault(shards.manifest.classes[int(shards.index["class"][b])], []).extend(shards.texts(b))
    return found


def members(manifest: Manifest) -> dict[str, set[str]]:
    return {split: {manifest.classes[c] for c in numbers} for split, numbers in manifest.splits.items()}


WANTED = {f"intent {c}": [t for t, k, _ in ROWS if k == f"intent {c}"] for c in range(10)}


@pytest.mark.parametrize(
    ("write", "options"),
    [
        (lambda p: [write_csv(p / "t.csv")], {}),
        (lambda p: [write_csv(p / "t.csv", encoding="utf-8-sig")], {}),
        (lambda p: [write_csv(p / "t.csv", encoding="utf-16")], {"encoding": "utf-16"}),
        (lambda p: [write_csv(p / "t.tsv", "\t")], {}),
        (lambda p: [write_csv(p / "t.txt", ";")], {"delimiter": ";"}),
        (lambda p: [write_jsonl(p / "t.jsonl")], {}),
    ],
)
def test_every_kind_of_table_is_the_same_set(
    tmp_path: Path, write: Callable[[Path], list[Path]], options: dict[str, str]
) -> None:
    common = {"text_column": "text", "label_column": "label", "block_examples": 2}
    m = pack_csv(write(tmp_path), tmp_path / "out", **common, **options)  # type: ignore[arg-type]
    assert texts_of(tmp_path / "out") == WANTED
    assert verify(tmp_path / "out").examples == 30 and m.blocks == 20
    reference = pack_csv(write_jsonl(tmp_path / "r.jsonl"), tmp_path / "ref", **common)  # type: ignore[arg-type]
    assert m.content_id == reference.content_id


def test_several_tables_are_one_after_the_other(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("label,text\nx,one\ny,two\n")
    (tmp_path / "b.jsonl").write_text('{"text": "three", "label": "x"}\n\n{"text": "four", "label": "y"}\n')
    sources = [tmp_path / "a.csv", tmp_path / "b.jsonl"]
    m = pack_csv(sources, tmp_path / "out", text_column="text", label_column="label")
    assert texts_of(tmp_path / "out") == {"x": ["one", "three"], "y": ["two", "four"]}
    assert m.source == "a.csv, b.jsonl"


def test_a_table_without_a_header_is_given_one(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text('1::one, or so::x\n2::two::y\r\n\n3::"three"::x\n4::four::y\n')
    told = pack("--source", tmp_path / "t.txt", "--delimiter", "::", "--header", "n, text,label", "--out",
                tmp_path / "out", "--text-column", "text", "--label-column", "label")  # fmt: skip
    assert told.exit_code == 0, told.output
    assert texts_of(tmp_path / "out") == {"x": ["one, or so", '"three"'], "y": ["two", "four"]}
    (tmp_path / "t.txt").write_text("1::one::x\n2::two\n")
    wrong = pack("--source", tmp_path / "t.txt", "--delimiter", "::", "--header", "n,text,label", "--out",
                 tmp_path / "wrong", "--text-column", "text", "--label-column", "label")  # fmt: skip
    assert "t.txt:2: 2 values, but the header names 3 columns" in wrong.output


def test_labels_are_stripped_and_may_be_numbers_and_texts_are_kept(tmp_path: Path) -> None:
    lines = [{"text": " a ", "label": 1}, {"text": "b", "label": " 1"}, {"text": "c", "label": 2}] * 2
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    m = pack_csv(tmp_path / "t.jsonl", tmp_path / "out", text_column="text", label_column="label")
    assert texts_of(tmp_path / "out") == {"1": [" a ", "b", " a ", "b"], "2": ["c", "c"]}
    assert m.notes == {"kind": "text", "repeated": 3}


def test_classes_are_dealt_by_seed(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "t.csv")
    common = {"text_column": "text", "label_column": "label"}
    a, b, c = (pack_csv(source, tmp_path / f"{i}", seed=i // 2, **common) for i in range(3))  # type: ignore[arg-type]
    assert a.splits == b.splits != c.splits
    assert {s: len(m) for s, m in a.splits.items()} == {"train": 6, "validation": 2, "test": 2}


def test_groups_are_held_out_as_a_whole(tmp_path: Path) -> None:
    source = write_csv(tmp_path / "t.csv")
    domains = {k: d for _, k, d in ROWS}
    told = pack("--source", source, "--text-column", "text", "--label-column", "label", "--group-column", "domain",
                "--out", tmp_path / "out")  # fmt: skip
    assert told.exit_code == 0, told.output
    held = {s: {domains[c] for c in classes} for s, classes in members(load_manifest(tmp_path / "out")).items()}
    assert sorted(map(len, held.values())) == [1, 1, 3] and len(set.union(*held.values())) == 5
    chosen = tmp_path / "splits.json"
    chosen.write_text('{"train": ["domain0", "domain3"], "dev": ["domain1"], "spare": ["domain4"]}')
    told = pack("--source", source, "--text-column", "text", "--label-column", "label", "--group-column", "domain",
                "--splits", chosen, "--out", tmp_path / "listed")  # fmt: skip
    assert told.exit_code == 0 and "left out 2 classes that no split names" in told.output, told.output
    listed = members(load_manifest(tmp_path / "listed"))
    wanted = {"train": ("domain0", "domain3"), "validation": ("domain1",), "spare": ("domain4",)}
    assert listed == {s: {c for c, d in domains.items() if d in ds} for s, ds in wanted.items()}
    assert verify(tmp_path / "listed").examples == 24


def test_a_column_or_a_list_tells_the_splits(tmp_path: Path) -> None:
    rows = [f"{i},{c},{'val' if c == 'b' else 'train'}" for i in range(2) for c in "abc"]
    (tmp_path / "t.csv").write_text("\n".join(["text,label,split", *rows]))
    common = {"text_column": "text", "label_column": "label"}
    by_column = pack_csv(tmp_path / "t.csv", tmp_path / "column", split_column="split", **common)  # type: ignore[arg-type]
    assert members(by_column) == {"train": {"a", "c"}, "validation": {"b"}}
    (tmp_path / "s.json").write_text('{"train": ["a", "c"], "validation": ["b"]}')
    by_list = pack_csv(tmp_path / "t.csv", tmp_path / "list", splits=tmp_path / "s.json", **common)  # type: ignore[arg-type]
    assert by_list.content_id == by_column.content_id


def test_bad_rows_and_small_classes_are_left_out_if_asked(tmp_path: Path) -> None:
    rows = [f"t{i},{'abc'[i % 3]}" for i in range(30)] + [",a", "one,two,three", "lonely,d"]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]))
    words = ["--source", tmp_path / "t.csv", "--text-column", "text", "--label-column", "label", "--out",
             tmp_path / "out", "--on-bad", "skip"]  # fmt: skip
    few = pack(*words)
    assert few.exit_code == 1 and "more than 0 of 32 rows cannot be read" in few.output
    assert "t.csv:32: column 'text' is empty" in few.output and "t.csv:33: 3 values" in few.output
    assert not (tmp_path / "out").exists()
    told = pack(*words, "--most-bad", "0.1")
    assert told.exit_code == 0, told.output
    assert "left out 2 rows of" in told.output and "left out 1 class with too few examples: 'd' (1)" in told.output
    assert [len(t) for t in texts_of(tmp_path / "out").values()] == [10, 10, 10]


def test_texts_are_not_read_as_images_nor_images_as_texts(packed: Path, tmp_path: Path) -> None:
    pack_csv(write_csv(tmp_path / "t.csv"), tmp_path / "out", text_column="text", label_column="label")
    with pytest.raises(DataError, match=r"x\.bin: holds text, not images; read it with texts\(\)"):
        ShardSet(tmp_path / "out").block(0)
    with pytest.raises(DataError, match=r"x\.npy: holds images, not text"):
        ShardSet(packed).texts(0)


# ------------------------------------------------------------------ CLINC150


@pytest.fixture
def clinc(tmp_path: Path) -> Path:
    """A small one: two intents a domain with two texts in each part, and six questions out of scope."""
    domains = {d: [f"{d} 0", f"{d} 1"] for ds in DOMAINS.values() for d in ds}
    data = {p: [[f"{i} {p} {n}", i] for n in range(2) for ks in domains.values() for i in ks] for p in _parts()}
    data |= {f"oos_{p}": [[f"{p} {n}", "oos"] for n in range(2)] for p in _parts()}
    root = tmp_path / "clinc"
    root.mkdir()
    (root / "domains.json").write_text(json.dumps(domains))
    (root / "data_full.json").write_text(json.dumps(data))
    return root


def _parts() -> tuple[str, ...]:
    return ("train", "val", "test")


def test_clinc150_holds_out_domains_and_keeps_what_is_out_of_scope(clinc: Path, tmp_path: Path) -> None:
    told = CliRunner().invoke(
        main, ["data", "pack", "clinc150", "--source", str(clinc), "--out", str(tmp_path / "out")]
    )
    assert told.exit_code == 0 and "12 classes train" in told.output and "1 class oos" in told.output, told.output
    found = members(load_manifest(tmp_path / "out"))
    assert found == {s: {f"{d} {i}" for d in ds for i in range(2)} for s, ds in DOMAINS.items()} | {"oos": {"oos"}}
    texts = texts_of(tmp_path / "out")
    assert texts["travel 1"] == [f"travel 1 {p} {n}" for p in _parts() for n in range(2)]
    assert texts["oos"] == [f"{p} {n}" for p in _parts() for n in range(2)]
    assert verify(tmp_path / "out").examples == 126


def test_clinc150_by_domains_of_ones_own(clinc: Path, tmp_path: Path) -> None:
    (tmp_path / "s.json").write_text('{"train": ["work"], "test": ["travel"]}')
    m = pack_clinc150(clinc, tmp_path / "out", splits=tmp_path / "s.json")
    assert members(m) == {"train": {"work 0", "work 1"}, "test": {"travel 0", "travel 1"}, "oos": {"oos"}}


def test_clinc150_is_downloaded_without_a_source(clinc: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(BytesIO):
        headers: dict[str, str] = {}

    monkeypatch.setattr(
        urllib.request, "urlopen", lambda url, timeout: Answer((clinc / url.rsplit("/", 1)[1]).read_bytes())
    )
    assert pack_clinc150(None, tmp_path / "out").examples == 126


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d, k: k.pop("oos_val"), "data_full.json: oos_val: is missing, or no list; download the file again"),
        (lambda d, k: k["val"].append(["a"]), "data_full.json: val[40]: is not a pair of an utterance and an intent"),
        (lambda d, k: k["val"].append(["a", "oos"]), "data_full.json: val[40]: has intent 'oos'"),
        (lambda d, k: d.pop("work"), "domains.json: intent 'work 0' is in no domain"),
        (lambda d, k: d["work"].append("travel 1"), "domains.json: work: class 'travel 1' is in domain 'work', but in "
         "'travel' at "),
    ],
)  # fmt: skip
def test_a_fault_of_clinc150_is_named(
    clinc: Path, tmp_path: Path, spoil: Callable[[dict, dict], object], message: str
) -> None:
    domains, data = (json.loads((clinc / name).read_text()) for name in ("domains.json", "data_full.json"))
    spoil(domains, data)
    (clinc / "domains.json").write_text(json.dumps(domains))
    (clinc / "data_full.json").write_text(json.dumps(data))
    with pytest.raises(DataError) as error:
        pack_clinc150(clinc, tmp_path / "out")
    assert message in str(error.value) and not (tmp_path / "out").exists()


def test_real_clinc150(metadist_data: Path, tmp_path: Path) -> None:
    m = pack_clinc150(metadist_data / "clinc150", tmp_path / "out")
    assert {s: len(c) for s, c in m.splits.items()} == {"train": 90, "validation": 30, "test": 30, "oos": 1}
    texts = texts_of(tmp_path / "out")
    assert {len(t) for k, t in texts.items() if k != "oos"} == {150} and len(texts["oos"]) == 1200
    assert verify(tmp_path / "out").examples == m.examples == 23700
    domains = m.notes["domains"]
    assert {domains[m.classes[c]] for c in m.splits["test"]} == {"travel", "work"}
