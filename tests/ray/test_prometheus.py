"""What Prometheus would read of a run, from the endpoint of a real Ray node."""

from __future__ import annotations

import json
import time
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from metadist.tracking.base import PARTS
from metadist.tracking.prometheus import GAUGES, PREFIX
from tests.conftest import ROOT
from tests.ray.test_same_answer_anywhere import invoke

# There is none of these where updates wait for their meta-batch, or without a GPU.
ELSEWHERE = {"metadist_dropped_gradients", "metadist_gpu_utilisation", "metadist_gpu_memory_bytes"}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster", "no_pictures")
def test_the_metrics_endpoint_holds_the_figures_of_a_run(tmp_path: Path) -> None:
    words = ["name=watched", "runtime.workers=2", "outer.steps=6", "outer.meta_batch_size=8", "model.filters=8",
             "engine.compile=false", "evaluation.episodes=10", "evaluation.every=0", "tracking.wandb.mode=disabled",
             "tracking.console=false"]  # fmt: skip
    invoke(["train", str(ROOT / "configs" / "glyphs_maml.yaml"), *words, "--run-dir", str(tmp_path / "run")])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert sum(line[f"{part}_s"] for part in PARTS) == pytest.approx(line["step_s"], rel=1e-6)
    found = _told({PREFIX + name for name in GAUGES if name not in ELSEWHERE})
    last, tags = lines[-1], {"run": "watched"}
    assert _value(found, "version", **tags) == 6 and _value(found, "total_steps", **tags) == 6
    assert _value(found, "loss", **tags) == pytest.approx(last["loss"])
    assert _value(found, "workers", **tags) == last["workers"]
    parts = {part: _value(found, "step_part_seconds", part=part, **tags) for part in PARTS}
    assert parts == pytest.approx({part: last[f"{part}_s"] for part in PARTS})
    used = {worker: _value(found, "worker_utilisation", worker=worker, **tags) for worker in last["utilisation"]}
    assert used == pytest.approx(last["utilisation"])
    assert _value(found, "restarts", kind="worker", **tags) == 0
    assert 0 <= _value(found, "evaluation", metric="accuracy", split="test", when="after", **tags) <= 1


def _told(wanted: set[str]) -> list:
    """The samples of the node's endpoint, once all that is wanted of our run is among them."""
    import ray

    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    there: set[str] = set()
    for _ in range(120):
        with urllib.request.urlopen(url, timeout=10) as answer:
            text = answer.read().decode()
        every = [s for family in text_string_to_metric_families(text) for s in family.samples]
        samples = [s for s in every if s.labels.get("run") == "watched"]
        there = {s.name for s in samples}
        # What was told last comes last.
        if there >= wanted and any(s.name == "ray_metadist_version" and s.value == 6 for s in samples):
            return samples
        time.sleep(0.5)
    raise AssertionError(f"the endpoint has not told of {sorted(wanted - there)} in a minute")


def _value(samples: list, name: str, **tags: str) -> float:
    (found,) = {s.value for s in samples if s.name == f"ray_metadist_{name}" and tags.items() <= s.labels.items()}
    return found
