"""`metadist serve` under load on this machine: how long adapting and predicting take, and what batching gains.

Serves a run (`--run`, or a small prototypical network trained here on letters) and asks it over loopback: adapters are
made by several clients at once, then predictions are asked for by one client in a loop and by several at once. Before
anything is timed, the answers are compared with those of the learner in this process.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import datetime
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import metadist as md  # noqa: E402
from metadist.config import load_config  # noqa: E402
from metadist.errors import MetadistError  # noqa: E402
from metadist.experiment import Experiment  # noqa: E402
from metadist.finished import load_learner  # noqa: E402
from metadist.inputs import Inputs  # noqa: E402
from metadist.training import train  # noqa: E402
from tools.bench._tables import cells, keep_rows, show_table  # noqa: E402

CONFIG = ROOT / "configs" / "glyphs_protonet.yaml"
COLUMNS = ("what", "clients", "requests", "p50_ms", "p99_ms", "per_s")
WAYS, SHOTS, ASKED = 5, 5, 5


def main() -> None:
    options = arguments()
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        try:
            run_dir = options.run or trained(folder)
            inputs = load_learner(run_dir)[1].inputs()
        except MetadistError as e:
            raise SystemExit(f"serving: {e}") from None
        if not inputs.pictures:
            raise SystemExit(f"serving: {run_dir} has learned from something else than pictures; name another run")
        url = stack.enter_context(served(run_dir, options.replicas, folder))
        rows = list(measured(url, run_dir, inputs, options))
    show_table(COLUMNS, [cells(row, COLUMNS) for row in rows])
    by = {row["what"]: row for row in rows}
    gain = by["predict, together"]["per_s"] / by["predict, one by one"]["per_s"]
    print(f"together {gain:.2f} times as many predictions a second as one by one")
    if options.json:
        setup = {
            "date": datetime.date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine(),
            "cpu_cores": os.cpu_count(), "replicas": options.replicas, "ways": WAYS, "shots": SHOTS,
            "pictures_a_request": ASKED, "picture": list(inputs.x),
        }  # fmt: skip
        keep_rows(options.json, rows, setup)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python tools/bench/serving.py --quick --json serving.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--run", type=Path, help="a run on pictures, in place of one that is trained here")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--clients", type=int, default=8, help="that ask at once")
    parser.add_argument("--requests", type=int, default=400, help="predictions of each kind; a tenth as many adapters")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    options = parser.parse_args()
    if options.quick:
        options.requests = max(20, options.requests // 4)
    return options


def trained(folder: Path) -> Path:
    words = ["runtime.type=local", "engine.compile=false", "model.batchnorm=inductive", "outer.steps=20",
             "evaluation.episodes=10", "evaluation.every=0", "tracking.wandb.mode=disabled"]  # fmt: skip
    with contextlib.redirect_stdout(sys.stderr):  # the run's own table is progress here
        return train(Experiment(load_config(CONFIG, words)), folder / "run").path


@contextlib.contextmanager
def served(run_dir: Path, replicas: int, folder: Path) -> Iterator[str]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = ["serve", str(run_dir), "--port", str(port), "--replicas", str(replicas)]
    words += ["--adapters", str(folder / "kept")]
    process = subprocess.Popen(
        [sys.executable, "-m", "metadist.cli", *words], stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "METADIST_TOKEN": ""},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = next((line for line in process.stderr if "served at" in line or line.startswith("metadist:")), "")
        if "served at" not in line:
            raise SystemExit(f"serving: the server did not start: {line}")
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def measured(url: str, run_dir: Path, inputs: Inputs, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    rng = np.random.default_rng(0)
    support = [(f"class {c}", picture(rng, inputs, c)) for c in range(WAYS) for _ in range(SHOTS)]
    query = [picture(rng, inputs, c) for c in range(ASKED)]
    to_learn = {"support": [{"class": name, "picture": encoded(p)} for name, p in support]}
    asked = {"query": [{"picture": encoded(p)} for p in query]}
    adapter = post(url + "adapters", to_learn)["adapter"]

    def predict() -> Any:
        return post(f"{url}adapters/{adapter}/predict", asked)

    compare(run_dir, support, query, predict())
    for _ in range(20):
        predict()
    many, few = options.requests, max(4, options.requests // 10)
    clients = options.clients
    yield timed("adapt, together", clients, few, lambda: post(url + "adapters", to_learn))
    yield timed("predict, one by one", 1, many, predict)
    yield timed("predict, together", clients, many, predict)


def compare(run_dir: Path, support: list[tuple[str, np.ndarray]], query: list[np.ndarray], told: Any) -> None:
    """Refuses a server whose answers are not the learner's."""
    classes = sorted({name for name, _ in support})
    x, y = stacked([p for _, p in support]), torch.tensor([classes.index(name) for name, _ in support])
    model = md.load(run_dir).adapt((x, y)).eval()
    with torch.no_grad():
        wanted = model(stacked(query))[:, : len(classes)].softmax(-1)
    found = torch.tensor([[p["probabilities"][c] for c in classes] for p in told["predictions"]])
    if not torch.allclose(found, wanted, atol=1e-4):
        raise SystemExit("serving: the server answers otherwise than the learner in this process")


def stacked(pictures: list[np.ndarray]) -> torch.Tensor:
    """uint8 ``[H, W]`` or ``[H, W, 3]`` each, as float32 ``[N, C, H, W]``."""
    x = torch.from_numpy(np.stack(pictures)).float() / 255
    return x[:, None] if x.dim() == 3 else x.permute(0, 3, 1, 2)


def timed(what: str, clients: int, requests: int, ask: Callable[[], Any]) -> dict[str, Any]:
    def one(_: int) -> float:
        begun = time.perf_counter()
        ask()
        return time.perf_counter() - begun

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        took = np.array(list(threads.map(one, range(requests)))) * 1e3
    per_s = requests / (time.perf_counter() - begun)
    p50, p99 = np.percentile(took, [50, 99])
    return {
        "what": what, "clients": clients, "requests": requests, "p50_ms": float(p50), "p99_ms": float(p99),
        "per_s": float(per_s),
    }  # fmt: skip


def picture(rng: np.random.Generator, inputs: Inputs, klass: int) -> np.ndarray:
    """A noisy patch whose brightness tells its class, uint8 ``[H, W]`` or ``[H, W, 3]``."""
    channels, height, width = inputs.x
    shape = (height, width) if channels == 1 else (height, width, 3)
    return np.clip(rng.normal(40 + 40 * klass, 25, shape), 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray) -> str:
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(pixels).save(held, format="PNG")
    return base64.b64encode(held.getvalue()).decode()


def post(url: str, body: Any) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.loads(reply.read())


if __name__ == "__main__":
    main()
