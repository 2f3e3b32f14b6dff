"""What the tests of chaos share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.chaos.harness import CONFIG, OPTIONS, numbers


@pytest.fixture(scope="package")
def undisturbed(omniglot_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    from click.testing import CliRunner

    from metadist.cli import main

    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    options = {**OPTIONS, "tasks.path": omniglot_shards, "runtime.type": "local", "tracking.console": "false"}
    words = [f"{k}={v}" for k, v in options.items()]
    result = CliRunner().invoke(main, ["train", str(CONFIG), *words, "--run-dir", str(run_dir)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads((run_dir / "summary.json").read_text())["meta_params_sha256"], numbers(run_dir)
