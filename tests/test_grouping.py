"""The tests of a file are run by one process, whatever the number of processes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT, group_of

TEST = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(6))
def test_one(number):
    with pathlib.Path(__file__).with_suffix(".seen").open("a") as seen:
        seen.write(os.environ["PYTEST_XDIST_WORKER"] + "\\n")
"""


@pytest.mark.slow
def test_a_file_is_run_by_one_process(tmp_path: Path) -> None:
    folder = tmp_path / "tests"
    folder.mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\ntestpaths = tests\n")
    (folder / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    for name in "abcd":
        (folder / f"test_{name}.py").write_text(TEST)
    words = [sys.executable, "-m", "pytest", "-n", "2", "--no-loadscope-reorder", "-p", "no:cacheprovider"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = [(folder / f"test_{name}.seen").read_text().split() for name in "abcd"]
    assert all(len(workers) == 6 and len(set(workers)) == 1 for workers in seen), seen
    assert len({workers[0] for workers in seen}) == 2


def test_all_that_starts_ray_is_one_group() -> None:
    ids = ("tests/ray/test_a.py::test_x[tests/y::z]", "tests/ray/deeper/test_b.py::test_y")
    assert {group_of(nodeid) for nodeid in ids} == {"ray"}
    assert group_of("tests/outer/test_a.py::test_x") == "outer/test_a.py"
