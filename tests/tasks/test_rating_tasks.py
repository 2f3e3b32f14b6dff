"""Tasks of ratings: the past before the future, every held-out user once; their model and measures."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from metadist.algorithms import MAML
from metadist.algorithms.losses import ndcg
from metadist.config import validate
from metadist.data import pack_arrays, pack_ratings
from metadist.episode import PADDING
from metadist.errors import ConfigError, DataError
from metadist.experiment import Experiment
from metadist.finished import evaluate
from metadist.models import RatingModel
from metadist.seeding import Rng
from metadist.tasks.ratings import RatingTasks
from metadist.training import train

USERS, ITEMS = 20, 30
GENRES = {i: ["warm", "cold"][i % 2] for i in range(ITEMS)}


def rating(user: int, item: int) -> float:
    """Half of the users love what is warm, the others what is cold."""
    return 5.0 if (item % 2 == 0) == (user % 2 == 0) else 1.0


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ratings")
    rng = np.random.default_rng(0)
    with (folder / "ratings.csv").open("w") as log:
        log.write("userId,movieId,rating,timestamp\n")
        for user in range(USERS):
            for when, item in enumerate(rng.permutation(ITEMS)[: 8 + user]):
                log.write(f"{user},{item},{rating(user, item)},{1000 * user + 10 * when}\n")
    rows = "".join(f"{i},item {i} ({1990 + i}),{g}\n" for i, g in GENRES.items())
    (folder / "movies.csv").write_text("movieId,title,genres\n" + rows)
    pack_ratings(folder, folder / "set", least=2)
    return folder / "set"


def told(path: Path) -> dict[str, list[tuple[int, float, int]]]:
    """Item, rating and time of each user's ratings in the order they are kept in, by the user's name."""
    from metadist.data.shards import ShardSet

    shards = ShardSet(path)
    out: dict[str, list[tuple[int, float, int]]] = {}
    for b in range(len(shards.index)):
        own = out.setdefault(shards.manifest.classes[int(shards.index["class"][b])], [])
        own += [(r["item"], r["rating"], r["time"]) for r in map(json.loads, shards.texts(b))]
    return out


def test_support_is_the_past_and_query_the_future(packed: Path) -> None:
    kept, tasks = told(packed), RatingTasks(packed, 3, 4)
    seen, firsts = set(), set()
    for episode in tasks.episodes(0, "train", range(60)):
        user, first = episode.info["user"], episode.info["first"]
        mine = kept[user][first : first + 7]
        assert [t for *_, t in mine] == sorted(t for *_, t in mine)
        assert episode.support.x.dtype == torch.int64 and episode.support.y.dtype == torch.float32
        assert torch.cat([episode.support.x, episode.query.x])[:, 0].tolist() == [1 + item for item, *_ in mine]
        assert torch.cat([episode.support.y, episode.query.y])[:, 0].tolist() == [r for _, r, _ in mine]
        seen.add(user), firsts.add(first)
    assert len(seen) > 6 and len(firsts) > 4, "any user, any moment"


def test_every_held_out_user_comes_once_at_their_beginning(packed: Path) -> None:
    tasks = RatingTasks(packed, 2, 3, "test")
    episodes = list(tasks.episodes(0, "evaluation/test", range(len(tasks.users))))
    assert {e.info["user"] for e in episodes} == {str(u) for u in _names(packed, "test")}
    assert {e.info["first"] for e in episodes} == {0}
    more = RatingTasks(packed, 5, 3, "test", least=8).episodes(0, "evaluation/test", range(len(tasks.users)))
    for few, many in zip(episodes, more, strict=True):
        assert few.info == many.info and torch.equal(few.support.x, many.support.x[:2])


def _names(packed: Path, split: str) -> list[str]:
    from metadist.data import load_manifest

    manifest = load_manifest(packed)
    return [manifest.classes[c] for c in manifest.splits[split]]


def test_users_with_too_few_ratings_are_left_out_and_none_left_is_told(packed: Path) -> None:
    assert len(RatingTasks(packed, 10, 10).users) < len(RatingTasks(packed, 2, 2).users)
    with pytest.raises(DataError, match=r"tasks.shots \+ tasks.query_shots: 400 ratings of a user, .* ask for at most"):
        RatingTasks(packed, 200, 200)


def test_rows_name_the_item_and_what_it_is(packed: Path) -> None:
    kept = told(packed)
    with_items, without = RatingTasks(packed, 3, 4), RatingTasks(packed, 3, 4, items=False)
    notes = with_items._shards.manifest.notes
    names = notes["item_features"]["names"]
    for one, other in zip(with_items.episodes(0, "t", range(20)), without.episodes(0, "t", range(20)), strict=True):
        items = [item for item, *_ in kept[one.info["user"]][one.info["first"] :][:3]]
        for row, bare, item in zip(one.support.x.tolist(), other.support.x.tolist(), items, strict=True):
            wanted = {names[v] for v in notes["item_features"]["values"][item]}
            assert {names[v - 1 - len(notes["items"])] for v in row[1:] if v != PADDING} == wanted
            assert {names[v - 1] for v in bare if v != PADDING} == wanted
            assert max(row) < with_items.vocabulary and max(bare) < without.vocabulary


def test_an_episode_is_the_same_whoever_asks(packed: Path) -> None:
    tasks = RatingTasks(packed, 3, 4)
    batch = tasks.episodes(1, "train", [9, 4])
    for source in (tasks, pickle.loads(pickle.dumps(tasks))):
        assert torch.equal(source.sample(Rng(1, "train", 4)).query.x, batch[1].query.x)


def test_a_set_of_something_else_is_refused(tmp_path: Path) -> None:
    pack_arrays(np.zeros((2, 3, 4, 4), np.uint8), ["a", "b"], {"train": [0, 1]}, tmp_path / "pictures")
    with pytest.raises(DataError, match="holds no ratings; choose a set that `metadist data pack ratings`"):
        RatingTasks(tmp_path / "pictures", 2, 2)


# --------------------------------------------------------------------------- model, measures, run


def test_the_model_adds_up_what_a_row_names_and_padding_is_nothing() -> None:
    torch.manual_seed(0)
    model = RatingModel(20, embedding=4, hidden=(5,), mean=3.5)
    x = torch.tensor([[3, 7, PADDING]])
    before = model(x)
    with torch.no_grad():
        model.vectors[PADDING] += 9
        model.values[PADDING] += 9
    assert torch.equal(model(x), before) and torch.allclose(model(torch.tensor([[7, PADDING, 3]])), before)
    with torch.no_grad():
        model.values[7] += 0.25
    torch.testing.assert_close(model(x), before + 0.25)


def test_ndcg_is_that_of_the_definition() -> None:
    target = torch.tensor([[3.0], [2.0], [3.0], [0.0], [1.0], [2.0]])
    gains = (2**target[:, 0] - 1).tolist()
    at = [np.log2(p + 2) for p in range(6)]
    given = sum(g / d for g, d in zip(gains, at, strict=True))
    best = sum(g / d for g, d in zip(sorted(gains, reverse=True), at, strict=True))
    assert float(ndcg(torch.arange(6, 0, -1.0)[:, None], target)) == pytest.approx(given / best)
    assert float(ndcg(target, target)) == 1.0 and float(ndcg(target, torch.zeros(6, 1))) == 1.0
    assert float(ndcg(-target, target)) < given / best


def sections(packed: Path, **algorithm: object) -> dict:
    return {
        "tasks": {"type": "ratings", "path": str(packed), "shots": 4, "query_shots": 4},
        "model": {"type": "rating", "embedding": 8, "hidden": [16]},
        "algorithm": {"type": "maml", "inner_lr": 0.1, "inner_steps": 3, "metric": "mean_absolute_error", **algorithm},
        "outer": {"lr": 1e-2, "steps": 150, "meta_batch_size": 8, "tasks_per_microbatch": 8},
        "runtime": {"type": "local"},
        "evaluation": {"episodes": 4, "also": ["ndcg"]},
        "tracking": {"wandb": {"mode": "disabled"}},
    }  # fmt: skip


def test_a_run_learns_to_tell_taste_from_a_few_ratings(packed: Path, tmp_path: Path) -> None:
    run = train(Experiment(validate(sections(packed, adapted=["decide*"]), "the test")), tmp_path / "run")
    result = json.loads((run.path / "summary.json").read_text())["evaluation"]
    assert result["metric"] == "mean_absolute_error" and result["pre_adaptation"] > 1.5, "half love what others hate"
    assert result["mean"] < 1.0 and result["also"]["ndcg"]["mean"] > 0.9
    assert evaluate(run.path)["also"] == result["also"]


def test_the_inner_loop_changes_what_patterns_name_and_no_more(packed: Path) -> None:
    learner = Experiment(validate(sections(packed, adapted=["decide.layers.0.*", "mean"]), "the test")).learner()
    batch = RatingTasks(packed, 4, 4).episodes(0, "t", [0])
    params = learner.initial_meta_params()
    adapted = learner.adapt(params, batch[0].support)
    changed = {k for k, v in params.items() if not torch.equal(v, adapted[k])}
    assert changed == {"decide.layers.0.weight", "decide.layers.0.bias", "mean"}
    everything = Experiment(validate(sections(packed), "the test")).learner().adapt(params, batch[0].support)
    assert {k for k, v in params.items() if not torch.equal(v, everything[k])} == set(params)


def test_a_pattern_of_nothing_is_told() -> None:
    with pytest.raises(ValueError, match=r"adapted: 'decid\?' is the name of no parameter .* decide.layers.0.weight"):
        MAML(adapted=["mean", "decid?"]).bind(_model(), None, None)  # type: ignore[arg-type]


def _model() -> object:
    from metadist.inner import FunctionalModel

    return FunctionalModel(RatingModel(5))


def test_a_model_of_ratings_needs_ratings() -> None:
    config = {"tasks": {"type": "glyphs"}, "model": {"type": "rating"}, "algorithm": {"type": "maml"}}
    with pytest.raises(ConfigError, match=r"model.type: rating says a number, but targets are none"):
        Experiment(validate(config, "the test")).learner()
