"""The table of cold start: what is known and foretold, the baselines by their definitions, and the kept result."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metadist.data import pack_ratings
from metadist.episode import Examples
from metadist.models import RatingModel
from tests.conftest import ROOT
from tools.bench.cold_start_parts import baselines
from tools.bench.cold_start_parts.users import User, errors, everything, users_of

SCRIPT, RESULTS = ROOT / "tools" / "bench" / "cold_start.py", ROOT / "tools" / "bench" / "results"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cold")
    pairs = [(user, item) for user in range(25) for item in range(35)]
    rows = [f"{user},{(7 * user + item) % 40},{1 + (user + item) % 5},{item}" for user, item in pairs]
    (folder / "ratings.csv").write_text("\n".join(["userId,movieId,rating,timestamp", *rows]))
    pack_ratings(folder / "ratings.csv", folder / "set")
    return folder / "set"


def user(known: list[float], later: list[float]) -> User:
    def examples(values: list[float]) -> Examples:
        return Examples(torch.arange(1, len(values) + 1)[:, None], torch.tensor(values)[:, None])

    return User("u", examples(known), examples(later))


def test_the_same_is_foretold_whatever_is_known(packed: Path) -> None:
    users = users_of(packed, "test", 20, 10)
    assert len(users) == 5 and len({u.name for u in users}) == 5
    for one in users:
        assert len(one.known.x) == 20 and len(one.later.x) == 10 and len(one.first(3).x) == 3
        assert torch.equal(one.first(3).x, one.known.x[:3])
    assert len(everything(packed, "train").y) == 16 * 35


def test_means_and_errors_by_their_definitions() -> None:
    train = Examples(torch.ones(4, 1, dtype=torch.long), torch.tensor([[1.0], [2], [3], [4]]))
    one = user([5.0, 4.0, 1.0], [2.0, 5.0])
    assert baselines.mean_of_all(train, [one])[0].flatten().tolist() == [2.5, 2.5]
    assert float(baselines.mean_of_user(train, [one], 2, weight=3.0)[0][0]) == pytest.approx((9 + 3 * 2.5) / 5)
    off, ordered = errors([one], [torch.tensor([[9.0], [4.0]])], (1.0, 5.0))
    assert off.tolist() == [pytest.approx((3 + 1) / 2)], "an answer beyond the scale is at its end"
    gains = (2**2 - 1) / np.log2(2) + (2**5 - 1) / np.log2(3)
    assert ordered[0] == pytest.approx(gains / ((2**5 - 1) / np.log2(2) + (2**2 - 1) / np.log2(3)))


def test_fine_tuning_moves_the_decision_alone() -> None:
    torch.manual_seed(0)
    model, one = RatingModel(10, 4, (5,), 3.0), user([5.0, 1.0], [2.0, 5.0])
    kept = copy.deepcopy(model)
    (answer,) = baselines.fine_tuned(model, [one], 2, 0.1, 3)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), kept.parameters(), strict=True)), "a copy is tuned"
    own = copy.deepcopy(model)
    for _ in range(3):
        loss = ((own(one.known.x) - one.known.y) ** 2).mean()
        moved = [*own.decide.parameters(), own.mean]
        for p, g in zip(moved, torch.autograd.grad(loss, moved), strict=True):
            p.data -= 0.1 * g
    torch.testing.assert_close(answer, own(one.later.x).detach())


def test_all_of_it_at_a_small_size(packed: Path, tmp_path: Path) -> None:
    pytest.importorskip("surprise", reason="scikit-surprise is not installed")
    words = ["--data", str(packed), "--shots", "1", "5", "--steps", "2", "--json", "rows.json", "--picture", "p.png"]
    command = [sys.executable, str(SCRIPT), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert len(rows) == 12 and {r["users"] for r in rows} == {5} and (tmp_path / "p.png").stat().st_size > 1000
    assert all(np.isfinite([r["mean_absolute_error"], r["ci95"], r["ndcg"]]).all() for r in rows)


def test_the_kept_result_is_what_the_readme_says() -> None:
    rows = json.loads((RESULTS / "cold_start.json").read_text())["rows"]
    readme = (ROOT / "README.md").read_text()
    for row in rows:
        if row["known_ratings"] in (1, 5, 20) and row["method"] != "user mean":
            assert f"{row['mean_absolute_error']:.3f} ± {row['ci95']:.3f}" in readme, row
    assert {r["users"] for r in rows} == {103} and "the 103 with thirty ratings or more" in readme


def test_it_explains_itself_with_an_example() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--help"], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "example: python tools/bench/cold_start.py" in done.stdout
