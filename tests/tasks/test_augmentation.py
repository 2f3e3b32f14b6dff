"""Augmentation: what is moved where, what stays, and that an episode's changes are its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from metadist.config import load_config
from metadist.data import pack_arrays
from metadist.episode import EpisodeBatch, Examples
from metadist.errors import ConfigError
from metadist.experiment import Experiment
from metadist.tasks.augmentation import Augmentation
from metadist.tasks.shards import ShardTasks

ALL = {"mirror": True, "shift": 0.1, "rotation": 20.0, "zoom": 0.2}


def blob(side: int = 41, high: int | None = None) -> torch.Tensor:
    """One picture ``[1, H, W]`` with a round bump below and right of its middle."""
    y, x = torch.meshgrid(torch.arange(high or side), torch.arange(side), indexing="ij")
    middle = ((high or side) - 1) / 2, (side - 1) / 2
    return torch.exp(-((y - middle[0] - 4) ** 2 + (x - middle[1] - 8) ** 2) / 8.0)[None]


def batch_of(picture: torch.Tensor, tasks: int, ways: int = 2, each: int = 2) -> EpisodeBatch:
    y = torch.arange(ways).repeat_interleave(each).expand(tasks, -1)
    sets = [Examples(picture.expand(tasks, ways * each, *picture.shape).clone(), y.clone()) for _ in range(2)]
    return EpisodeBatch(*sets, tuple({} for _ in range(tasks)))


def centre(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of pictures ``[..., 1, H, W]``: where the middle of their ink is from their own middle (x, y), and the ink."""
    high, wide = x.shape[-2:]
    ink = x.sum((-1, -2, -3))
    across = (x.sum((-2, -3)) * (torch.arange(wide) - (wide - 1) / 2)).sum(-1) / ink
    down = (x.sum((-1, -3)) * (torch.arange(high) - (high - 1) / 2)).sum(-1) / ink
    return across, down, ink


def pictures(batch: EpisodeBatch) -> torch.Tensor:
    return torch.cat([batch.support.x, batch.query.x], 1)


def test_nothing_asked_for_changes_no_bit() -> None:
    batch = batch_of(blob(), 3)
    assert torch.equal(pictures(Augmentation().apply(batch, 0, "train", [0, 1, 2])), pictures(batch))


