"""What the doctor says of what nodes have answered; no cluster needed."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner

from metadist.cli import main
from metadist.config import load_config
from metadist.doctor import probes
from metadist.doctor.checks import needed_memory, other_versions, room, storage, too_little_memory
from metadist.doctor.examine import Listener, Wanted, examine
from metadist.doctor.findings import Finding, worst
from metadist.doctor.login import key_findings
from metadist.doctor.place import Overdue, Subject, ThisMachine, within
from metadist.doctor.show import lines, summary
from metadist.doctor.workers import slow_ones
from metadist.runtime.ray_probe import Node
from tests.conftest import ROOT

SINES = ROOT / "configs" / "sinusoid_maml.yaml"
GOOD = "f" * 40


def test_a_worker_s_share_must_be_free_on_one_node() -> None:
    nodes = [Node("a", cpus=3, gpus=1, free_cpus=1), Node("b", cpus=1, gpus=4, free_cpus=1, free_gpus=4)]
    assert room(nodes, cpus=1, gpus=0) == 4
    assert room(nodes, cpus=2, gpus=0) == 1, "a CPU of each is no share"
    assert room(nodes, cpus=1, gpus=1) == 2
    assert room(nodes, cpus=1, gpus=2) == 1
    assert room(nodes, cpus=1, gpus=0.4) == 3, "two of 0.4 fit a GPU, and b has one CPU"
    assert room(nodes, cpus=1, gpus=0.4, free=True) == 1


def test_versions_that_differ_are_named_with_what_to_install() -> None:
    wanted = {"python": "3.12.3", "torch": "2.6.0", "ray": "2.60.0", "metadist": "0.1.0", "code": "aaaa"}
    assert list(other_versions(wanted, dict(wanted), "b")) == []
    (torch,) = other_versions(wanted, {**wanted, "torch": "2.5.1"}, "b")
    assert torch.verdict == "wrong" and torch.node == "b" and torch.found == "torch 2.5.1"
    assert "pip install torch==2.6.0" in torch.mend
    (patch,) = other_versions(wanted, {**wanted, "python": "3.12.1"}, "b")
    (minor,) = other_versions(wanted, {**wanted, "python": "3.11.9"}, "b")
    assert (patch.verdict, minor.verdict) == ("warning", "wrong")
    (code,) = other_versions(wanted, {**wanted, "code": "bbbb"}, "b")
    assert code.verdict == "wrong" and "same commit" in code.mend


def test_the_code_of_metadist_is_known_by_its_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metadist").mkdir()
    (tmp_path / "metadist" / "__init__.py").write_text("a = 1\n")
    mine = probes.versions()["code"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: _Spec(tmp_path / "metadist"))
    one = probes.versions()["code"]
    (tmp_path / "metadist" / "__init__.py").write_text("a = 2\n")
    assert len({mine, one, probes.versions()["code"]}) == 3


class _Spec:
    def __init__(self, path: Path) -> None:
        self.submodule_search_locations = [str(path)]


@pytest.mark.parametrize(
    ("store", "total", "free", "found", "mend"),
    [
        (100, 64, 64, "/dev/shm holds 64B", "--shm-size"),
        (10, 64, 64, "an object store of 10B", "--object-store-memory"),
        (100, 100, 10, "10B of /dev/shm are free", "ls -l /dev/shm"),
    ],
)
def test_too_little_shared_memory(store: int, total: int, free: int, found: str, mend: str) -> None:
    need = needed_memory(weights=5, workers=3)
    assert need == 40
    (finding,) = too_little_memory(store, total, free, need, "b")
    assert finding.verdict == "wrong" and finding.found.startswith(found) and mend in finding.mend
    assert list(too_little_memory(100, 100, 100, need, "b")) == []


def test_a_slow_worker_is_one_of_twice_the_median() -> None:
    assert slow_ones({0: 1.0, 1: 1.9, 2: 1.2}) == {}
    assert slow_ones({0: 1.0, 1: 1.1, 2: 3.3}) == {2: pytest.approx(3.0)}
    assert slow_ones({0: 1.0, 1: 2.5}) == {1: 2.5}, "of two the faster counts"


# --------------------------------------------------------------------------- storage on this machine


@pytest.mark.parametrize("kind", ["new folder", "url"])
def test_storage_that_is_tried_is_left_as_it_was(tmp_path: Path, kind: str) -> None:
    place = tmp_path / "a" / "b"
    subject = Subject(ThisMachine(10.0), run_dir=str(place) if kind == "new folder" else None)
    if kind == "url":
        subject.experiment = None
        told = probes.write(f"file://{place}", "x", "text")
        assert told["error"] is None and probes.holds(str(place), "x", "text")
        probes.remove(str(place), "x", told["made"])
    else:
        (finding,) = storage(subject)
        assert finding.verdict == "ok" and str(place) in finding.found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["/proc/runs", "FILE/runs", "/dev/full/runs"])
def test_storage_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "FILE").write_text("")
    named = place if place.startswith("/") else str(tmp_path / place)
    (finding,) = storage(Subject(ThisMachine(10.0), run_dir=named))
    assert finding.verdict == "wrong" and f"--run-dir {named} cannot be written" in finding.found
    assert "name another --run-dir" in finding.mend


# --------------------------------------------------------------------------- W&B


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """A W&B server that knows one key."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            import base64

            self.rfile.read(int(self.headers["Content-Length"]))
            known = self.headers["Authorization"] == "Basic " + base64.b64encode(f"api:{GOOD}".encode()).decode()
            body = json.dumps({"data": {"viewer": {"username": "ada"} if known else None}}).encode()
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    yield url
    httpd.shutdown()
    httpd.server_close()


