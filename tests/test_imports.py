"""The core runs where Ray, WebDataset and Weights & Biases are not installed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "webdataset", "wandb"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
"""

STEP = """
from metadist.config import validate
from metadist.experiment import Experiment
from metadist.outer import Layout
from metadist.resolve import resolve
from metadist.runtime.controller import Controller
from metadist.runtime.local import LocalBackend
from metadist.worker import Round

config = validate({
    "tasks": {"type": "sinusoid"}, "model": {"type": "mlp", "hidden": [4]}, "algorithm": {"type": "maml"},
    "outer": {"steps": 1, "meta_batch_size": 4}, "runtime": {"type": "local", "gpus_per_worker": 0},
})
experiment = resolve(Experiment(config)).experiment
initial = experiment.learner().initial_meta_params()
backend = LocalBackend(experiment)
weights = Layout.of(initial).flatten(initial).numpy()
backend.start({"version": 0, "weights": weights, "outer_state": {}}, config.outer.model_dump())
before = backend.snapshot()["weights"]
result = Controller(backend).run(Round("train", 0, "train", "train", 0, 4, config.outer.tasks_per_microbatch))
backend.commit(0, 4)
after = backend.snapshot()
print(after["version"], len(result.metrics["loss"]), bool((before != after["weights"]).any()))
backend.close()
"""

CORE = (
    "metadist", "metadist.inner", "metadist.algorithms", "metadist.models", "metadist.outer",
    "metadist.tasks.sinusoid", "metadist.config", "metadist.checkpoint", "metadist.runtime.controller",
)  # fmt: skip


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=200)


def test_the_block_blocks() -> None:
    for module in ("ray", "webdataset", "wandb"):
        done = python(BLOCK + f"import {module}")
        assert done.returncode != 0 and f"{module} is blocked" in done.stderr


@pytest.fixture(scope="module")
def step() -> subprocess.CompletedProcess[str]:
    """Every core module imported and one step made in one process without the three."""
    imports = "".join(f"import {name}\n" for name in CORE)
    return python(BLOCK + imports + STEP)


def test_the_core_imports_and_makes_a_step(step: subprocess.CompletedProcess[str]) -> None:
    assert step.returncode == 0, step.stderr
    assert step.stdout.split() == ["1", "4", "True"]


def test_what_needs_nothing_of_ray_can_be_named_without_it() -> None:
    done = python(BLOCK + "import metadist as md; print(md.Episode.__name__, md.Rng.__name__, md.TaskSource.__name__)")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["Episode", "Rng", "TaskSource"]


def test_the_public_names_are_there_and_are_all_of_them() -> None:
    """DESIGN.md section 5; each is loaded when first used."""
    import metadist

    wanted = {"Episode", "EpisodeBatch", "MAML", "Outer", "RayRuntime", "Rng", "TaskSource", "load", "train"}
    assert wanted <= set(metadist.__all__) <= set(dir(metadist))
    assert all(getattr(metadist, name).__module__.startswith("metadist.") for name in metadist.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = metadist.nonsense


def test_processes_that_compile_nothing_load_no_compiler() -> None:
    """A second and more for each worker, server and driver, at every restart."""
    found = python("import sys, metadist.training, metadist.runtime.ray; print('torch._dynamo' in sys.modules)")
    assert found.stdout.strip() == "False", found.stderr
