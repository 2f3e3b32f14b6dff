"""The ways in which somebody's data is wrong: each is told by file or line, with the mending, and nothing is left."""

from __future__ import annotations

import errno
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from shard_sets import bomb, draw_folder

from metadist.cli import main
from metadist.data import load_manifest, verify

Make = Callable[[Path], object]


def pack(tmp_path: Path, kind: str, source: Path, *more: str) -> Result:
    words = ["data", "pack", kind, "--source", str(source), "--out", str(tmp_path / "out"), *more]
    if kind == "csv":
        words += ["--text-column", "text", "--label-column", "label"]
    return CliRunner().invoke(main, words)


def refused(tmp_path: Path, told: Result, where: str, problem: str, mend: str) -> None:
    """A line that names the place, what is wrong and what to do; and no set, nor half of one."""
    assert told.exit_code == 1, (told.exit_code, told.output, told.exception)
    assert isinstance(told.exception, SystemExit) and "Traceback" not in told.output
    line = told.output.replace(str(tmp_path), "")
    assert line.startswith("metadist: ") and where in line.split(": ")[1], line
    assert problem in line and mend in line.split(";")[-1], line
    assert not [p.name for p in tmp_path.iterdir() if "out" in p.name]


# ------------------------------------------------------------------ pictures


def folder(root: Path) -> Path:
    return draw_folder(root / "in", ["cat", "dog", "owl"])


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2 << 30)


def spoil(name: str, change: Callable[[Path], object]) -> Make:
    """A folder of three classes, one of whose files is changed."""
    return lambda root: change(folder(root) / name)


