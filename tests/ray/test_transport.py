"""The seam where gradients are handed from those who compute to those who add up."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from metadist.cli import main
from metadist.errors import ClusterError
from metadist.runtime.transport import Gradients, Nixl, ObjectStore, transport_named
from tests.faults import SERVERS, struck
from tests.ray.test_same_answer_anywhere import CONFIG, LOCAL, run, words

pytestmark = pytest.mark.usefixtures("no_pictures")
FEW = {"outer.steps": 6}


class LosesOnce:
    """By reference to what its maker keeps, as a direct transport does; one of them, the fifth, is lost on its way."""

    options: Mapping[str, Any] = {}
    within_messages = False
    shares_memory = False

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def check(self) -> None:
        """Leaves a file for each process that has asked."""
        import os

        (self.folder / f"checked-{os.getpid()}").touch()

    def pack(self, gradients: Gradients) -> list[Any]:
        """A reference, in a list, which Ray does not look into."""
        import ray

        return [ray.put(dict(gradients))]

    def unpack(self, packed: list[Any]) -> Gradients:
        """Fetches what is not lost."""
        import ray
        from ray.exceptions import RayError

        seen = len(list(self.folder.glob("unpacked-*")))
        (self.folder / f"unpacked-{seen}").touch()
        if seen == 4:
            raise RayError("lost on the way")
        gradients: Gradients = ray.get(packed[0])
        return gradients


class FourthFails(ObjectStore):
    """What asks fourth does not start as it should: with two workers and a server that is the server after it.

    Args:
        folder: gets a file for each that has asked.
        seconds: how long it waits before it starts; None: it dies.
    """

    def __init__(self, folder: Path, seconds: float | None) -> None:
        self.folder, self.seconds = folder, seconds

    def check(self) -> None:
        """Leaves its file."""
        import os
        import time

        seen = len(list(self.folder.glob("checked-*")))
        if seen == 3 and self.seconds:
            time.sleep(self.seconds)
        (self.folder / f"checked-{seen}").touch()
        if seen == 3 and self.seconds is None:
            os._exit(1)


@pytest.fixture(scope="module")
def wanted(omniglot_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(run(omniglot_shards, tmp_path_factory.mktemp("local") / "run", **LOCAL, **FEW)["meta_params_sha256"])


@pytest.mark.slow
@pytest.mark.parametrize("node_sums", [False, True])
@pytest.mark.usefixtures("cluster")
def test_what_a_transport_loses_is_computed_again(omniglot_shards, wanted, tmp_path, monkeypatch, node_sums):
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setattr("metadist.runtime.ray.transport_named", lambda name: LosesOnce(folder))
    two = {"runtime.type": "ray", "runtime.workers": 2, "runtime.node_sums": node_sums, "tracking.console": "true"}
    arguments = ["train", CONFIG, *words(omniglot_shards, **FEW, **two), "--run-dir", str(tmp_path / "run")]
    result = CliRunner().invoke(main, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "leases were lost" in result.output, "the fault was not seen to fire"
    assert len(list(folder.glob("checked-*"))) == 3, "each worker and the server are asked whether it works there"
    assert wanted in (tmp_path / "run" / "summary.json").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(("seconds", "servers"), [(6, 1), (None, 2)], ids=["slow", "dies"])
@pytest.mark.usefixtures("cluster")
def test_a_server_that_is_restored_may_be_slow_to_start_or_be_lost_again(
    omniglot_shards, wanted, tmp_path, monkeypatch, seconds, servers
):
    folder = tmp_path / "marks"
    folder.mkdir()
    monkeypatch.setattr("metadist.runtime.ray.transport_named", lambda name: FourthFails(folder, seconds))
    # Shorter than a slow start takes.
    two = {"runtime.type": "ray", "runtime.workers": 2, "runtime.lease_timeout_s": 3 if seconds else 60}
    with struck(tmp_path / "run", 3, SERVERS) as lost:
        summary = run(omniglot_shards, tmp_path / "run", **FEW, **two)
    assert lost and len(list(folder.glob("checked-*"))) == 3 + servers, "the server after it started as it should"
    # Workers that wait for its weights are not taken to hang.
    assert summary["restarts"] == {"worker": 0, "server": servers, "driver": 0}
    assert summary["meta_params_sha256"] == wanted


@pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="the package nixl is not installed")
@pytest.mark.usefixtures("cluster")
def test_nixl_gives_the_same_bits(omniglot_shards, wanted, tmp_path):
    two = {"runtime.type": "ray", "runtime.workers": 2, "runtime.server_shards": 2, "runtime.transport": "nixl"}
    assert run(omniglot_shards, tmp_path / "run", **FEW, **two)["meta_params_sha256"] == wanted


def test_nixl_that_is_not_installed_is_told_with_its_mend(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ClusterError, match=r"runtime.transport.*pip install nixl"):
        Nixl().check()


def test_each_transport_has_a_name():
    assert isinstance(transport_named("object_store"), ObjectStore) and isinstance(transport_named("nixl"), Nixl)
