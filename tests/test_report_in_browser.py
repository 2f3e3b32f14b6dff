"""The report as a phone shows it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from metadist.cli import main
from tests.browser import WIDTH, needs_browser, opened
from tests.conftest import ROOT

LOOK = """JSON.stringify({
  pictures: [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
  width: document.documentElement.scrollWidth,
  wide: [...document.body.querySelectorAll('*')].filter(e => !e.closest('.scroll, pre, svg')
    && e.getBoundingClientRect().right > screen.width + 0.5).map(e => e.outerHTML.slice(0, 80)),
  bar: document.querySelector('.bar')
    && [...document.querySelectorAll('.bar i')].reduce((sum, i) => sum + i.getBoundingClientRect().width, 0)
    / document.querySelector('.bar').getBoundingClientRect().width,
})"""

pytestmark = needs_browser


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a real run, short as it is, with every section that a report can have."""
    run_dir = tmp_path_factory.mktemp("browser") / "run"
    words = ["runtime.type=local", "outer.steps=3", "outer.meta_batch_size=4", "evaluation.episodes=8",
             "model.filters=8", "evaluation.every=1", "evaluation.validation_episodes=4", "engine.compile=false",
             "tracking.wandb.mode=disabled"]  # fmt: skip
    arguments = ["train", str(ROOT / "configs" / "glyphs_maml.yaml"), *words, "--run-dir", str(run_dir)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    return run_dir / "report.html"


async def _seen(address: str, page: Path, dark: bool, picture: Path) -> tuple[dict[str, Any], list[Any]]:
    async with opened(address, page.as_uri(), dark) as browser:
        unfold = "document.querySelectorAll('details').forEach(d => d.open = true)"
        await browser.ask("Runtime.evaluate", expression=unfold)
        decoded = "Promise.all([...document.images].map(i => i.decode()))"
        await browser.ask("Runtime.evaluate", expression=decoded, awaitPromise=True)
        found = await browser.ask("Runtime.evaluate", expression=LOOK)
        shot = await browser.ask("Page.captureScreenshot", captureBeyondViewport=True)
        picture.write_text(shot["data"])
        return json.loads(found["result"]["value"]), browser.complaints


@pytest.mark.parametrize("dark", [False, True], ids=["by day", "by night"])
def test_a_phone_shows_all_of_it_without_complaint(report: Path, devtools: str, dark: bool, tmp_path: Path) -> None:
    seen, complaints = asyncio.run(_seen(devtools, report, dark, tmp_path / "shot.base64"))
    assert complaints == []
    assert len(seen["pictures"]) == 2, "the learning curve and the episodes"
    assert all(complete and pixels > 0 and width > 0 for complete, pixels, width in seen["pictures"])
    assert seen["width"] <= WIDTH and seen["wide"] == []
    assert seen["bar"] == pytest.approx(1, abs=0.01), "the parts of the time do not fill their bar"


@pytest.mark.parametrize("kind", ["pictures", "texts", "ratings"])
def test_a_phone_shows_what_a_set_holds(kind: str, devtools: str, tmp_path: Path) -> None:
    sources = {
        "pictures": lambda: _save(tmp_path / "s.npz", x=np.zeros((60, 9, 9), np.uint8), y=np.arange(60) // 3),
        "texts": lambda: _rows("text,label", [f"{'word ' * 40}{'long' * 60},{'Class' * 12}{i % 9}" for i in range(60)]),
        "ratings": lambda: _rows("userId,movieId,rating,timestamp", [f"{i % 9},{i},{i % 5},{i}" for i in range(99)]),
    }

    def _save(path: Path, **arrays: Any) -> list[str]:
        np.savez(path, **arrays)
        return ["arrays", "--source", str(path)]

    def _rows(header: str, rows: list[str]) -> list[str]:
        (tmp_path / "s.csv").write_text("\n".join([header, *rows]))
        words = ["csv", "--text-column", "text", "--label-column", "label"] if kind == "texts" else ["ratings"]
        return [*words, "--source", str(tmp_path / "s.csv"), "--least", "2"]

    for words in (["pack", *sources[kind](), "--out", str(tmp_path / "out")],
                  ["info", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")]):  # fmt: skip
        told = CliRunner().invoke(main, ["data", *words])
        assert told.exit_code == 0, told.output
    seen, complaints = asyncio.run(_seen(devtools, tmp_path / "page.html", False, tmp_path / "shot.base64"))
    assert complaints == [] and seen["width"] <= WIDTH and seen["wide"] == []
    assert bool(seen["pictures"]) == (kind == "pictures")
    assert all(complete and pixels > 0 and width > 0 for complete, pixels, width in seen["pictures"])


def test_the_looking_would_see_what_is_wrong(devtools: str, tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text(
        "<meta name=viewport content='width=device-width'><div class=bar style='width: 100px'></div>"
        "<img src='data:image/png;base64,iVBORw0KGgo='><div style='width: 800px'>wide</div>"
        "<script>console.error('oh'); undefinedThing()</script>"
    )
    seen, complaints = asyncio.run(_seen(devtools, page, False, tmp_path / "shot.base64"))
    assert len(complaints) >= 2 and seen["pictures"][0][1] == 0
    assert seen["width"] >= 800 and any("800px" in e for e in seen["wide"])
