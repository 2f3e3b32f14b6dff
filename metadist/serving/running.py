"""Ray Serve started for one run, until somebody stops it."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable

import ray
from ray import serve

from metadist.adapting import reading_of
from metadist.errors import ClusterError
from metadist.finished import load_learner
from metadist.serving.server import Settings, deployed


def run(
    settings: Settings, host: str, port: int, replicas: int, queued: int, say: Callable[[str], None]
) -> None:
    """Serves until SIGINT or SIGTERM.

    Raises:
        MetadistError: the run cannot be served, or the port is taken.
    """
    # In this process first, where an error has words.
    reading_of(load_learner(settings.run_dir, {"code": settings.code}, settings.checkpoint)[1])
    _free(host, port)
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    ray.init(
        address="local", num_cpus=replicas + 1, include_dashboard=False, logging_level=logging.ERROR,
        log_to_driver=False,
    )  # fmt: skip
    stop, serving = threading.Event(), False
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    try:
        serve.start(http_options={"host": host, "port": port}, logging_config={"log_level": "WARNING"})
        serve.run(deployed(settings, replicas, queued), name="metadist", route_prefix="/")
        serving = True
        say(f"{settings.run_dir} is served at http://{host}:{port}/ ; Ctrl-C ends it")
        while not stop.wait(0.5):
            pass
    finally:
        say("ending")
        if serving:
            serve.delete("metadist")  # what is being answered is answered first; the rest ends with Ray
        ray.shutdown()


def _free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((host, port))
        except OSError as e:
            raise ClusterError("--port", f"{host}:{port} cannot be had ({e.strerror})", "name another port") from None