@pytest.mark.parametrize(
    ("key", "verdict", "found"),
    [
        (None, "wrong", "no W&B key is set up"),
        ("short", "wrong", "the W&B key has 5 characters"),
        ("f" * 39 + " \n", "wrong", "the W&B key has characters that no key has"),
        ("e" * 40, "wrong", "refuses the W&B key"),
        (GOOD, "ok", "W&B is online, as ada"),
        (f"local-{GOOD[:40]}", "wrong", "refuses the W&B key"),
    ],
)
def test_a_key_is_judged_by_its_shape_and_by_the_server(
    server: str, key: str | None, verdict: str, found: str
) -> None:
    (finding,) = key_findings(key, 10.0)
    assert finding.verdict == verdict and found in finding.found
    assert verdict == "ok" or "wandb login" in finding.mend
    assert key is None or key not in str(finding), "a key is not told"


def test_a_server_that_is_not_there_is_not_a_key_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    (finding,) = key_findings(GOOD, 10.0)
    assert "cannot be asked" in finding.found and "tracking.wandb.mode=offline" in finding.mend


def test_a_key_is_asked_for_only_where_a_run_would_be_online(server: str, tmp_path: Path) -> None:
    from metadist.doctor.login import tracking
    from metadist.experiment import Experiment

    def told(*words: str) -> Finding:
        subject = Subject(ThisMachine(10.0), Experiment(load_config(SINES, words)))
        (finding,) = tracking(subject)
        return finding

    assert told("tracking.wandb.mode=online").verdict == "wrong"
    assert told().verdict == "ok" and "offline (auto, and no account is set up)" in told().found
    host = server.removeprefix("http://").partition(":")[0]
    (tmp_path / "netrc").write_text(f"machine {host} login user password {GOOD}\n")
    assert "as ada" in told().found and "as ada" in told("tracking.wandb.mode=online").found
    assert told("tracking.wandb.mode=offline").verdict == "ok"


# --------------------------------------------------------------------------- the command


def test_a_healthy_machine_has_nothing_to_complain_of(tmp_path: Path) -> None:
    words = ["runtime.type=local", "engine.compile=false", "tracking.wandb.mode=offline"]
    told = CliRunner().invoke(main, ["doctor", str(SINES), *words, "--run-dir", str(tmp_path / "run"), "--json"])
    assert told.exit_code == 0, told.output
    report = json.loads(told.stdout)
    assert report["verdict"] == "ok"
    assert [c["check"] for c in report["checks"]] == ["versions", "resources", "storage", "tracking", "workers"]
    assert "a microbatch of 25 tasks takes the worker" in report["checks"][-1]["found"]
    assert "checking workers" in told.stderr and not list(tmp_path.iterdir())


def test_what_is_wrong_is_one_line_with_its_mending_and_exit_one(tmp_path: Path) -> None:
    words = ["runtime.type=local", "engine.compile=false", "tracking.wandb.mode=offline", "--run-dir", "/proc/mine"]
    told = CliRunner().invoke(main, ["doctor", str(SINES), *words])
    assert told.exit_code == 1, told.output
    assert "wrong    storage       --run-dir /proc/mine cannot be written (" in told.stdout
    assert "mend: mount it there for writing" in told.stdout and told.stdout.endswith("1 wrong, 0 warnings\n")
    used = CliRunner().invoke(main, ["doctor", "outer.steps=3"])
    assert used.exit_code == 2 and "comes after a CONFIG" in used.output
    assert CliRunner().invoke(main, ["doctor", str(SINES), "outer.stepz=3"]).exit_code == 2


def test_a_check_that_hangs_is_left_behind_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(subject: Subject) -> Iterator[Finding]:
        threading.Event().wait()
        yield Finding("hangs", "ok", "never")

    def fails(subject: Subject) -> Iterator[Finding]:
        raise LookupError("no such thing")
        yield

    def works(subject: Subject) -> Iterator[Finding]:
        yield Finding("works", "ok", "it does")

    listed = (("hangs", hangs, 1.0), ("fails", fails, 1.0), ("works", works, 1.0))
    monkeypatch.setattr("metadist.doctor.examine.CHECKS", listed)
    heard: list[str] = []
    config = load_config(SINES, ["runtime.type=local"])
    report = examine(Wanted(config, timeout_s=0.2), Listener(heard.append))
    assert [(f.check, f.verdict) for f in report.findings] == [("hangs", "wrong"), ("fails", "wrong"), ("works", "ok")]
    assert "has not ended in 0.2 s" in report.findings[0].found and report.hung and report.verdict == "wrong"
    assert "LookupError: no such thing" in report.findings[1].found
    assert heard == ["cluster", "hangs", "fails", "works"]


def test_within_hands_on_what_comes_in_time() -> None:
    assert within(5.0, lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        within(5.0, lambda: 1 / 0)
    with pytest.raises(Overdue):
        within(0.05, lambda: time.sleep(1.0))


def test_lines_say_what_is_wanted_only_where_something_is_wrong() -> None:
    assert lines(Finding("memory", "ok", "enough", "more", "buy it")) == ["ok       memory        enough"]
    assert lines(Finding("memory", "wrong", "too little", "more", "buy it", "b")) == [
        "wrong    memory        b: too little", " " * 23 + "wanted: more", " " * 23 + "mend: buy it",
    ]  # fmt: skip
    some = [Finding("a", "ok", ""), Finding("b", "warning", "")]
    assert worst(some) == "warning" and summary(some) == "nothing is wrong, 1 warning"
    assert worst([]) == "ok" and summary([]) == "nothing is wrong"
