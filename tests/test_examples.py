"""The tutorial works as printed: on the command line, on Ray workers and from Python; and its check can tell."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import metadist as md
from metadist.cli import main
from metadist.config import load_config
from metadist.errors import ConfigError
from metadist.experiment import Experiment
from tests.conftest import ROOT
from tests.test_readme import FENCE, Block, _environment
from tools.examples.pretrained import Pretrained, PretrainedOnAll, gradient_error, loss_on_all, query_loss

EXAMPLES = ROOT / "tools" / "examples"
README = (EXAMPLES / "README.md").read_text()
BLOCKS = [Block(m[1], m[2], "") for m in FENCE.finditer(README)]
COMMANDS = [line for b in BLOCKS if b.language == "bash" for line in b.lines]
PROGRAMS = [b.text for b in BLOCKS if b.language == "python"]
CONFIG = EXAMPLES / "pretrained.yaml"
SMALL = ["outer.steps=2", "outer.meta_batch_size=4", "outer.tasks_per_microbatch=1", "evaluation.episodes=4",
         "tracking.wandb.mode=disabled"]  # fmt: skip


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("examples")
    (path / "tools").symlink_to(ROOT / "tools")
    return path


def shell(line: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=_environment(), capture_output=True, text=True, timeout=280
    )


@pytest.mark.slow
def test_every_command_of_the_tutorial(workspace: Path) -> None:
    assert [line.split()[0] for line in COMMANDS] == ["metadist"] * 4 + ["python"]
    for line in COMMANDS:
        done = shell(line, workspace)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    # The last one prints how far its gradients are off.
    off = [float(x) for x in re.findall(r"off by (\S+);", done.stdout)]
    assert len(off) == 2 and max(off) < 1e-6
    assert json.loads((workspace / "runs" / "workers" / "summary.json").read_text())["workers"] == 2


IDS = {"parts": [pytest.mark.slow], "learner": []}


@pytest.mark.parametrize(
    "program", [pytest.param(p, id=i, marks=m) for p, (i, m) in zip(PROGRAMS, IDS.items(), strict=True)]
)
def test_the_programs_of_the_tutorial(workspace: Path, program: str) -> None:
    (workspace / "program.py").write_text(program)
    done = shell(f"{sys.executable} program.py", workspace)
    assert done.returncode == 0 and "after adaptation" in done.stdout, done.stderr


def test_the_config_line_is_the_one_of_the_config() -> None:
    (line,) = [b.text.strip() for b in BLOCKS if b.language == "yaml"]
    assert line in CONFIG.read_text().splitlines()
    assert isinstance(Experiment(load_config(CONFIG), code=True).learner(), Pretrained)


def test_the_tutorial_is_linked_and_uses_public_names_alone() -> None:
    assert "(tools/examples/README.md)" in (ROOT / "README.md").read_text()
    source = (EXAMPLES / "pretrained.py").read_text()
    assert re.findall(r"^(?:import|from) metadist.*", source, re.MULTILINE) == ["import metadist as md"]
    for text in (source, README):
        assert set(re.findall(r"\b(?:md|metadist)\.([A-Za-z]\w*)", text)) - {"py"} <= set(md.__all__)


@pytest.fixture
def own_module(tmp_path: Path) -> Path:
    """A folder with the learner as mine.py, to which neither the script's folder nor an installation leads."""
    shutil.copy(EXAMPLES / "pretrained.py", tmp_path / "mine.py")
    return tmp_path


TRAIN_MINE = f"metadist train {CONFIG} algorithm.import_path=mine:Pretrained {' '.join(SMALL)} --run-dir run"


@pytest.mark.slow
def test_a_module_in_the_current_folder_is_found_by_workers(own_module: Path) -> None:
    # A run of two steps may end before its second worker is up.
    done = shell(f"{TRAIN_MINE} runtime.type=ray runtime.workers=2 outer.steps=400", own_module)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((own_module / "run" / "summary.json").read_text())
    assert summary["workers"] == 2 and summary["restarts"]["worker"] == 0


