"""What a config is told: by the simulator, by its CLI, and how large its model is said to be."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from metadist.cli import main
from metadist.config import load_config
from metadist.experiment import Experiment
from metadist.simulator import Arrangement, Compute, Work, advice, simulate
from metadist.simulator.presets import GPU_10G, PRESETS
from metadist.simulator.sizes import numbers_of

ROOT = Path(__file__).resolve().parents[2]
GLYPHS = str(ROOT / "configs/glyphs_maml.yaml")


def told(*words: str) -> list[str]:
    """The comments of `metadist check`; the rest has to be the config still."""
    result = CliRunner().invoke(main, ["check", GLYPHS, *words])
    assert result.exit_code == 0, result.output
    assert yaml.safe_load(result.output)["name"] == "glyphs_maml"
    return [line.removeprefix("# ") for line in result.output.splitlines() if line.startswith("# ")]


def test_a_config_is_told_what_its_updates_take() -> None:
    lines = told("--microbatch-ms", "200", "runtime.workers=4")
    assert lines[0] == "simulated: 4 workers on this machine, a model of 0.45 MB, 8 microbatches an update"
    assert lines[1].startswith("an update takes ") and lines[1].endswith(" are not computing")
    assert lines[2].startswith("beside computing an update takes ") and "cores" in lines[2] and "driver" in lines[2]
    assert lines[3].startswith("that is less than 5% of it where a microbatch takes ")
    assert lines[4] == "no other number of shards and no other topology is clearly faster than server_shards: 1"


def test_shards_are_told_of_where_they_gain_clearly() -> None:
    lines = told("runtime.workers=8", "runtime.address=auto", "--model-mb", "4000", "--microbatch-ms", "100")
    assert "on 1 node of eight GPUs at 10 Gbit/s, which is assumed, a model of 4000 MB" in lines[0]
    gain, _, words = lines[-1].partition(" times as fast with ")
    factor = float(gain.removeprefix("updates are "))
    work = Work(8, 4e9, Compute(0.1), 8)
    now = simulate(work, Arrangement(), GPU_10G, 1, 0).step_s
    best = advice.best_of(advice.choices(work, GPU_10G))
    assert factor == pytest.approx(now / best.step_s, abs=0.06) and factor > 1.1
    assert words == advice.words_of(best.arrangement) != "server_shards: 1"


def test_workers_that_would_have_nothing_to_do_are_named() -> None:
    assert any(
        line.startswith("56 workers have nothing to do: an update has 8 ") for line in told("runtime.workers=64")
    )
    assert not any("nothing to do" in line for line in told("runtime.workers=8"))


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["runtime.workers=auto", "runtime.address=auto"], "runtime.workers is auto on a cluster"),
        (["runtime.workers=2000"], "no advice for 2000 workers"),
        (["model={type: custom, import_path: a:B}"], "give --model-mb"),
    ],
)
def test_where_there_is_none_the_reason_is_told(words: list[str], says: str) -> None:
    lines = told(*words)
    assert len(lines) == 1 and says in lines[0]


def test_a_run_in_this_process_is_told_nothing() -> None:
    assert told("runtime.type=local") == []


def test_a_model_that_takes_nothing_is_refused() -> None:
    result = CliRunner().invoke(main, ["check", GLYPHS, "--model-mb", "0"])
    assert result.exit_code == 2 and "--model-mb" in result.output


def test_checking_takes_neither_torch_nor_ray() -> None:
    code = (
        "import sys; from metadist.cli import main\n"
        f"try: main(['check', {GLYPHS!r}])\n"
        "except SystemExit: pass\n"
        "print([m for m in ('torch', 'ray', 'wandb', 'webdataset') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=100)
    assert "# simulated" in done.stdout and done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("glyphs_maml", []),
        ("glyphs_maml", ["model.downsample=max_pool"]),
        ("glyphs_maml", ["model={type: resnet12, widths: [8, 16, 24, 32]}"]),
        ("glyphs_maml", ["model={type: mlp, hidden: [64, 32]}"]),
        ("sinusoid_maml", []),
        ("glyphs_meta_sgd", []),
        ("glyphs_protonet", []),
    ],
)
def test_models_are_as_large_as_they_are_said_to_be(config: str, words: list[str]) -> None:
    checked = load_config(ROOT / "configs" / f"{config}.yaml", tuple(words))
    learned = Experiment(checked).learner().initial_meta_params()
    assert numbers_of(checked) == pytest.approx(sum(t.numel() for t in learned.values()), rel=0.05)


def test_what_is_chosen_is_the_simplest_of_the_fastest() -> None:
    one, two, ring = Arrangement(), Arrangement(server_shards=2), Arrangement(topology="allreduce")
    found = [advice.Choice(one, 1.2), advice.Choice(two, 1.03), advice.Choice(ring, 1.0)]
    assert advice.best_of(found).arrangement == two
    assert advice.words_of(ring) == "topology: allreduce"
    assert advice.words_of(Arrangement(server_shards=4, node_sums=True)) == "server_shards: 4, node_sums: true"


def test_small_models_are_offered_no_shards_and_one_node_no_sums() -> None:
    small = list(advice.arrangements(Work(8, 1e6, Compute(1.0)), GPU_10G))
    assert [a.server_shards for a in small if a.topology == "server"] == [1]
    large = list(advice.arrangements(Work(8, 1e9, Compute(1.0)), GPU_10G, unordered=True))
    assert {a.server_shards for a in large} == {1, 2, 4} and not any(a.node_sums for a in large)
    assert large[-1].topology == "allreduce_unordered"
    assert any(a.node_sums for a in advice.arrangements(Work(16, 1e9, Compute(1.0)), GPU_10G))


def test_presets_say_where_their_numbers_are_from() -> None:
    assert all("assumed" in PRESETS[name].source for name in ("gpu_10g", "gpu_100g"))
    two = PRESETS["two_cores"]
    kept = json.loads((ROOT / "tools/bench/results/simulated_two_cores.json").read_text())["setup"]["measurements"]
    assert "measured" in two.source
    assert dataclasses.asdict(two.costs) == pytest.approx(kept["costs"], rel=0.01)
    assert dataclasses.asdict(two.machine) == pytest.approx(kept["machine"], rel=0.01)
