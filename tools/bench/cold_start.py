"""Cold start: films that a new person will like, from their first ratings (Lee et al. 2019, MeLU).

Of users who were held out, the first 1 to 20 ratings are known and the ten after the twentieth are foretold, the same
ten whatever is known. Compared are

- ``mean``: the mean of all ratings; ``user mean``: that of what is known of the user, drawn towards it;
- ``biases`` and ``factors``: means of items and users, and matrix factorisation, by the library Surprise, of the
  training users' ratings together with what is known of the new ones; factors, epochs and regularisation by validation
  users;
- ``fine-tuned``: the meta-learner's network trained on all ratings of the training users, then by gradient steps on
  what is known of a user; rate and steps by validation users, anew for each number of ratings;
- ``maml``: ``configs/movielens_maml.yaml``, trained with ten known ratings, with its own rate; steps in use by
  validation users, anew for each number of ratings.

Needs Surprise: ``pip install scikit-surprise``.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import metadist as md  # noqa: E402
from metadist.config import load_config  # noqa: E402
from metadist.data import load_manifest  # noqa: E402
from metadist.errors import MetadistError  # noqa: E402
from metadist.evaluation import interval_of  # noqa: E402
from metadist.experiment import Experiment  # noqa: E402
from metadist.training import train  # noqa: E402
from tools.bench._tables import keep_rows, show_table  # noqa: E402
from tools.bench.cold_start_parts import baselines  # noqa: E402
from tools.bench.cold_start_parts.users import User, errors, everything, users_of  # noqa: E402

CONFIG = ROOT / "configs" / "movielens_maml.yaml"
SHOTS, LATER = (1, 2, 5, 10, 20), 10
INNER_STEPS = (1, 3, 5, 10, 20)
METHODS = ("mean", "user mean", "biases", "factors", "fine-tuned", "maml")
COLOURS = dict(zip(METHODS, ("#9aa3b2", "#6b7686", "#c2703d", "#b0479c", "#2c9c69", "#2f6fde"), strict=True))
INK, GRID = "#1d2433", "#e3e7ee"


def main() -> None:
    options = arguments()
    try:
        rows = list(measured(options))
    except MetadistError as e:
        raise SystemExit(f"cold_start: {e}") from None
    columns = ("method", *(f"{k} known" for k in options.shots))
    for measure, digits in (("mean_absolute_error", 3), ("ndcg", 3)):
        show_table(columns, table(rows, options.shots, measure, digits), measure.replace("_", " "))
    setup = {
        "date": datetime.date.today().isoformat(), "torch": torch.__version__, "machine": platform.machine(),
        "cpu_cores": os.cpu_count(), "data": load_manifest(options.data).content_id, "later": LATER,
        "config": CONFIG.name, "steps": options.steps,
    }  # fmt: skip
    if options.json:
        keep_rows(options.json, rows, setup)
    if options.picture:
        draw(rows, options.picture)


def arguments() -> argparse.Namespace:
    example = "example: python tools/bench/cold_start.py --data data/movielens --json cold_start.json"
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=example, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="shards of `metadist data pack ratings`")
    parser.add_argument("--shots", type=int, nargs="+", default=list(SHOTS), help="ratings that are known")
    parser.add_argument("--steps", type=int, help="meta-updates, in place of the config's")
    parser.add_argument("--runs", type=Path, help="where the run is kept; a finished one is taken as it is")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--picture", type=Path, help="draw the errors here")
    parser.add_argument("--quick", action="store_true", help="a tenth of the meta-updates and of the validation users")
    options = parser.parse_args()
    if options.quick:
        options.steps = options.steps or 100
    return options


def measured(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A row for each method and number of known ratings, told as it comes."""
    most, notes = max(options.shots), load_manifest(options.data).notes
    scale = (float(notes["scale"][0]), float(notes["scale"][1]))
    users = users_of(options.data, "test", most, LATER)
    judges = users_of(options.data, "validation", most, LATER)
    judges = judges[: len(judges) // 10 + 2] if options.quick else judges
    say(f"{len(users)} held-out users, {len(judges)} for validation")
    with contextlib.ExitStack() as stack:
        runs = options.runs or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        learner = meta_trained(options, runs)
    answer = answering(options.data, learner, users, judges, scale)
    for shots in options.shots:
        for method in METHODS:
            off, order = map(interval_of, errors(users, answer[method](shots), scale))
            yield {
                "method": method, "known_ratings": shots, "users": len(users),
                "mean_absolute_error": off["mean"], "ci95": off["ci95"],
                "ndcg": order["mean"], "ndcg_ci95": order["ci95"],
            }  # fmt: skip
            say(f"{shots} known, {method}: mean absolute error {off['mean']:.3f}")


def meta_trained(options: argparse.Namespace, runs: Path) -> md.Learner:
    words = [f"tasks.path={options.data}", "tracking.wandb.mode=disabled", "runtime.type=local"]
    words += [f"outer.steps={options.steps}"] if options.steps else []
    run_dir = runs / "movielens_maml"
    if not (run_dir / "summary.json").is_file():
        with contextlib.redirect_stdout(sys.stderr):  # the run's own table is progress here
            train(Experiment(load_config(CONFIG, words)), run_dir)
    return md.load(run_dir)


def answering(
    data: Path, learner: md.Learner, users: list[User], judges: list[User], scale: tuple[float, float]
) -> dict[str, Callable[[int], list[torch.Tensor]]]:
    """For each method, the answers of what it knows after so many ratings."""
    ratings = everything(data, "train")
    raw = [
        (user, int(row[0]), float(y))
        for user, (x, values) in by_user(data).items()
        for row, y in zip(x, values, strict=True)
    ]
    module = learner.algorithm.model.module

    def make() -> Any:
        made = type(module)(module.vectors.shape[0], module.vectors.shape[1], hidden(module), float(ratings.y.mean()))
        return made

    def off(model: Any) -> float:
        with torch.no_grad():
            return float(errors(judges, [model(user.later.x) for user in judges], scale)[0].mean())

    network = baselines.pretrained(ratings, off, make)

    def factors(shots: int) -> list[torch.Tensor]:
        best = baselines.best_factors(raw, judges, shots, scale)
        return baselines.factorised(raw, users, shots, scale, "SVD", **best)

    def tuned(shots: int) -> list[torch.Tensor]:
        return baselines.fine_tuned(network, users, shots, *baselines.best_descent(network, judges, shots, scale))

    def learned(shots: int, of: list[User] = users, steps: int | None = None) -> list[torch.Tensor]:
        algorithm = copy.copy(learner.algorithm)
        algorithm.evaluation_inner_steps = steps or min(INNER_STEPS, key=lambda k: misses(shots, k))  # type: ignore
        adapter = md.Learner(learner.run_dir, algorithm, learner.meta_params, learner.version)
        with torch.no_grad():
            return [adapter.adapt(user.first(shots))(user.later.x) for user in of]

    def misses(shots: int, steps: int) -> float:
        return float(errors(judges, learned(shots, judges, steps), scale)[0].mean())

    return {
        "mean": lambda shots: baselines.mean_of_all(ratings, users),
        "user mean": lambda shots: baselines.mean_of_user(ratings, users, shots),
        "biases": lambda shots: baselines.factorised(raw, users, shots, scale, "BaselineOnly"),
        "factors": factors, "fine-tuned": tuned, "maml": learned,
    }  # fmt: skip


def hidden(module: Any) -> tuple[int, ...]:
    """Sizes of the hidden layers of the network's decision."""
    linear = [layer for layer in module.decide.layers if isinstance(layer, torch.nn.Linear)]
    return tuple(layer.out_features for layer in linear[:-1])


def by_user(data: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    tasks = md.RatingTasks(data, 1, 1)
    return {str(user): tasks.ratings_of(int(user)) for user in tasks.users}


def table(rows: list[dict[str, Any]], shots: list[int], measure: str, digits: int) -> list[list[str]]:
    interval = "ci95" if measure == "mean_absolute_error" else "ndcg_ci95"
    found = {(r["method"], r["known_ratings"]): f"{r[measure]:.{digits}f} ± {r[interval]:.{digits}f}" for r in rows}
    return [[method, *(found[method, k] for k in shots)] for method in METHODS]


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), dpi=150, facecolor="white")
    axes = figure.add_subplot()
    for place, method in enumerate(METHODS):
        own = [r for r in rows if r["method"] == method]
        at = np.array([r["known_ratings"] for r in own]) * 1.02 ** (place - 2.5)  # side by side
        values, ci = [r["mean_absolute_error"] for r in own], [r["ci95"] for r in own]
        axes.errorbar(at, values, ci, label=method, color=COLOURS[method], capsize=2, lw=1.5, marker="o", ms=3)
    axes.set_xscale("log")
    ticks = sorted({r["known_ratings"] for r in rows})
    axes.set_xticks(ticks, [str(k) for k in ticks])
    axes.minorticks_off()
    axes.set_xlabel("ratings of a new user that are known", color=INK)
    axes.set_ylabel("mean absolute error of ten to come", color=INK)
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    axes.legend(frameon=False, ncols=6, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    figure.savefig(path, bbox_inches="tight")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
