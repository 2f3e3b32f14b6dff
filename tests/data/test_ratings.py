"""Ratings: a class is a user, the past comes first, and the notes say what the numbers mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from metadist.cli import main
from metadist.data import Columns, FeatureTable, ShardSet, load_manifest, pack_ratings, verify
from metadist.errors import ConfigError, DataError

HEADER = "userId,movieId,rating,timestamp"


def write(path: Path, rows: list[str], header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def log(path: Path, users: int = 10, each: int = 3) -> Path:
    """Users 1, 2, ... who rate films 10, 11, ... from the last to the first."""
    rows = [f"{u},{10 + i},{1 + (u + i) % 5},{1000 - i}" for i in range(each) for u in range(1, users + 1)]
    return write(path, rows)


def rated(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The ratings of each user, in the order of the set's rows."""
    shards = ShardSet(path)
    found: dict[str, list[dict[str, Any]]] = {}
    for b in range(len(shards.index)):
        user = shards.manifest.classes[int(shards.index["class"][b])]
        found.setdefault(user, []).extend(json.loads(text) for text in shards.texts(b))
    return found


def pack(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["data", "pack", "ratings", *map(str, arguments)])


def test_ratings_of_a_user_are_in_the_order_of_time_also_over_blocks(tmp_path: Path) -> None:
    m = pack_ratings(log(tmp_path / "r.csv", each=9), tmp_path / "out", least=2, block_examples=4)
    assert m.blocks == 30 and m.classes == tuple(map(str, range(1, 11)))
    found = rated(tmp_path / "out")
    assert [r["time"] for r in found["3"]] == list(range(992, 1001))
    assert [m.notes["items"][r["item"]] for r in found["3"]] == [str(i) for i in range(18, 9, -1)]
    assert [r["rating"] for r in found["3"]] == [1 + (3 + i) % 5 for i in range(8, -1, -1)]
    assert m.notes["kind"] == "ratings" and m.notes["scale"] == [1.0, 5.0]
    assert verify(tmp_path / "out").examples == 90


def test_an_example_is_json_with_sorted_keys(tmp_path: Path) -> None:
    rows = ["7,b,3.5,2.5", "7,a,4,1", "8,a,5,3", "8,b,1,2020-01-01T00:00:00Z"]
    pack_ratings(write(tmp_path / "r.csv", rows), tmp_path / "out", least=2)
    shards = ShardSet(tmp_path / "out")
    assert shards.texts(0) == ['{"item": 0, "rating": 4.0, "time": 1}', '{"item": 1, "rating": 3.5, "time": 2.5}']
    assert rated(tmp_path / "out")["8"][1]["time"] == 1577836800


def test_without_times_the_rows_tell_the_order(tmp_path: Path) -> None:
    source = write(tmp_path / "r.csv", ["a,y,1", "b,x,2", "a,x,3", "b,y,4"], "who,what,stars")
    told = pack("--source", source, "--out", tmp_path / "out", "--user-column", "who", "--item-column", "what",
                "--rating-column", "stars", "--time-column", "", "--least", 2)  # fmt: skip
    assert told.exit_code == 0, told.output
    assert rated(tmp_path / "out")["a"] == [{"item": 1, "rating": 1.0}, {"item": 0, "rating": 3.0}]


def test_equal_times_keep_the_order_of_the_rows(tmp_path: Path) -> None:
    rows = [f"u,{i},1,5" for i in (4, 2, 9, 1)]
    m = pack_ratings(write(tmp_path / "r.csv", rows), tmp_path / "out", least=2)
    assert [m.notes["items"][r["item"]] for r in rated(tmp_path / "out")["u"]] == ["4", "2", "9", "1"]


def test_ids_that_are_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    rows = [f"{u},{i},1,5" for u in (10, 9) for i in (100, 20)]
    m = pack_ratings(write(tmp_path / "r.csv", rows), tmp_path / "out", least=2)
    assert m.classes == ("9", "10") and m.notes["items"] == ["20", "100"]


