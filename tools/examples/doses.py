"""Tasks, a network and a loss of your own in one file: how a patient clears a drug, from a few blood samples.

A task is one patient: concentration over time after a dose, ``y = exp(-t k)`` with a rate ``k`` of the patient's own,
measured with now and then a wild error. ``doses.yaml`` beside this file names what stands here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metadist as md


class Patients(md.TaskSource):
    """Predict a patient's later concentrations from earlier ones.

    Args:
        samples: known of a patient; ten later ones are asked for.
        wild: share of the known ones that are off by a lot.
    """

    LATER = 10

    def __init__(self, samples: int = 5, wild: float = 0.1) -> None:
        self.samples, self.wild = samples, wild

    def sample(self, rng: md.Rng) -> md.Episode:
        # All chance comes from `rng`: an episode is then the same for whoever asks for it.
        rate = float(rng.uniform(0.1, 1.0, size=1)[0])
        hours = torch.from_numpy(rng.uniform(0, 6, size=(self.samples + self.LATER, 1))).float()
        hours[: self.samples] *= 0.5  # what is known is from the first half
        y = torch.exp(-rate * hours)
        unit = torch.from_numpy(rng.uniform(0, 1, size=(self.samples, 2))).float()
        off = (unit[:, :1] < self.wild) * (unit[:, 1:] - 0.5)
        known = md.Examples(hours[: self.samples], y[: self.samples] + off)
        return md.Episode(support=known, query=md.Examples(hours[self.samples :], y[self.samples :]))


class Curve(nn.Module):
    """A small network that says the logarithm of a rate at each hour. Any ``nn.Module`` will do.

    Args:
        width: of its layers.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.rate = nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1))

    def forward(self, hours: Tensor) -> Tensor:
        return torch.exp(-F.softplus(self.rate(hours)) * hours)


def huber(output: Tensor, y: Tensor) -> Tensor:
    """Of a few wild errors squares would make much. A loss is a function of outputs and targets, a mean."""
    return F.huber_loss(output, y, delta=0.05)
