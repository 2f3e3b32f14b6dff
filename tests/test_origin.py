"""What is told of the code of a run."""

from __future__ import annotations

import subprocess
from pathlib import Path

from metadist.origin import code_version


def test_a_commit_is_named_where_there_is_one_and_whether_it_was_changed(tmp_path: Path) -> None:
    assert set(code_version(tmp_path)) == {"metadist"}

    def git(*words: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", *who, *words], cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    git("init", "-q")
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-qm", "a")
    git("tag", "v1")
    commit = git("rev-parse", "HEAD").strip()
    assert code_version(tmp_path)["commit"] == commit
    (tmp_path / "a").write_text("2")
    assert code_version(tmp_path)["commit"] == commit + "-dirty"