def test_users_with_few_ratings_are_left_out_with_items_of_theirs_alone(tmp_path: Path) -> None:
    rows = ["1,a,1,1", "1,b,2,2", "2,c,5,3", "3,a,1,1", "3,b,1,2"]
    source = write(tmp_path / "r.csv", rows)
    told = pack("--source", source, "--out", tmp_path / "out", "--least", 2)
    assert told.exit_code == 0 and "left out 1 user with too few ratings" in told.output, told.output
    m = load_manifest(tmp_path / "out")
    assert m.classes == ("1", "3") and m.notes["items"] == ["a", "b"] and m.notes["scale"] == [1.0, 2.0]


def test_users_are_dealt_by_seed(tmp_path: Path) -> None:
    source = log(tmp_path / "r.csv")
    a, b, c = (pack_ratings(source, tmp_path / f"{i}", least=2, seed=i // 2) for i in range(3))
    assert a.splits == b.splits != c.splits and {s: len(u) for s, u in a.splits.items()} == {
        "train": 6, "validation": 2, "test": 2,
    }  # fmt: skip


def test_features_of_items_and_users(tmp_path: Path) -> None:
    source = log(tmp_path / "r.csv", users=3, each=2)
    (tmp_path / "films.csv").write_text("id,name,kind,tone\n11,Heat (1995),crime|drama,dark\n10,Up (2009),,light\n")
    (tmp_path / "people.jsonl").write_text("".join(json.dumps({"userId": u, "job": j}) + "\n" for u, j in
                                                   ((3, "cook"), (1, "poet"), (2, "cook"), (9, "king"))))  # fmt: skip
    told = pack("--source", source, "--out", tmp_path / "out", "--least", 2, "--items", tmp_path / "films.csv",
                "--item-id-column", "id", "--item-name-column", "name", "--features-column", "kind",
                "--features-column", "tone", "--year-column", "name", "--users", tmp_path / "people.jsonl",
                "--user-features-column", "job")  # fmt: skip
    assert told.exit_code == 0, told.output
    notes = load_manifest(tmp_path / "out").notes
    assert notes["items"] == ["Up (2009)", "Heat (1995)"]
    names = ["kind=crime", "kind=drama", "release 1990s", "release 2000s", "tone=dark", "tone=light"]
    assert notes["item_features"] == {"names": names, "values": [[3, 5], [0, 1, 2, 4]]}
    assert notes["user_features"] == {"names": ["cook", "poet"], "values": [[1], [0], [0]]}


def test_a_table_of_features_that_lacks_an_item(tmp_path: Path) -> None:
    source = log(tmp_path / "r.csv", users=3, each=2)
    (tmp_path / "films.csv").write_text("movieId,kind\n10,x\n")
    table = FeatureTable(tmp_path / "films.csv", "movieId", ["kind"])
    with pytest.raises(DataError, match=r"films\.csv: lacks 1 of 2 items that ratings name: '11'; add them, or"):
        pack_ratings(source, tmp_path / "out", least=2, items=table)
    m = pack_ratings(source, tmp_path / "out", least=2, items=table, on_bad="skip")
    assert m.notes["item_features"] == {"names": ["x"], "values": [[0], []]}
    (tmp_path / "films.csv").write_text("movieId,kind\n10,x\n11,y\n10,z\n")
    with pytest.raises(DataError, match=r"films\.csv:4: '10' is there again; first at line 2; keep one"):
        pack_ratings(source, tmp_path / "twice", least=2, items=table)
    with pytest.raises(ConfigError, match="items: features: no column of .*films.csv is named; say which with"):
        pack_ratings(source, tmp_path / "none", least=2, items=FeatureTable(tmp_path / "films.csv", "movieId", []))


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,10,good,5", "column 'rating' holds 'good', not a number; mend the row, or leave it out (--on-bad skip)"),
        ("1,10,nan,5", "column 'rating' holds nan, not a finite number"),
        ("1,10,,5", "column 'rating' holds '', not a number"),
        ("1,10,9,5", "column 'rating' holds 9, not of the scale 1 to 5"),
        ("1,10,2,soon", "column 'timestamp' holds 'soon', neither seconds nor a date"),
        ("1,10,2,inf", "column 'timestamp' holds inf, not a finite number"),
        (" ,10,2,5", "column 'userId' is empty"),
        ("1,12,2,5", "user '1' rates item '12' again; first at line 22; keep one of the two"),
        ("1,10,2", "3 values, but the header names 4 columns"),
    ],
)
def test_a_bad_row_is_named_or_left_out(tmp_path: Path, row: str, message: str) -> None:
    source = log(tmp_path / "r.csv")
    source.write_text(source.read_text() + row + "\n")
    words = ["--source", source, "--out", tmp_path / "out", "--least", 2, "--scale", 1, 5]
    told = pack(*words)
    assert told.exit_code == 1 and f"r.csv:32: {message}" in told.output and not (tmp_path / "out").exists()
    few = pack(*words, "--on-bad", "skip")
    assert few.exit_code == 1 and "more than 0 of" in few.output and message in few.output
    told = pack(*words, "--on-bad", "skip", "--most-bad", 0.1)
    assert told.exit_code == 0 and "left out 1 row of" in told.output, told.output
    assert {u: len(r) for u, r in rated(tmp_path / "out").items()} == {str(u): 3 for u in range(1, 11)}