def test_a_module_in_the_current_folder_is_found_by_every_command(own_module: Path) -> None:
    done = shell(f"{TRAIN_MINE} && metadist resume run outer.steps=3 --allow-code", own_module)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads((own_module / "run" / "summary.json").read_text())["version"] == 3

    elsewhere = own_module / "elsewhere"
    elsewhere.mkdir()
    done = shell("metadist evaluate run", own_module)
    assert done.returncode == 2 and "--allow-code" in done.stderr
    done = shell("metadist evaluate ../run --allow-code", elsewhere)
    assert done.returncode == 2 and "mine:Pretrained cannot be imported" in done.stderr
    assert "the folder where `metadist` is run" in done.stderr and "Traceback" not in done.stderr


def test_bad_hyper_parameters_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from click.testing import CliRunner

    monkeypatch.chdir(ROOT)
    words = [
        "train",
        str(CONFIG),
        "algorithm.args.inner_lr=0",
        *SMALL,
        "--allow-code",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2 and "algorithm.args" in result.output and "inner_lr must be positive" in result.output
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="unexpected keyword"):
        Experiment(load_config(CONFIG, ["algorithm.args.no_such=1"]), code=True).learner()


# ------------------------------------------------------------------ the learner itself


def smooth() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 1))


def learner_of(algorithm: md.Algorithm, batchnorm: str = "transductive", strategy: str = "vectorised") -> md.Algorithm:
    words = ["engine.precision=float64", f"model.batchnorm={batchnorm}", f"engine.strategy={strategy}"]
    return Experiment(load_config(CONFIG, words), model=smooth, algorithm=algorithm).learner()


BATCH = md.SinusoidTasks(shots=5, query_shots=7).episodes(0, "check", range(3)).to("cpu", torch.float64)


@pytest.mark.parametrize("strategy", ["vectorised", "adjoint", "loop"])
@pytest.mark.parametrize("batchnorm", ["transductive", "inductive"])
def test_the_check_passes_what_is_right_and_catches_what_is_not(strategy: str, batchnorm: str) -> None:
    one, everything = (learner_of(cls(), batchnorm, strategy) for cls in (Pretrained, PretrainedOnAll))
    params = one.initial_meta_params()
    assert gradient_error(one, params, BATCH, query_loss) < 1e-6
    assert gradient_error(everything, params, BATCH, loss_on_all) < 1e-6
    assert gradient_error(everything, params, BATCH, query_loss) > 1e-2
    assert gradient_error(one, params, BATCH, loss_on_all) > 1e-2


@pytest.mark.parametrize("cls", [Pretrained, PretrainedOnAll])
@pytest.mark.parametrize("batchnorm", ["transductive", "running"])
def test_it_never_adapts_while_learning_and_does_in_use(cls: type[Pretrained], batchnorm: str) -> None:
    learner = learner_of(cls(inner_lr=0.05, inner_steps=5), batchnorm)
    params = learner.initial_meta_params()
    support = BATCH[0].support
    assert learner.adapt(params, support) is params
    before = {k: v.clone() for k, v in params.items()}
    adapted = learner.adapt(params, support, evaluation=True)
    assert all(torch.equal(params[k], before[k]) for k in params)
    moved = {k for k in params if not torch.equal(adapted[k], params[k])}
    assert moved and moved.isdisjoint(learner.update_rules())
    metrics = learner.meta_gradient(params, BATCH).metrics
    assert metrics["loss"].shape == (3,) and torch.equal(metrics["loss"], metrics["pre_adaptation_loss"])

    def support_loss(at: dict[str, torch.Tensor]) -> torch.Tensor:
        return learner.objective.loss(learner.model(at, support.x, evaluation=True), support.y)

    assert support_loss(adapted) < support_loss(params)


def test_its_steps_are_those_of_gradient_descent() -> None:
    learner = learner_of(Pretrained(inner_lr=0.05, inner_steps=3))
    params, support = learner.initial_meta_params(), BATCH[1].support
    wanted = {k: v.clone().requires_grad_() for k, v in params.items()}
    for _ in range(3):
        loss = torch.nn.functional.mse_loss(learner.model(wanted, support.x), support.y)
        slopes = torch.autograd.grad(loss, list(wanted.values()))
        wanted = {k: (v - 0.05 * g).detach().requires_grad_() for (k, v), g in zip(wanted.items(), slopes, strict=True)}
    adapted = learner.adapt(params, support, evaluation=True)
    for k, value in wanted.items():
        torch.testing.assert_close(adapted[k], value.detach(), rtol=1e-10, atol=1e-12)
