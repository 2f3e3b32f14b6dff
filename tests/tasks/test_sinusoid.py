"""Sine waves as the paper draws them."""

from __future__ import annotations

import math

import pytest
import torch

from metadist.errors import ConfigError
from metadist.seeding import Rng
from metadist.tasks.sinusoid import SinusoidTasks


def test_an_episode_is_points_of_the_wave_its_info_names() -> None:
    batch = SinusoidTasks(shots=7, query_shots=4).episodes(3, "train", range(50))
    assert batch.support.x.shape == batch.support.y.shape == (50, 7, 1)
    assert batch.query.x.shape == batch.query.y.shape == (50, 4, 1)
    for episode in batch:
        for x, y in (episode.support, episode.query):
            assert x.dtype == y.dtype == torch.float32
            wave = episode.info["amplitude"] * torch.sin(x.double() - episode.info["phase"])
            torch.testing.assert_close(y.double(), wave, atol=1e-5, rtol=0)


def test_amplitude_phase_and_inputs_fill_the_papers_ranges() -> None:
    batch = SinusoidTasks().episodes(0, "train", range(4000))
    drawn = {
        "amplitude": torch.tensor([i["amplitude"] for i in batch.info]),
        "phase": torch.tensor([i["phase"] for i in batch.info]),
        "x": torch.cat([batch.support.x, batch.query.x], dim=1).flatten(),
    }
    for name, (low, high) in {"amplitude": (0.1, 5.0), "phase": (0.0, math.pi), "x": (-5.0, 5.0)}.items():
        values, width = drawn[name], high - low
        assert low <= values.min() < low + 0.01 * width, name
        assert high - 0.01 * width < values.max() <= high, name
        assert abs(values.mean() - (low + high) / 2) < 0.02 * width, name
        assert abs(values.std() - width / math.sqrt(12)) < 0.02 * width, name


def test_amplitude_phase_and_inputs_are_drawn_apart() -> None:
    batch = SinusoidTasks(shots=1, query_shots=1).episodes(1, "train", range(4000))
    columns = torch.stack(
        [torch.tensor([i[k] for i in batch.info]) for k in ("amplitude", "phase")]
        + [batch.support.x[:, 0, 0], batch.query.x[:, 0, 0]]
    )
    off_diagonal = torch.corrcoef(columns) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.07


def test_an_episode_depends_on_seed_stream_and_number_alone() -> None:
    tasks = SinusoidTasks()
    batch = tasks.episodes(5, "train", [9, 2])
    assert torch.equal(batch[0].support.x, tasks.sample(Rng(5, "train", 9)).support.x)
    assert torch.equal(batch[1].query.y, tasks.episodes(5, "train", [2])[0].query.y)
    for other in (tasks.episodes(6, "train", [9]), tasks.episodes(5, "test", [9]), tasks.episodes(5, "train", [8])):
        assert not torch.equal(batch[0].support.x, other[0].support.x)


@pytest.mark.parametrize("field", ["shots", "query_shots"])
def test_no_points_is_refused(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"^tasks\.{field}: is 0; give at least 1$"):
        SinusoidTasks(**{field: 0})


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="choose one of train, validation, test"):
        SinusoidTasks().split("tset")