def test_movielens_1m_has_neither_header_nor_commas(tmp_path: Path) -> None:
    root = tmp_path / "ml-1m"
    root.mkdir()
    (root / "ratings.dat").write_text("1::2::5::978300760\n1::1::3::978302109\n2::1::4::9\n2::2::4::7\n")
    (root / "movies.dat").write_text("1::Toy Story (1995)::Animation|Comedy\n2::Misérables, Les (1958)::Drama\n",
                                     encoding="latin-1")  # fmt: skip
    (root / "users.dat").write_text("1::F::1::10::48067\n2::M::56::16::70072\n")
    m = pack_ratings(root, tmp_path / "out", least=2)
    assert m.notes["items"] == ["Toy Story (1995)", "Misérables, Les (1958)"] and m.notes["scale"] == [1.0, 5.0]
    assert m.notes["item_features"]["names"] == ["Animation", "Comedy", "Drama", "release 1950s", "release 1990s"]
    assert m.notes["user_features"] == {
        "names": ["age=1", "age=56", "gender=F", "gender=M", "occupation=10", "occupation=16"],
        "values": [[0, 2, 4], [1, 3, 5]],
    }
    assert [r["item"] for r in rated(tmp_path / "out")["1"]] == [1, 0] and m.name == "ml-1m"


def test_real_movielens(metadist_data: Path, tmp_path: Path) -> None:
    told = pack("--source", metadist_data / "movielens-small", "--out", tmp_path / "out")
    assert told.exit_code == 0, told.output
    m = load_manifest(tmp_path / "out")
    assert (len(m.classes), m.examples, len(m.notes["items"]), m.notes["scale"]) == (610, 100836, 9724, [0.5, 5.0])
    features = m.notes["item_features"]
    assert m.notes["items"][0] == "Toy Story (1995)" and len(features["values"]) == 9724
    assert [features["names"][f] for f in features["values"][0]] == [
        "Adventure", "Animation", "Children", "Comedy", "Fantasy", "release 1990s",
    ]  # fmt: skip
    for ratings in rated(tmp_path / "out").values():
        times = [r["time"] for r in ratings]
        assert times == sorted(times) and len(times) >= 20
    assert Columns() == Columns("userId", "movieId", "rating", "timestamp")
