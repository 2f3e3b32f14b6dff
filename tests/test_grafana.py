"""The dashboard asks for what there is, and for all of it."""

from __future__ import annotations

import json
import re

from metadist.tracking.prometheus import GAUGES, PREFIX
from tests.conftest import ROOT

BOARD = json.loads((ROOT / "cluster" / "grafana" / "metadist.json").read_text())
EXPRESSIONS = [target["expr"] for panel in BOARD["panels"] for target in panel.get("targets", [])]


def test_it_refers_only_to_metrics_that_exist_and_to_each_of_them() -> None:
    queried = [v["query"]["query"] for v in BOARD["templating"]["list"] if v["type"] == "query"]
    named = {name for text in [*EXPRESSIONS, *queried] for name in re.findall(r"\bray_\w+", text)}
    assert named == {PREFIX + name for name in GAUGES}


def test_it_asks_only_for_tags_that_the_metric_has() -> None:
    asked = 0
    for text in EXPRESSIONS:
        for tags, name, matched in re.findall(r"by \(([\w, ]+)\) \(?(?:deriv\()?(ray_\w+)\{([^}]*)\}", text):
            known = {"run", *GAUGES[name.removeprefix(PREFIX)][1]}
            assert {t.strip() for t in tags.split(",")} | set(re.findall(r"(\w+)=", matched)) <= known, text
            asked += 1
    assert asked >= len(EXPRESSIONS)


def test_its_panels_have_a_place_and_a_meaning_each() -> None:
    panels = [p for p in BOARD["panels"] if p["type"] != "row"]
    assert all(p["description"] and p["title"] and p["targets"] for p in panels)
    cells = [
        (x, y)
        for place in (p["gridPos"] for p in BOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24, "panels overlap"
    assert len({p["id"] for p in BOARD["panels"]}) == len(BOARD["panels"])
    rows = {p["title"] for p in BOARD["panels"] if p["type"] == "row"}
    assert rows == {"Learning", "Throughput and time", "Workers", "Restarts and staleness"}