def test_a_class_is_mirrored_as_a_whole_and_half_of_them_are() -> None:
    x = pictures(Augmentation(mirror=True).apply(batch_of(blob(), 200), 0, "train", range(200)))
    across, down, _ = centre(x)
    of_class = across.view(200, 2, 2, 2)  # set, class, example
    torch.testing.assert_close(across.abs(), torch.full_like(across, 8.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(down, torch.full_like(down, 4.0), atol=1e-3, rtol=0)
    assert (of_class == of_class[:, :1, :, :1]).all()
    signs = of_class[:, 0, :, 0] > 0
    assert 0.4 < signs.float().mean() < 0.6 and (signs[:, 0] != signs[:, 1]).any()


def test_shifts_are_within_their_bound_and_reach_it() -> None:
    across, down, _ = centre(pictures(Augmentation(shift=0.1).apply(batch_of(blob(), 100), 0, "s", range(100))))
    for moved, start in ((across, 8.0), (down, 4.0)):
        assert (moved - start).abs().max() <= 4.1 + 1e-2
        assert (moved - start).min() < -3.7 and (moved - start).max() > 3.7
    assert len(across.unique()) == across.numel()  # each picture is moved by itself


@pytest.mark.parametrize("high", [41, 61])
def test_turning_keeps_the_distance_from_the_middle(high: int) -> None:
    turned = Augmentation(rotation=90.0).apply(batch_of(blob(41, high), 100), 0, "s", range(100))
    across, down, ink = centre(pictures(turned))
    distance = torch.hypot(across, down)
    torch.testing.assert_close(distance, torch.full_like(distance, 80**0.5), atol=0.05, rtol=0)
    torch.testing.assert_close(ink, torch.full_like(ink, float(blob(41, high).sum())), atol=0.05, rtol=0)
    angle = torch.rad2deg(torch.atan2(down, across) - np.arctan2(4, 8))
    angle = (angle + 180) % 360 - 180
    assert angle.abs().max() <= 90.5 and angle.min() < -80 and angle.max() > 80


def test_zoom_scales_distances_and_sizes_alike() -> None:
    across, down, ink = centre(pictures(Augmentation(zoom=0.3).apply(batch_of(blob(), 100), 0, "s", range(100))))
    factor = across / 8
    torch.testing.assert_close(down / 4, factor, atol=0.02, rtol=0)
    torch.testing.assert_close(ink / blob().sum(), factor**2, atol=0.03, rtol=0.02)
    assert factor.min() < np.exp(-0.27) and factor.max() > np.exp(0.27)


def test_what_is_uncovered_takes_the_pixels_of_the_edge() -> None:
    x = pictures(Augmentation(**ALL).apply(batch_of(torch.full((3, 9, 9), 0.25), 4), 0, "s", range(4)))
    torch.testing.assert_close(x, torch.full_like(x, 0.25))


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("augmented") / "set"
    images = np.random.default_rng(0).integers(0, 256, (10, 5, 8, 8), dtype=np.uint8)
    pack_arrays(images, [f"k{i}" for i in range(10)], {"train": range(6), "test": range(6, 10)}, out)
    return out


@given(numbers=st.lists(st.integers(0, 2**40), min_size=1, max_size=9), seed=st.integers(0, 2**64 - 1))
def test_an_episode_does_not_depend_on_its_batch(packed: Path, numbers: list[int], seed: int) -> None:
    tasks = ShardTasks(packed, 3, 1, 2, augmentation=ALL)
    batch = tasks.episodes(seed, "s", numbers)
    for row, e in enumerate(numbers):
        alone = tasks.episodes(seed, "s", [e])
        assert torch.equal(batch.support.x[row], alone.support.x[0])
        assert torch.equal(batch.query.x[row], alone.query.x[0])


@pytest.mark.parametrize("how", [{}, {"rotations": "classes"}, {"order": "shuffled"}, {"labels": "letters"}])
def test_classes_examples_and_labels_are_those_without(packed: Path, how: dict[str, Any]) -> None:
    plain, changed = (ShardTasks(packed, 3, 1, 2, augmentation=a, **how) for a in (None, ALL))
    a, b = (t.episodes(3, "train", range(20)) for t in (plain, changed))
    assert a.info == b.info and torch.equal(a.support.y, b.support.y) and torch.equal(a.query.y, b.query.y)
    assert not torch.equal(a.support.x, b.support.x) and not torch.equal(a.query.x, b.query.x)
    # Nearly nothing is asked for: every picture is where it was, in whatever order they are shown.
    c = ShardTasks(packed, 3, 1, 2, augmentation={"shift": 1e-6}, **how).episodes(3, "train", range(20))
    torch.testing.assert_close(c.query.x, a.query.x, atol=1e-3, rtol=0)


def test_only_the_training_split_is_changed(packed: Path) -> None:
    plain, changed = (ShardTasks(packed, 3, 1, 2, augmentation=a) for a in (None, ALL))
    for split, same in (("test", True), ("train", False)):
        a, b = (t.split(split).split(split).episodes(0, "s", range(5)) for t in (plain, changed))
        assert torch.equal(a.query.x, b.query.x) is same


def test_a_config_changes_the_training_split_alone(packed: Path, tmp_path: Path) -> None:
    shapes = "ways: 3, shots: 1, query_shots: 1"
    file = tmp_path / "run.yaml"
    file.write_text(
        f"tasks: {{type: shards, path: {packed}, {shapes}, augmentation: {{mirror: true, shift: 0.1}}}}\n"
        "model: {type: mlp}\nalgorithm: {type: maml}\n"
    )
    experiment = Experiment(load_config(file))
    plain = ShardTasks(packed, 3, 1, 1)
    for split, same in (("train", False), ("test", True)):
        source = experiment.source(split)
        told = source.describe()["augmentation"]
        assert told["mirror"] is not same and (told["shift"] == 0) is same
        a, b = (s.episodes(0, "s", range(5)).query.x for s in (source, plain.split(split)))
        assert torch.equal(a, b) is same


@pytest.mark.parametrize(
    ("given", "named"),
    [({"shift": 1.5}, "shift"), ({"rotation": -1.0}, "rotation"), ({"zoom": np.nan}, "zoom"), ({"hue": 1}, "hue")],
)
def test_a_change_that_cannot_be_is_refused(packed: Path, given: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"tasks\.augmentation\.{named}"):
        ShardTasks(packed, 3, 1, 2, augmentation=given)
