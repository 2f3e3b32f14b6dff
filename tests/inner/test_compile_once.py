"""What is compiled is compiled by one process of a machine, once; and a run says so if it had to do it again."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from metadist.cli import main
from metadist.inner import compiler_missing
from metadist.inner.program import alone

COMPILES = """
import json, time, torch
from torch._dynamo.utils import counters
from metadist.inner.program import Program
torch.set_num_threads(1)
program = Program(lambda w, x: torch.tanh(x @ w).sum(), True, False)
made = program(torch.ones(3, 2), torch.ones(4, 3))
found = counters["inductor"]
print(json.dumps([found["fxgraph_cache_miss"], found["fxgraph_cache_hit"], float(made)]))
"""


def test_processes_take_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    met = threading.Barrier(2)
    broken: list[str] = []

    def meet(what: str, patience_s: float) -> None:
        with alone(what):
            try:
                met.wait(patience_s)
            except threading.BrokenBarrierError:
                broken.append(what)

    for names, patience_s, apart in ((["a", "b"], 60.0, 0), (["a", "a"], 0.3, 2)):
        met.reset()
        threads = [threading.Thread(target=meet, args=(n, patience_s)) for n in names]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert len(broken) == apart, "those who want different things meet, those who want the same do not"


def test_where_nothing_can_be_kept_each_compiles_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setattr("torch._inductor.runtime.cache_dir_utils.cache_dir", lambda: str(tmp_path / "file" / "below"))
    entered = []
    with alone("a"):
        entered.append("a")
    assert entered == ["a"]


@pytest.mark.slow
@pytest.mark.skipif(bool(compiler_missing()), reason=f"cannot compile: {compiler_missing()}")
def test_of_processes_that_start_together_one_compiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    running = [subprocess.Popen([sys.executable, "-c", COMPILES], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = [json.loads(p.communicate()[0]) for p in running]
    assert sorted(f[:2] for f in found) == [[0, 1], [1, 0]], found
    assert found[0][2] == found[1][2]


def test_a_run_that_traces_again_says_so(tmp_path: Path) -> None:
    config = {
        "tasks": {"type": "sinusoid"}, "model": {"type": "mlp", "hidden": [4]}, "engine": {"strategy": "vectorised"},
        "algorithm": {"type": "mamlpp", "inner_steps": 2, "multi_step_loss_updates": 2},
        "outer": {"steps": 4, "meta_batch_size": 3, "tasks_per_microbatch": 2},
        "runtime": {"type": "local", "gpus_per_worker": 0}, "evaluation": {"episodes": 2},
        "tracking": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip
    for updates, told in ((2, True), (0, False)):
        config["algorithm"]["multi_step_loss_updates"] = updates  # type: ignore[index]
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        words = ["train", str(tmp_path / "c.yaml"), "--run-dir", str(tmp_path / str(updates))]
        done = CliRunner().invoke(main, words)
        assert done.exit_code == 0, done.output
        assert ("step 3: the meta-gradient was traced again" in done.output) == told
        assert done.output.count("traced again") == told