def hidden_from_us(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("the superuser may read everything")
    path.chmod(0)


PICTURES: dict[str, tuple[Make, str, str, str]] = {
    "an empty folder": (lambda r: (r / "in").mkdir(), "/in", "holds no pictures", "give one folder of pictures a"),
    "no folder": (lambda r: None, "/in", "no such directory", "give the directory that holds the images"),
    "pictures without a class": (
        lambda r: [p.rename(r / "in" / f"{p.parent.name}{p.name}") for p in folder(r).rglob("*.png")],
        "/in", "its 9 pictures lie in it directly", "put those of each class into a folder of its own",
    ),
    "files of another kind": (
        lambda r: [p.rename(p.with_suffix(".heic")) for p in folder(r).rglob("*.png")],
        "/in", "holds no pictures, but 9 .heic files", "PNG, JPEG, WebP, BMP, GIF and TIFF are read",
    ),
    "one picture a class": (
        lambda r: draw_folder(r / "in", ["cat", "dog"], count=1),
        "/in", "2 of 2 classes have fewer than 2 examples: 'cat' (1), 'dog' (1)", "add some, or leave these out",
    ),
    "one class": (
        lambda r: draw_folder(r / "in", ["cat"]), "/in", "holds one class alone, 'cat'", "give two or more",
    ),
    "a text named .jpg": (
        spoil("dog/9.jpg", lambda p: p.write_text("I am no picture")),
        "/in/dog/9.jpg", "cannot be read as an image (unknown format)", "replace or remove the file",
    ),
    "a page named .png": (
        spoil("dog/9.png", lambda p: p.write_bytes(b"%PDF-1.7")), "/in/dog/9.png", "unknown format", "or remove",
    ),
    "a cut picture": (
        spoil("owl/1.png", lambda p: p.write_bytes(p.read_bytes()[:-30])),
        "/in/owl/1.png", "cannot be read as an image", "replace or remove the file",
    ),
    "a picture of nothing": (
        spoil("owl/1.png", lambda p: p.write_bytes(b"")),
        "/in/owl/1.png", "cannot be read as an image", "replace or remove the file",
    ),
    "a file of 2 GB": (
        spoil("owl/1.png", sparse), "/in/owl/1.png", "2,147,483,648 bytes, more than 268,435,456", "make it smaller",
    ),
    "a decompression bomb": (
        spoil("owl/1.png", bomb), "/in/owl/1.png", "exceeds limit of", "replace or remove the file",
    ),
    "a file that may not be read": (
        spoil("owl/1.png", hidden_from_us), "/in/owl/1.png", "Permission denied", "make it readable, or remove it",
    ),
    "a folder that may not be read": (
        spoil("owl", hidden_from_us), "/in/owl", "Permission denied", "make it readable, or move it away",
    ),
    "a link to what is gone": (
        spoil("cat/9.png", lambda p: p.symlink_to("nowhere.png")),
        "/in/cat/9.png", "No such file or directory", "make it readable, or remove it",
    ),
    "a link to itself": (
        spoil("cat/9.png", lambda p: p.symlink_to("9.png")), "/in/cat/9.png", "Too many levels of", "or remove it",
    ),
    "a link back to where one is": (
        spoil("dog/again", lambda p: p.symlink_to(p.parents[1])), "/in/dog/again", "a folder above it", "remove the",
    ),
    "a class in two splits": (
        lambda r: draw_folder(r / "in", ["train/cat", "train/dog", "val/cat"]),
        "/in", "class 'cat' is in splits 'train' and 'validation'", "keep it in one",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_are_wrong(tmp_path: Path, name: str) -> None:
    make, where, problem, mend = PICTURES[name]
    make(tmp_path)
    refused(tmp_path, pack(tmp_path, "folder", tmp_path / "in", "--size", "8"), where, problem, mend)


def test_a_zip_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "in.zip").write_bytes(b"PK no zip")
    told = pack(tmp_path, "folder", tmp_path / "in.zip")
    refused(tmp_path, told, "/in.zip", "cannot be read as a zip", "make or download it again")


# ------------------------------------------------------------------ tables

GOOD = [f"text {i},{'ab'[i % 2]}" for i in range(6)]


def table(*rows: str, header: str = "text,label", encoding: str = "utf-8") -> Make:
    return lambda root: (root / "t.csv").write_text("\n".join([header, *rows]) + "\n", encoding=encoding)


TEXTS: dict[str, tuple[Make, str, str, str]] = {
    "no table": (lambda r: None, "/t.csv", "cannot be read (No such file", "give a CSV, TSV or .jsonl file"),
    "a folder": (lambda r: (r / "t.csv").mkdir(), "/t.csv", "Is a directory", "give a CSV, TSV or .jsonl file"),
    "an empty table": (lambda r: (r / "t.csv").touch(), "/t.csv", "is empty", "must name the columns, text, label"),
    "a header alone": (table(), "/t.csv", "holds no class", "give two or more"),
    "no header": (
        table(*GOOD[1:], header=GOOD[0]),
        "/t.csv:1", "there is no column 'text' in the header, which has 'text 0', 'a'", "did you mean 'text 0'?",
    ),
    "no header, far from it": (
        table("y,z", header="play jazz,music"), "/t.csv:1", "which has 'play jazz', 'music'", "columns, or --header",
    ),
    "a column of another name": (
        table(*GOOD, header="text,labels"), "/t.csv:1", "no column 'label'", "did you mean 'labels'?",
    ),
    "another delimiter": (
        table("a;b", header="text;label"), "/t.csv:1", "which has 'text;label'", "say at what with --delimiter",
    ),
    "two columns of one name": (
        table("a,b,c", header="text,label,text"), "/t.csv:1", "two columns are named 'text'", "rename one",
    ),
    "a row with more": (
        table(*GOOD, "wait, what,a"), "/t.csv:8", "3 values, but the header names 2", "in double quotes",
    ),
    "a row with less": (table(*GOOD, "what"), "/t.csv:8", "1 values, but the header names 2", "in double quotes"),
    "a row with less, below one of two lines": (
        table(*GOOD, '"two\nlines",a', "what"), "/t.csv:10", "1 values, but the header names 2", "in double quotes",
    ),
    "a quote that never ends": (
        table(*GOOD, '"what,a', *GOOD), "/t.csv:8", "the row that begins here cannot be read", "close the quote",
    ),
    "Latin-1": (
        table(*GOOD, "tee und kaffee für zwei,a", encoding="latin-1"),
        "/t.csv:8", "byte 0xfc at place 17 is not utf-8", "save the file as UTF-8, or say what it is with --encoding",
    ),
    "UTF-16": (table(*GOOD, encoding="utf-16"), "/t.csv", "is UTF-16, not utf-8", "say so with --encoding utf-16"),
    "a spreadsheet": (
        lambda r: (r / "t.csv").write_bytes(b"PK\3\4..."), "/t.csv", "is a zip or a spreadsheet", "export it as CSV",
    ),
    "an empty text": (table(*GOOD, "  ,a"), "/t.csv:8", "column 'text' is empty", "fill it in, or leave the row out"),
    "an empty label": (table(*GOOD, "x,"), "/t.csv:8", "column 'label' is empty", "fill it in, or leave the row out"),
    "one label": (table("x,a", "y,a"), "/t.csv", "holds one class alone, 'a'", "give two or more"),
    "one label coded in two ways": (
        table("x,caf\u00e9", "y,cafe\u0301", *GOOD),
        "/t.csv", r"classes 'caf\xe9' and 'cafe\u0301' look the same", "give both one name",
    ),
    "a label of its own for each text": (
        table(*(f"x,{'long ' * 40}{i}" for i in range(50))),
        "/t.csv", "50 of 50 classes have fewer than 2 examples: 'long long", "add some, or leave these out",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TEXTS)
def test_tables_that_are_wrong(tmp_path: Path, name: str) -> None:
    make, where, problem, mend = TEXTS[name]
    make(tmp_path)
    told = pack(tmp_path, "csv", tmp_path / "t.csv")
    refused(tmp_path, told, where, problem, mend)
    assert len(told.output) < 900, "a message is to be read"


def test_latin_1_is_read_where_it_is_named(tmp_path: Path) -> None:
    table(*GOOD, "für,a", encoding="latin-1")(tmp_path)
    assert pack(tmp_path, "csv", tmp_path / "t.csv", "--encoding", "latin-1").exit_code == 0
    wrong = pack(tmp_path / "none", "csv", tmp_path / "t.csv", "--encoding", "latin-9000")
    assert wrong.exit_code == 1 and "encoding: 'latin-9000' is no encoding; e.g. utf-8, latin-1" in wrong.output


@pytest.mark.parametrize(
    ("line", "problem", "mend"),
    [
        ('{"text": "x", "label"', "is not JSON (", "write one object a line"),
        ('["x", "a"]', "is a JSON list, not an object", 'write {"column": value, ...}'),
        ('{"text": "x", "lable": "a"}', "there is no 'label' in the object", "did you mean 'lable'?"),
        ('{"text": null, "label": "a"}', "'text' holds null", "it must hold a text or a number"),
        ('{"text": "\\ud83d", "label": "a"}', "holds half a character", "write it anew"),
        ("[" * 100_000, "is not JSON (", "write one object a line"),
    ],
)
def test_lines_that_are_wrong(tmp_path: Path, line: str, problem: str, mend: str) -> None:
    good = [json.dumps({"text": "x", "label": "ab"[i % 2]}) for i in range(4)]
    (tmp_path / "t.jsonl").write_text("\n".join([*good, line]))
    refused(tmp_path, pack(tmp_path, "csv", tmp_path / "t.jsonl"), "/t.jsonl:5", problem, mend)


# ------------------------------------------------------------------ splits


@pytest.mark.parametrize(
    ("column", "where", "problem"),
    [
        ("--split-column", "/t.csv:4", "class 'a' is in split 'test', but in 'train' at"),
        ("--group-column", "/t.csv:4", "class 'a' is in group 'test', but in 'train' at"),
    ],
)
def test_a_label_in_two_splits_or_groups(tmp_path: Path, column: str, where: str, problem: str) -> None:
    table("x,a,train", "y,b,test", "z,a,test", header="text,label,part")(tmp_path)
    refused(tmp_path, pack(tmp_path, "csv", tmp_path / "t.csv", column, "part"), where, problem, "keep it in one")


@pytest.mark.parametrize(
    ("text", "where", "problem", "mend"),
    [
        ('{"train": ["a", "bb"]}', "/s.json", "no class is named 'bb'", "did you mean 'b'?"),
        ('{"train": ["a"], "test": ["b", "a"]}', "/s.json", "class 'a' is also in 'train'", "name it once"),
        ('{"train": "a"}', "/s.json", "is not a split's list of names", 'write {"train": ["a", "b"], ...}'),
        ('{"train+test": ["a"]}', "/s.json", "is not a split's list of names", "write"),
        ("{}", "/s.json", "names no class", 'write {"train": [...]'),
        ("train: a", "/s.json", "is not JSON", ""),
        (None, "/s.json", "cannot be read (No such file or directory)", "give a JSON file of lists with --splits"),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "folder", "arrays"])
def test_a_list_of_splits_that_is_wrong(
    tmp_path: Path, kind: str, text: str | None, where: str, problem: str, mend: str
) -> None:
    if text is not None:
        (tmp_path / "s.json").write_text(text)
    table(*GOOD)(tmp_path)
    draw_folder(tmp_path / "in", ["a", "b"])
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3, 3), np.uint8), y=np.array(list("abab")))
    source = tmp_path / {"csv": "t.csv", "folder": "in", "arrays": "a.npz"}[kind]
    refused(tmp_path, pack(tmp_path, kind, source, "--splits", str(tmp_path / "s.json")), where, problem, mend)


