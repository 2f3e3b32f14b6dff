"""The Dockerfile: what it copies and installs, in which order, as whom it runs; the slow test does what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from metadist.cli import main
from tests.conftest import ROOT

PATH = ROOT / "cluster" / "Dockerfile"
KNOWN = {"FROM", "ARG", "ENV", "WORKDIR", "RUN", "COPY", "USER", "ENTRYPOINT", "CMD"}
VENV = "/opt/venv"


@dataclass(frozen=True)
class Instruction:
    name: str
    rest: str


def parse(text: str) -> list[Instruction]:
    """A Dockerfile's instructions, continued lines joined.

    Raises:
        ValueError: a line that is none.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    found = []
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            name, _, rest = line.partition(" ")
            if name not in KNOWN or not rest.strip():
                raise ValueError(f"{line!r} begins with none of {', '.join(sorted(KNOWN))}, or says nothing")
            found.append(Instruction(name, " ".join(rest.split())))
    return found


ALL = parse(PATH.read_text())
STARTS = [i for i, step in enumerate(ALL) if step.name == "FROM"]
BUILD, FINAL = ALL[STARTS[0] : STARTS[1]], ALL[STARTS[1] :]


def of(stage: list[Instruction], name: str) -> list[str]:
    return [step.rest for step in stage if step.name == name]


def test_a_line_that_is_no_instruction_is_found() -> None:
    with pytest.raises(ValueError, match="CPY"):
        parse(PATH.read_text().replace("COPY pyproject", "CPY pyproject"))


def test_both_stages_begin_with_the_same_small_image() -> None:
    assert len(STARTS) == 2
    first, second = of(ALL, "FROM")
    assert first == f"{second} AS build" and re.fullmatch(r"python:3\.\d+-slim", second)


def copies(stage: list[Instruction]) -> list[tuple[list[str], str]]:
    """Sources in the build context, and where they go."""
    words = [rest.split() for rest in of(stage, "COPY") if not rest.startswith("--from=")]
    return [(w[:-1], w[-1]) for w in words]


def test_everything_copied_is_there_and_nothing_else_is_sent() -> None:
    sources = {s for stage in (BUILD, FINAL) for many, _ in copies(stage) for s in many}
    assert all((ROOT / s).exists() for s in sources)
    lines = PATH.with_name("Dockerfile.dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*" and {r[1:] for r in rules if r.startswith("!")} == sources
    assert of(FINAL, "COPY")[0] == f"--from=build {VENV} {VENV}", "at the same place: its scripts name it"


def test_torch_is_installed_first_and_every_version_is_held() -> None:
    installs = [(i, step.rest) for i, step in enumerate(BUILD) if step.name == "RUN" and "pip install" in step.rest]
    assert len(installs) == 2 and all("-c constraints.txt" in rest for _, rest in installs)
    (torch_at, torch), (metadist_at, metadist) = installs
    assert torch.endswith(" torch") and '".[$EXTRAS]"' in metadist
    copied = [many for step in BUILD[:torch_at] if step.name == "COPY" for many in [step.rest.split()[:-1]]]
    assert copied == [["constraints.txt"]], "what changes often comes after the largest layer"
    assert torch_at < metadist_at and "PIP_NO_CACHE_DIR=1" in of(BUILD, "ENV")[0]


def test_it_runs_as_somebody_who_is_not_root() -> None:
    (user,) = of(FINAL, "USER")
    assert user not in ("root", "0") and any(f"useradd --uid 1000 --create-home {user}" in r for r in of(FINAL, "RUN"))
    after = [step.name for step in FINAL[[s.name for s in FINAL].index("USER") :]]
    assert not {"RUN", "COPY"} & set(after)
    assert any(re.search(r"apt-get install .*g\+\+ && rm -rf /var/lib/apt/lists", r) for r in of(FINAL, "RUN"))


def test_the_entry_point_is_metadist() -> None:
    (entry,), (default,) = of(FINAL, "ENTRYPOINT"), of(FINAL, "CMD")
    assert json.loads(entry) == ["metadist"]
    assert CliRunner().invoke(main, json.loads(default)).exit_code == 0
    assert f"PATH={VENV}/bin:$PATH" in of(FINAL, "ENV")[0]


def build_environment(**arguments: str) -> dict[str, str]:
    """What the build stage's RUN lines see: its ARGs and ENVs."""
    given = dict(a.split("=", 1) for a in of(BUILD, "ARG"))
    fixed = dict(pair.split("=", 1) for rest in of(BUILD, "ENV") for pair in shlex.split(rest))
    return {**os.environ, **given, **arguments, **fixed}


def run_build(folder: Path, venv: Path, **arguments: str) -> None:
    """The build stage's COPY and RUN lines, with another folder in place of /src and of the environment."""
    folder.mkdir()
    for step in BUILD:
        if step.name == "COPY":
            *sources, to = step.rest.split()
            for source in sources:
                target = folder / to / source if to == "./" else folder / to
                kind = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
                kind(ROOT / source, target)
        elif step.name == "RUN":
            line = step.rest.replace(VENV, str(venv))
            done = subprocess.run(
                ["sh", "-c", line], cwd=folder, env=build_environment(**arguments), capture_output=True, text=True
            )
            assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("device", ["gpu", "cpu"])
def test_the_device_chooses_where_torch_comes_from(tmp_path: Path, device: str) -> None:
    """With a stand-in for pip, which writes down what it was asked."""
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    pip = tmp_path / "venv" / "bin" / "pip"
    python.write_text(
        f"#!/bin/sh\nmkdir -p {pip.parent}\n"
        f"printf '#!/bin/sh\\necho \"$@\" >> {tmp_path}/asked\\n' > {pip}\nchmod +x {pip}\n"
    )
    python.chmod(0o755)
    run_build(tmp_path / "src", tmp_path / "venv", DEVICE=device, PATH=f"{python.parent}:{os.environ['PATH']}")
    index = " --index-url https://download.pytorch.org/whl/cpu" if device == "cpu" else ""
    asked = (tmp_path / "asked").read_text().splitlines()
    assert asked == [f"install -c constraints.txt{index} torch", "install -c constraints.txt .[s3]"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_its_steps_install_a_metadist_that_works(tmp_path: Path) -> None:
    """In a clean environment; the default device, so that pip takes PyTorch from where it is set up to."""
    run_build(tmp_path / "src", tmp_path / "venv", PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    tools = tmp_path / "venv" / "bin"
    frozen = subprocess.run([str(tools / "pip"), "list", "--format=json"], capture_output=True, text=True, check=True)
    installed = {p["name"].lower(): p["version"].partition("+")[0] for p in json.loads(frozen.stdout)}
    used, _ = (ROOT / "constraints.txt").read_text().split("# Development")
    pins = dict(re.findall(r"^([\w-]+)==(\S+)$", used, re.MULTILINE))
    assert {name: installed.get(name) for name in pins} == pins
    elsewhere = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    words = ["outer.steps=2", "evaluation.episodes=4", "runtime.type=local", "tracking.wandb.mode=disabled"]
    trained = subprocess.run(
        [str(tools / "metadist"), "train", str(ROOT / "configs" / "glyphs_maml.yaml"), *words, "--run-dir", "run"],
        cwd=tmp_path, env=elsewhere, capture_output=True, text=True,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["version"] == 2
