"""Secrets stay where they were given: in the environment, and in nothing that a run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from metadist.cli import main
from tests.conftest import ROOT

KEY, PASSWORD = "0123456789abcdef" * 2 + "deadbeef", "correct-horse-battery"


def test_keys_of_the_environment_are_in_no_file_and_no_word_of_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"WANDB_API_KEY": KEY, "AWS_SECRET_ACCESS_KEY": PASSWORD, "HF_TOKEN": PASSWORD}.items():
        monkeypatch.setenv(name, value)
    words = ["outer.steps=3", "evaluation.episodes=10", "tracking.wandb.mode=offline", "runtime.workers=1"]
    command = ["train", str(ROOT / "configs" / "sinusoid_maml.yaml"), *words, "--run-dir", str(tmp_path / "run")]
    told = CliRunner().invoke(main, command)
    assert told.exit_code == 0, told.output
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file()]
    assert any(p.suffix == ".wandb" for p in files) and any(p.name == "state.json" for p in files)
    for secret in (KEY, PASSWORD):
        assert secret not in told.output
        assert not [p for p in files if secret.encode() in p.read_bytes()], "a secret was kept"


def test_a_config_entry_named_like_a_secret_is_masked_where_it_is_sent() -> None:
    from metadist.tracking.wandb import masked

    sent = masked({"model": {"args": {"api_key": KEY, "hidden": 3, "token": PASSWORD}}})
    assert sent == {"model": {"args": {"api_key": "***", "hidden": 3, "token": "***"}}}