def test_splits_told_twice_are_bad_usage(tmp_path: Path) -> None:
    table("x,a,train", "y,b,test", header="text,label,part")(tmp_path)
    (tmp_path / "s.json").write_text('{"train": ["a"]}')
    told = pack(tmp_path, "csv", tmp_path / "t.csv", "--split-column", "part", "--splits", str(tmp_path / "s.json"))
    assert told.exit_code == 2 and "give one of them" in told.output and not (tmp_path / "out").exists()
    draw_folder(tmp_path / "in", ["train/a", "train/b"])
    told = pack(tmp_path, "folder", tmp_path / "in", "--splits", str(tmp_path / "s.json"))
    assert told.exit_code == 2 and "give one of them" in told.output and not (tmp_path / "out").exists()


# ------------------------------------------------------------------ names

NAMES = ["猫", "🦉🦊", "naïve café", "a" * 200, "-rf", "c00001-0000", "con", "per%cent {x}", "..."]


def test_names_of_all_kinds_are_names(tmp_path: Path) -> None:
    draw_folder(tmp_path / "in", [*NAMES, "deep/er/est"], count=2)
    assert pack(tmp_path, "folder", tmp_path / "in", "--size", "4").exit_code == 0
    hidden = {"..."}  # a folder whose name begins with a dot is passed over
    assert set(load_manifest(tmp_path / "out").classes) == {*NAMES, "deep/er/est"} - hidden
    labels = [*NAMES, "a/b", "../../etc", "x" * 10_000, 'say "hi", now', "line\nend", "C:\\x"]
    rows = ["text,label", *(f'{i},"{label.replace(chr(34), chr(34) * 2)}"' for label in labels for i in range(2))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    assert pack(tmp_path / "texts", "csv", tmp_path / "t.csv").exit_code == 0
    assert set(load_manifest(tmp_path / "texts" / "out").classes) == set(labels)
    for out in (tmp_path / "out", tmp_path / "texts" / "out"):
        assert verify(out).blocks == len(load_manifest(out).classes)
        shown = CliRunner().invoke(main, ["data", "info", str(out), "--html", str(tmp_path / "page.html")])
        assert shown.exit_code == 0, shown.output


# ------------------------------------------------------------------ ratings and arrays

RATINGS = [f"{u},{i},{1 + i % 5},{i}" for u in range(3) for i in range(20)]


def ratings(*rows: str, header: str = "userId,movieId,rating,timestamp") -> Make:
    return lambda root: (root / "r.csv").write_text("\n".join([header, *rows]))


@pytest.mark.parametrize(
    ("make", "where", "problem", "mend"),
    [
        (
            ratings(*RATINGS, "1,99,NaN,5"),
            "/r.csv:62",
            "column 'rating' holds NaN, not a finite number",
            "mend the row",
        ),
        (
            ratings(*RATINGS, "1,99,great,5"),
            "/r.csv:62",
            "column 'rating' holds 'great', not a number",
            "--on-bad skip",
        ),
        (ratings(*RATINGS, "2,7,5,9"), "/r.csv:62", "user '2' rates item '7' again; first at line 49", "keep one"),
        (ratings("1,1,1,1", "2,2,2,2"), "/r.csv", "no user has 20 ratings; the most is 1", "take a lower --least"),
        (ratings(header="userId,movieId,rating,timestamp"), "/r.csv", "holds no rating", "give a row for each"),
        (ratings(*RATINGS, header="user,movie,stars,time"), "/r.csv:1", "there is no column 'userId'", "'user'?"),
        (lambda r: None, "/r.csv", "cannot be read (No such file or directory)", "give a CSV, TSV or .jsonl file"),
        (lambda r: (r / "r.csv").mkdir(), "/r.csv", "holds no ratings.csv", "or a directory of MovieLens"),
    ],
)
def test_ratings_that_are_wrong(tmp_path: Path, make: Make, where: str, problem: str, mend: str) -> None:
    make(tmp_path)
    refused(tmp_path, pack(tmp_path, "ratings", tmp_path / "r.csv"), where, problem, mend)


@pytest.mark.parametrize(
    ("arrays", "where", "problem", "mend"),
    [
        ({"y": np.array(list("abab"), dtype=object)}, "/a.npz", "holds Python objects", "y=np.array(y.tolist())"),
        ({"x": np.array([[[{}]]] * 4)}, "/a.npz", "holds Python objects", "save it as plain numbers"),
        ({"y": np.array(list("aba"))}, "/a.npz", "3 labels for 4 pictures in x", "give one for each"),
    ],
)
def test_arrays_that_are_wrong(tmp_path: Path, arrays: dict[str, Any], where: str, problem: str, mend: str) -> None:
    good = {"x": np.zeros((4, 3, 3), np.uint8), "y": np.array(list("abab"))}
    np.savez(tmp_path / "a.npz", **{**good, **arrays})
    refused(tmp_path, pack(tmp_path, "arrays", tmp_path / "a.npz"), where, problem, mend)


# ------------------------------------------------------------------ where it is to go


def sources(tmp_path: Path) -> list[tuple[str, Path]]:
    table(*GOOD)(tmp_path)
    ratings(*RATINGS)(tmp_path)
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 3, 3), np.uint8), y=np.array(list("abab")))
    return [("folder", folder(tmp_path)), ("csv", tmp_path / "t.csv"), ("ratings", tmp_path / "r.csv"),
            ("arrays", tmp_path / "a.npz")]  # fmt: skip


@pytest.mark.parametrize("number", range(4))
def test_a_place_that_is_taken_is_left_alone(tmp_path: Path, number: int) -> None:
    kind, source = sources(tmp_path)[number]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    told = pack(tmp_path, kind, source)
    assert told.exit_code == 1 and "out: exists already; remove it or choose another directory" in told.output
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"] and not list(tmp_path.glob(".out*"))


@pytest.mark.parametrize("number", range(4))
def test_a_full_disk(tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, source = sources(tmp_path)[number]
    original, written = tarfile.TarFile.addfile, []

    def full(self: tarfile.TarFile, *arguments: Any) -> None:
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(True)
        original(self, *arguments)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    told = pack(tmp_path, kind, source)
    assert written, "the disk was never written to"
    refused(tmp_path, told, "/out", "cannot be written (No space left on device)", "free some space")


def test_a_full_folder_of_temporary_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def write(self, data: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def close(self) -> None:
            pass

    table(*GOOD)(tmp_path)
    monkeypatch.setattr("metadist.data.spool.tempfile.TemporaryFile", lambda **_: Full())
    told = pack(tmp_path, "csv", tmp_path / "t.csv")
    refused(tmp_path, told, "", "cannot be written (No space left on device)", "or set TMPDIR to another folder")
