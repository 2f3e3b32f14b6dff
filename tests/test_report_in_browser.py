"""The report as a phone shows it: headless Chromium, driven by the DevTools protocol."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pytest
from click.testing import CliRunner

from metadist.cli import main
from tests.conftest import ROOT

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 390, 844
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-port=0",
]  # fmt: skip
LOOK = """JSON.stringify({
  pictures: [...document.images].map(i => [i.complete, i.naturalWidth, i.getBoundingClientRect().width]),
  width: document.documentElement.scrollWidth,
  wide: [...document.body.querySelectorAll('*')].filter(e => !e.closest('.scroll, pre, svg')
    && e.getBoundingClientRect().right > screen.width + 0.5).map(e => e.outerHTML.slice(0, 80)),
  bar: document.querySelector('.bar')
    && [...document.querySelectorAll('.bar i')].reduce((sum, i) => sum + i.getBoundingClientRect().width, 0)
    / document.querySelector('.bar').getBoundingClientRect().width,
})"""

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")


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


class Browser:
    """One page of a browser.

    Args:
        socket: of its DevTools.

    ``complaints`` are errors and warnings that the page has given rise to.
    """

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket, self._numbers = socket, itertools.count(1)
        self.complaints: list[Any] = []
        self._events: list[str] = []

    async def ask(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": params})
        while (told := await self._next()).get("id") != number:
            pass
        assert "error" not in told, told
        return dict(told["result"])

    async def wait_for(self, event: str) -> None:
        while event not in self._events:
            await self._next()

    async def _next(self) -> dict[str, Any]:
        told = json.loads(await self._socket.receive_str(timeout=60))
        kind, params = told.get("method", ""), told.get("params", {})
        self._events.append(kind)
        level = params.get("entry", {}).get("level") or params.get("type")
        if kind == "Runtime.exceptionThrown" or (
            kind in ("Log.entryAdded", "Runtime.consoleAPICalled") and level in ("error", "warning", "assert")
        ):
            self.complaints.append(params)
        return dict(told)


@pytest.fixture
def devtools(tmp_path: Path) -> Iterator[str]:
    """The address of a browser's DevTools, with nobody's profile."""
    assert BROWSER is not None
    profile = tmp_path / "profile"
    process = subprocess.Popen(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "HOME": str(tmp_path)},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "DevTools listening on" in line), "")
        assert line, "the browser did not start"
        yield line.split()[-1].split("/")[2]
    finally:
        process.terminate()
        process.wait(timeout=30)


async def _seen(address: str, page: Path, dark: bool, picture: Path) -> tuple[dict[str, Any], list[Any]]:
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://{address}/json/list") as answer:
            (tab,) = [t for t in await answer.json() if t["type"] == "page"]
        async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=1 << 28) as socket:
            browser = Browser(socket)
            for domain in ("Page", "Runtime", "Log", "Network"):
                await browser.ask(f"{domain}.enable")
            await browser.ask(
                "Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=2, mobile=True
            )
            theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
            await browser.ask("Emulation.setEmulatedMedia", features=[theme])
            await browser.ask("Page.navigate", url=page.as_uri())
            await browser.wait_for("Page.loadEventFired")
            opened = "document.querySelectorAll('details').forEach(d => d.open = true)"
            await browser.ask("Runtime.evaluate", expression=opened)
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
