"""Headless Chromium, driven by the DevTools protocol."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 390, 844
FLAGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--disable-dev-shm-usage", "--remote-debugging-port=0",
]  # fmt: skip

needs_browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium here (apt-get install chromium)")


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


@contextlib.contextmanager
def running(folder: Path) -> Iterator[str]:
    """A browser with nobody's profile, which is kept in ``folder``; the address of its DevTools."""
    assert BROWSER is not None
    profile = folder / "profile"
    process = subprocess.Popen(
        [BROWSER, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
        stderr=subprocess.PIPE, text=True, env={**os.environ, "HOME": str(folder)},
    )  # fmt: skip
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "DevTools listening on" in line), "")
        assert line, "the browser did not start"
        yield line.split()[-1].split("/")[2]
    finally:
        process.terminate()
        process.wait(timeout=30)


@contextlib.asynccontextmanager
async def opened(address: str, url: str, dark: bool = False) -> AsyncIterator[Browser]:
    """A page on a phone's screen, loaded.

    Args:
        address: of the DevTools.
        url: of the page.
        dark: whether the phone asks for the dark theme.
    """
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
            await browser.ask("Page.navigate", url=url)
            await browser.wait_for("Page.loadEventFired")
            yield browser
