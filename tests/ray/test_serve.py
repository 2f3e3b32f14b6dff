"""`metadist serve`: the learner's own answers over HTTP, refusals, a replica that dies, the page in a browser."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from metadist.adapting import adapt
from metadist.cli import main
from metadist.config import validate
from metadist.data import pack_folder
from metadist.experiment import Experiment
from metadist.serving.adapters import AdapterStore
from metadist.training import train
from tests.browser import WIDTH, needs_browser, opened
from tests.conftest import ROOT
from tests.ray.head import free_port
from tests.test_using import COLOURS, SIDE, draw

TOKEN, MOST_ADAPTERS, MOST_BYTES, MOST_EXAMPLES = "a" * 20, 40, 200_000, 30


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    pack_folder(draw(folder / "pictures", dict.fromkeys(COLOURS, 6)), folder / "set", size=SIDE)
    config = {
        "tasks": {"type": "shards", "path": str(folder / "set"), "ways": 3, "shots": 2, "query_shots": 2},
        "model": {"type": "conv4", "filters": 8, "batchnorm": "inductive"}, "algorithm": {"type": "protonet"},
        "engine": {"compile": False}, "outer": {"steps": 20, "meta_batch_size": 2, "tasks_per_microbatch": 2},
        "runtime": {"type": "local"}, "evaluation": {"episodes": 2, "split": "train"},
        "tracking": {"wandb": {"mode": "disabled"}, "console": False},
    }  # fmt: skip
    train(Experiment(validate(config, "the test")), folder / "run")
    return folder / "run"


@dataclass
class Client:
    """Of one server."""

    url: str
    token: str = TOKEN

    def ask(self, method: str, path: str, body: Any = None, token: str | None = None) -> tuple[int, Any]:
        bearer = self.token if token is None else token
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {bearer}"}
        data = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as reply:
                status, text = reply.status, reply.read()
        except urllib.error.HTTPError as e:
            status, text = e.code, e.read()
        try:
            return status, json.loads(text or b"null")
        except ValueError:
            return status, text.decode()

    def adapter(self, support: list[dict[str, str]]) -> str:
        status, told = self.ask("POST", "adapters", {"support": support})
        assert status == 201, told
        return str(told["adapter"])

    def predict(self, adapter: str, query: list[dict[str, str]]) -> list[dict[str, float]]:
        status, told = self.ask("POST", f"adapters/{adapter}/predict", {"query": query})
        assert status == 200, told
        return [p["probabilities"] for p in told["predictions"]]


@pytest.fixture(scope="module")
def server(run_dir: Path) -> Iterator[Client]:
    port = free_port()
    words = ["serve", run_dir, "--port", port, "--replicas", 2, "--max-adapters", MOST_ADAPTERS]
    words += ["--max-bytes", MOST_BYTES, "--max-examples", MOST_EXAMPLES]
    process = subprocess.Popen(
        [sys.executable, "-m", "metadist.cli", *map(str, words)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "METADIST_TOKEN": TOKEN},
    )  # fmt: skip
    client = Client(f"http://127.0.0.1:{port}/")
    try:
        assert process.stderr is not None
        line = next((line for line in process.stderr if "is served at" in line or line.startswith("metadist:")), "")
        assert f"is served at {client.url}" in line, line
        yield client
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, "it ends when it is told to"


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    draw(folder / "known", {"red": 3, "green": 1, "blue": 2})
    draw(folder / "unknown", {"red": 2, "green": 2, "blue": 1}, start=1)
    return folder


def encoded(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def support_of(folder: Path, **names: str) -> list[dict[str, str]]:
    """The known pictures; classes may have other names."""
    files = sorted((folder / "known").rglob("*.png"))
    return [{"class": names.get(f.parent.name, f.parent.name), "picture": encoded(f)} for f in files]


def query_of(folder: Path) -> list[dict[str, str]]:
    return [{"picture": encoded(f)} for f in sorted((folder / "unknown").rglob("*.png"))]


def wanted(run_dir: Path, folder: Path) -> list[dict[str, float]]:
    """What `metadist adapt` says."""
    from metadist.adapting import predict

    return [p.probabilities for p in predict(adapt(run_dir, folder / "known"), folder / "unknown")]


def close(found: list[dict[str, float]], other: list[dict[str, float]]) -> bool:
    return [*map(list, found)] == [*map(list, other)] and all(
        f[k] == pytest.approx(o[k], abs=1e-5) for f, o in zip(found, other, strict=True) for k in o
    )


@pytest.mark.slow
def test_the_answers_are_the_learners_own_under_load_as_well(server: Client, run_dir: Path, mine: Path) -> None:
    answers = wanted(run_dir, mine)
    few = support_of(mine)[1:]  # another support set, of another size
    one, other = server.adapter(support_of(mine)), server.adapter(few)
    query = query_of(mine)
    assert one != other and close(server.predict(one, query), answers)
    of_few = server.predict(other, query)
    assert not close(of_few, answers)

    def ask(n: int) -> bool:
        place, adapter = n % len(query), one if n % 2 else other
        if n % 5 == 0:  # somebody adapts meanwhile
            adapter = server.adapter(few)
        found = server.predict(adapter, [query[place]])
        if n % 5 == 0:
            assert server.ask("DELETE", f"adapters/{adapter}")[0] == 204
        return close(found, [(answers if adapter == one else of_few)[place]])

    with ThreadPoolExecutor(12) as threads:
        assert all(threads.map(ask, range(120)))
    assert server.ask("DELETE", f"adapters/{other}")[0] == 204
    assert server.ask("POST", f"adapters/{other}/predict", {"query": query})[0] == 404
    assert close(server.predict(one, query), answers), "another's adapter is not touched"


def test_what_is_not_answered_is_told_why(server: Client, mine: Path) -> None:
    good, query = support_of(mine), query_of(mine)
    adapter = server.adapter(good)
    cases: list[tuple[str, Any, int, str]] = [
        ("adapters", b"no json", 400, 'wanted JSON: {"support": [{"class": ..., "picture": ...}, ...]}'),
        ("adapters", b"[" * 50_000, 400, "wanted JSON"),
        ("adapters", {"support": []}, 400, "wanted JSON"),
        ("adapters", {"support": ["a"]}, 400, "wanted JSON"),
        ("adapters", {"support": [{"class": "a"}]}, 400, "support[0] has no text for 'picture'"),
        ("adapters", {"support": [{"class": 3, "picture": "x"}]}, 400, "support[0] has no text for 'class'"),
        ("adapters", {"support": [{**good[0], "class": " "}]}, 400, "a class needs a name"),
        ("adapters", {"support": good[:1]}, 400, "two classes at least"),
        ("adapters", {"support": [*good, {"class": "x", "picture": "%%"}]}, 400, "picture 6 is not base64"),
        ("adapters", {"support": [*good, {"class": "x", "picture": "aGk="}]}, 400, "picture 6: cannot be read"),
        ("adapters", {"support": good * 6}, 413, f"36 examples, more than {MOST_EXAMPLES}"),
        ("adapters", b" " * (MOST_BYTES + 1), 413, f"more than {MOST_BYTES} bytes"),
        (f"adapters/{adapter}/predict", {"query": [{}]}, 400, "query[0] has no text for 'picture'"),
        ("adapters/nobody/predict", {"query": query}, 404, "there is no such adapter"),
        ("adapters/..%2f..%2fconfig/predict", {"query": query}, 404, "there are GET /"),
        ("elsewhere", {}, 404, "there are GET /"),
    ]  # fmt: skip
    for path, body, status, why in cases:
        found, told = server.ask("POST", path, body)
        assert found == status and why in told["error"], (path, found, told)
    for token in ("", "b" * 20):
        own = f"adapters/{adapter}"
        for method, path in (("POST", "adapters"), ("POST", f"{own}/predict"), ("DELETE", own)):
            status, told = server.ask(method, path, {"support": good, "query": query}, token)
            assert status == 401 and "Authorization" in told["error"]
    assert server.ask("GET", "health", token="")[0] == 200, "whether it lives anyone may know"
    assert close(server.predict(adapter, query[:1]), server.predict(adapter, query[:1]))


@pytest.mark.slow
def test_a_replica_that_is_killed_takes_nobodys_adapter_along(server: Client, run_dir: Path, mine: Path) -> None:
    answers = wanted(run_dir, mine)
    adapters = [server.adapter(support_of(mine)) for _ in range(6)]
    processes = {server.ask("GET", "health")[1]["process"] for _ in range(60)}
    assert len(processes) == 2
    os.kill(min(processes), signal.SIGKILL)
    for _ in range(3):
        for adapter in adapters:
            for attempt in range(20):  # what was on its way to the dead one fails, and is asked again
                status, told = server.ask("POST", f"adapters/{adapter}/predict", {"query": query_of(mine)})
                if status == 200:
                    break
                assert status >= 500 and attempt < 19, told
                time.sleep(0.5)
            assert close([p["probabilities"] for p in told["predictions"]], answers)
    for _ in range(120):
        now = {server.ask("GET", "health")[1].get("process") for _ in range(20)}
        if len(now - processes) == 1:
            break
        time.sleep(0.5)
    assert len(now) == 2 and min(processes) not in now, "another takes its place"


@pytest.mark.slow
def test_no_more_adapters_than_there_may_be(server: Client, mine: Path) -> None:
    made = []
    for _ in range(MOST_ADAPTERS + 1):
        status, told = server.ask("POST", "adapters", {"support": support_of(mine)})
        if status == 503:
            break
        made.append(told["adapter"])
    assert status == 503 and "delete one" in told["error"]
    for adapter in made:
        assert server.ask("DELETE", f"adapters/{adapter}")[0] == 204
    server.adapter(support_of(mine))


# --------------------------------------------------------------------------- the page

DRIVE = """(async () => {
  const file = (text, name) => new File([Uint8Array.from(atob(text), c => c.charCodeAt(0))], name, {type: "image/png"});
  const give = (input, files) => {
    const held = new DataTransfer(); files.forEach(f => held.items.add(f)); input.files = held.files; input.onchange();
  };
  const wait = () => new Promise(r => setTimeout(r, 100));
  const until = async (ready) => { for (let i = 0; i < 300 && !ready(); i++) await wait(); };
  document.getElementById("token").value = TOKEN;
  document.getElementById("more").click();
  const sets = [...document.querySelectorAll("#classes fieldset")];
  Object.entries(KNOWN).forEach(([name, pictures], i) => {
    sets[i].querySelector("input[type=text]").value = name;
    give(sets[i].querySelector("input[type=file]"), pictures.map((p, k) => file(p, name + k + ".png")));
  });
  await until(() => document.querySelectorAll("#classes img").length === COUNT);
  document.getElementById("learn").click();
  await until(() => !document.getElementById("asking").hidden);
  give(document.querySelector("#query input"), [file(ASKED, "asked.png")]);
  await until(() => document.querySelectorAll("#query img").length === 1);
  document.getElementById("ask").click();
  await until(() => document.querySelectorAll("#answer .bar").length);
  return JSON.stringify({
    said: document.getElementById("said").textContent,
    bars: [...document.querySelectorAll("#answer .bar")].map(b => [...b.children].map(c => c.textContent)),
    wide: document.documentElement.scrollWidth,
  });
})()"""


async def _driven(address: str, url: str, script: str) -> tuple[dict[str, Any], list[Any]]:
    async with opened(address, url) as browser:
        told = await browser.ask("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        return json.loads(told["result"]["value"]), browser.complaints


@needs_browser
def test_the_page_teaches_and_asks(server: Client, run_dir: Path, mine: Path, devtools: str) -> None:
    known: dict[str, list[str]] = {}
    for example in support_of(mine):
        known.setdefault(example["class"], []).append(example["picture"])
    script = DRIVE.replace("TOKEN", json.dumps(TOKEN)).replace("KNOWN", json.dumps(known)).replace("COUNT", "6")
    script = script.replace("ASKED", json.dumps(query_of(mine)[0]["picture"]))
    seen, complaints = asyncio.run(_driven(devtools, server.url, script))
    answer = wanted(run_dir, mine)[0]
    assert not [c for c in complaints if "favicon" not in json.dumps(c)], complaints
    shown = {name: share for name, _, share in seen["bars"]}
    assert shown == {name: f"{100 * p:.1f} %" for name, p in answer.items()}
    shares = [float(share.removesuffix(" %")) for *_, share in seen["bars"]]
    assert shares == sorted(shares, reverse=True) and seen["wide"] <= WIDTH


# --------------------------------------------------------------------------- without a server


def test_adapters_expire_and_their_names_lead_nowhere_else(tmp_path: Path) -> None:
    store = AdapterStore(tmp_path / "kept", 2, 0.3)
    made = store.put(torch.rand(2, 3), torch.tensor([0, 1]), ["a", "b"])
    assert made is not None
    held = AdapterStore(tmp_path / "kept", 2, 0.3).get(made[0])
    assert held is not None and held.classes == ["a", "b"] and held.y.tolist() == [0, 1]
    assert store.put(torch.rand(2, 3), torch.tensor([0, 1]), ["a", "b"]) is not None
    assert store.put(torch.rand(2, 3), torch.tensor([0, 1]), ["a", "b"]) is None, "no room"
    time.sleep(0.4)
    assert store.get(made[0]) is None
    assert store.put(torch.rand(2, 3), torch.tensor([0, 1]), ["a", "b"]) is not None, "what has expired makes room"
    (tmp_path / "secret.adapter").write_bytes(b"no")
    for name in ("../secret", "", "x" * 22, "a/b"):
        assert store.get(name) is None and not store.remove(name)
    damaged = store.folder / f"{'d' * 22}.adapter"
    damaged.write_bytes(b"\x05\0\0\0\0\0\0\0nope!")
    assert store.get("d" * 22) is None
    assert (tmp_path / "secret.adapter").exists()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--host", "0.0.0.0"], 2, "--host: is 0.0.0.0, open to other machines, and there is no token; give --tok"),
        (["--token-file", "nowhere"], 2, "--token-file: nowhere cannot be read"),
        (["--port", "TAKEN"], 1, "cannot be had (Address already in use); name another port"),
        (["--checkpoint", "7"], 1, "holds no checkpoint of version 7"),
    ],
)
def test_what_cannot_be_served_is_told(
    run_dir: Path, words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("METADIST_TOKEN", raising=False)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        words = [str(taken.getsockname()[1]) if w == "TAKEN" else w for w in words]
        with pytest.raises(SystemExit) as stopped:
            main(["serve", str(run_dir), *words])
    assert stopped.value.code == code and told in capsys.readouterr().err
