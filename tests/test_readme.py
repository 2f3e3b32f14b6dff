"""The README's commands work as printed, and it names no command that does not exist."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import pytest

from metadist.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SKIP = re.compile(r"<!-- test: skip(?: \((.*)\))? -->")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, and the line before it."""

    language: str
    text: str
    before: str

    @property
    def skipped(self) -> bool:
        return "test: skip" in self.before

    @property
    def slow(self) -> bool:
        return "test: slow" in self.before

    @property
    def lines(self) -> list[str]:
        """Its commands; a backslash continues a line."""
        joined = self.text.replace("\\\n", " ").splitlines()
        return [line.strip() for line in joined if line.strip() and not line.lstrip().startswith("#")]


BLOCKS = [
    Block(m[1], m[2], (README[: m.start()].rstrip("\n").splitlines() or [""])[-1]) for m in FENCE.finditer(README)
]
RUNNABLE = [b for b in BLOCKS if b.language == "bash" and not b.skipped]
COMMANDS = [(line, "METADIST_DATA" in b.text) for b in RUNNABLE for line in b.lines]
SLOW = [b.slow for b in RUNNABLE for _ in b.lines]
PROGRAMS = [b.text for b in BLOCKS if b.language == "python"]


@dataclass
class Workspace:
    """A folder like a fresh checkout's, where the commands are run in the README's order, each once."""

    path: Path
    failures: dict[int, str] = field(default_factory=dict)
    done: int = 0
    servers: list[subprocess.Popen[str]] = field(default_factory=list)

    def run_through(self, number: int) -> None:
        """Runs what has not been run up to ``number``, so that one test can be chosen; slow ones for slow ones."""
        for i in range(self.done, number + 1):
            line, needs_data = COMMANDS[i]
            self.done = i + 1
            if SLOW[i] and not SLOW[number]:
                continue
            if not needs_data or "METADIST_DATA" in os.environ:
                self._run(i, line)

    def _run(self, number: int, line: str) -> None:
        if line.startswith("metadist serve "):
            self._serve(number, line)
            return
        finished = self.shell(line)
        if finished.returncode != 0:
            self.failures[number] = f"exit code {finished.returncode}\n{finished.stdout}\n{finished.stderr}"

    def _serve(self, number: int, line: str) -> None:
        """Starts what runs until it is stopped; the commands that follow find it."""
        process = subprocess.Popen(
            shlex.split(line), cwd=self.path, env=_environment(), stderr=subprocess.PIPE, text=True
        )  # fmt: skip
        self.servers.append(process)
        assert process.stderr is not None
        told = list(itertools.takewhile(lambda said: "is served at" not in said, process.stderr))
        if process.poll() is not None:
            self.failures[number] = f"exit code {process.returncode}\n{''.join(told)}"

    def close(self) -> list[int]:
        """Stops what still runs, as Ctrl-C does; the exit codes."""
        for process in self.servers:
            process.send_signal(signal.SIGINT)
        return [process.wait(60) for process in self.servers]

    def shell(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", line], cwd=self.path, env=_environment(), capture_output=True, text=True, timeout=280
        )


def _environment() -> dict[str, str]:
    bin_first = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, "PATH": bin_first, "WANDB_MODE": "offline"}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workspace]:
    path = tmp_path_factory.mktemp("readme")
    (path / "configs").symlink_to(ROOT / "configs")
    (path / "tools").symlink_to(ROOT / "tools")
    made = Workspace(path)
    yield made
    assert set(made.close()) <= {0}


@pytest.mark.parametrize(
    "number",
    [pytest.param(i, id=line, marks=[pytest.mark.slow] * SLOW[i]) for i, (line, _) in enumerate(COMMANDS)],
)
def test_command_succeeds(workspace: Workspace, number: int) -> None:
    if COMMANDS[number][1] and "METADIST_DATA" not in os.environ:
        pytest.skip("METADIST_DATA does not name a folder of data sets")
    workspace.run_through(number)
    assert number not in workspace.failures, workspace.failures[number]


def test_two_runtimes_end_with_the_same_weights(workspace: Workspace) -> None:
    """The README says the two checksums that it greps are equal."""
    (number,) = [i for i, (line, _) in enumerate(COMMANDS) if line.startswith("grep meta_params_sha256")]
    workspace.run_through(number)
    shown = workspace.shell("cat runs/first/config.yaml runs/again/config.yaml").stdout
    assert "type: ray" in shown and "type: local" in shown
    # Not the summaries: runs/first may have been resumed by now. Its checkpoint of step 10 stays as it was.
    first, again = (
        (workspace.path / "runs" / run / "checkpoints" / "00000010" / "meta_params.safetensors").read_bytes()
        for run in ("first", "again")
    )
    assert first == again


@pytest.mark.parametrize("number", range(len(PROGRAMS)))
def test_program_succeeds(workspace: Workspace, number: int) -> None:
    program = workspace.path / f"program_{number}.py"
    program.write_text(PROGRAMS[number])
    finished = workspace.shell(f"{shlex.quote(sys.executable)} {program.name}")
    assert finished.returncode == 0, finished.stderr


def test_there_is_something_to_run() -> None:
    assert len(COMMANDS) >= 8
    assert len(PROGRAMS) >= 1


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.skipped], ids=lambda b: b.lines[0])
def test_skipped_block_gives_a_reason(block: Block) -> None:
    found = SKIP.fullmatch(block.before)
    assert found and found[1] and found[1].strip(), f"write <!-- test: skip (reason) -->, not {block.before}"


def test_every_block_of_make_is_skipped() -> None:
    made = [b for b in BLOCKS if b.language == "bash" and any(line.startswith("make ") for line in b.lines)]
    assert made and all(b.before == "<!-- test: skip (builds the environment) -->" for b in made)


def _mentioned() -> set[tuple[str, ...]]:
    """The words after ``metadist`` in blocks and inline code, as far as they look like subcommands."""
    shell = [line for b in BLOCKS if b.language == "bash" for line in b.lines]
    inline = re.findall(r"`(metadist [^`\n]+)`", FENCE.sub("", README))
    found = set()
    for line in [*shell, *inline]:
        words = line.split()
        if Path(words[0]).name == "metadist":
            rest = words[1:]
            end = next((i for i, w in enumerate(rest) if not re.fullmatch(r"[a-z]+", w)), len(rest))
            found.add(tuple(rest[:end]))
    return found


@pytest.mark.parametrize("words", sorted(_mentioned()), ids=" ".join)
def test_mentioned_command_exists(words: tuple[str, ...]) -> None:
    command: click.Command = main
    for word in words:
        if not isinstance(command, click.Group):
            break  # an argument
        assert word in command.commands, f"metadist {' '.join(words)}: there are {', '.join(sorted(command.commands))}"
        command = command.commands[word]


def test_mentioned_commands_are_found() -> None:
    assert {("train",), ("resume",), ("evaluate",), ("check",), ("submit",)} <= _mentioned()
    assert {("data", "verify"), ("data", "info"), ("data", "pack", "omniglot")} <= _mentioned()
