"""Networks of timm and torchvision, from a file of their weights to a run that adapts without it."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from metadist.api import load
from metadist.config import validate
from metadist.data import pack_folder
from metadist.errors import ConfigError, DataError
from metadist.experiment import Experiment
from metadist.models import Backbone
from metadist.models.backbone import IMAGENET_MEAN, IMAGENET_STD
from metadist.training import train
from tests.test_using import COLOURS, draw

try:
    import torchvision
except RuntimeError:  # built for GPUs, beside torch without them: its operators do not load, and networks need none
    for operator in ("nms", "qnms"):
        torch.library.define(f"torchvision::{operator}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    import torchvision
import timm  # imports torchvision

SIDE = 32
SMALL: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "torchvision": ("shufflenet_v2_x0_5", lambda: torchvision.models.shufflenet_v2_x0_5(weights=None)),
    "timm": ("resnet10t", lambda: timm.create_model("resnet10t", num_classes=1000)),
}
"""Of each library a network with BatchNorm, as its own makers make it."""


def pretrained(library: str) -> nn.Module:
    """A network that has seen something: its statistics are not those of a new one."""
    torch.manual_seed(3)
    network = SMALL[library][1]()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # the mean of all it sees
    for _ in range(3):
        network.train()(torch.rand(8, 3, SIDE, SIDE) * 2)
    return network.eval()


@pytest.fixture(scope="module", params=sorted(SMALL))
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, nn.Module, Path]:
    """A library, a network of it, and the file of its weights, as people have it: with the last layer."""
    network, path = pretrained(request.param), tmp_path_factory.mktemp("weights") / "w.pth"
    torch.save(network.state_dict(), path)
    return request.param, network, path


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(IMAGENET_MEAN).view(1, 3, 1, 1)) / torch.tensor(IMAGENET_STD).view(1, 3, 1, 1)


def features_of(network: nn.Module, x: Tensor) -> Tensor:
    """What goes into the network's own last layer."""
    last = [m for m in network.modules() if isinstance(m, nn.Linear)][-1]
    seen: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        network(x)
    hook.remove()
    return seen[0]


@pytest.mark.parametrize("colour", [True, False], ids=["colour", "grey"])
def test_its_features_are_the_networks_own(kept: tuple[str, nn.Module, Path], colour: bool) -> None:
    library, network, path = kept
    x = torch.rand(4, 3 if colour else 1, SIDE, SIDE)
    made = Backbone(library, SMALL[library][0], None, path).eval()  # type: ignore[arg-type]
    wanted = features_of(network, normalised(x.expand(-1, 3, -1, -1)))
    torch.testing.assert_close(made(x), wanted, rtol=1e-5, atol=1e-5)
    assert Backbone(library, SMALL[library][0], 5, path).eval()(x).shape == (4, 5)  # type: ignore[arg-type]


def test_pictures_are_scaled() -> None:
    made = Backbone("torchvision", "shufflenet_v2_x0_5", None, size=48).eval()
    x = torch.rand(2, 3, 20, 30)
    large = torch.nn.functional.interpolate(x, (48, 48), mode="bilinear")
    torch.testing.assert_close(made(x), made(large))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda held: {"state_dict": held, "epoch": 90},
        lambda held: {f"module.{k}": v for k, v in held.items()},
        lambda held: {"model": {f"backbone.{k}": v for k, v in held.items()}},
    ],
    ids=["in a checkpoint", "of DataParallel", "both"],
)
def test_files_as_training_scripts_write_them(wrap: Callable[[dict[str, Tensor]], Any], tmp_path: Path) -> None:
    network = pretrained("torchvision")
    torch.save(wrap(network.state_dict()), tmp_path / "w.pth")
    made = Backbone("torchvision", "shufflenet_v2_x0_5", None, tmp_path / "w.pth")
    assert torch.equal(made.body.conv1[1].running_mean, network.conv1[1].running_mean)  # type: ignore


class Anything:
    """Something that only running a file would make."""


def _cut(path: Path) -> None:
    torch.save(pretrained("torchvision").state_dict(), path)
    path.write_bytes(path.read_bytes()[:1000])


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "not there": (lambda path: None, "cannot be read"),
    "of another network": (
        lambda path: torch.save(torchvision.models.squeezenet1_1().state_dict(), path), "it lacks conv1.0.weight"
    ),
    "of another width": (
        lambda path: torch.save(torchvision.models.shufflenet_v2_x1_0().state_dict(), path), "shufflenet_v2_x0_5"
    ),
    "a whole object": (lambda path: torch.save(Anything(), path), "holds more than tensors"),
    "cut": (_cut, "holds no parameters"),
    "text": (lambda path: path.write_text("no"), "holds"),
    "a list": (lambda path: torch.save([1, 2], path), "no named tensors"),
}  # fmt: skip


@pytest.mark.parametrize("fault", WRONG)
def test_a_file_that_does_not_fit_is_told(fault: str, tmp_path: Path) -> None:
    make, told = WRONG[fault]
    make(tmp_path / "w.pth")
    with pytest.raises(DataError, match=told) as stopped:
        Backbone("torchvision", "shufflenet_v2_x0_5", 5, tmp_path / "w.pth")
    assert "w.pth" in str(stopped.value)


@pytest.mark.parametrize("library", sorted(SMALL))
def test_a_network_that_is_not_there_is_told(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=f"model.name: {library} makes no 'resnet1000'"):
        Backbone(library, "resnet1000", 5)
    monkeypatch.setitem(__import__("sys").modules, library, None)
    with pytest.raises(DataError, match=f"model.library: is {library}, which is not installed; run `pip install"):
        Backbone(library, "resnet18", 5)


# --------------------------------------------------------------------------- in a run

LEARNERS: dict[str, dict[str, Any]] = {
    "maml": {"type": "maml", "adapted": ["head.*"], "inner_lr": 0.1, "inner_steps": 2},
    "protonet": {"type": "protonet"},
}

FROZEN = ["body.conv1.*", "body.stage2.*", "body.stage3.*"]


@pytest.mark.parametrize("learner", LEARNERS)
def test_a_run_moves_what_is_not_frozen_and_needs_no_file_afterwards(learner: str, tmp_path: Path) -> None:
    network = pretrained("torchvision")
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    pack_folder(draw(tmp_path / "pictures", dict.fromkeys(COLOURS, 4)), tmp_path / "set", size=SIDE)
    sections = {
        "tasks": {"type": "shards", "path": str(tmp_path / "set"), "ways": 3, "shots": 1, "query_shots": 2},
        "model": {"type": "backbone", "library": "torchvision", "name": "shufflenet_v2_x0_5",
                  "weights": str(tmp_path / "w.safetensors")},
        "algorithm": LEARNERS[learner], "engine": {"compile": False}, "runtime": {"type": "local"},
        "outer": {"steps": 2, "meta_batch_size": 2, "frozen": FROZEN},
        "evaluation": {"episodes": 2, "split": "train"},
        "tracking": {"wandb": {"mode": "disabled"}, "console": False},
    }  # fmt: skip
    run = train(Experiment(validate(sections, "the test")), tmp_path / "run")
    assert json.loads((run.path / "summary.json").read_text())["evaluation"]["batchnorm"] == "stored"
    (tmp_path / "w.safetensors").unlink()
    learned = load(tmp_path / "run")
    own = network.state_dict()
    for name, value in learned.meta_params.items():
        began = own.get(name.removeprefix("body."))
        if began is not None:
            still = "running" in name or any(fnmatch.fnmatch(name, pattern) for pattern in FROZEN)
            assert torch.equal(value.view_as(began), began) == still, name
    x, y = torch.rand(6, 3, SIDE, SIDE), torch.arange(3).repeat(2)
    adapted = learned.adapt((x, y))
    with torch.no_grad():
        together, alone = (adapted(x[:k])[:2, :3] for k in (6, 2))
    size = float(together.abs().max())
    assert float((together[0] - together[1]).abs().max()) > 1e-3 * size, "they differ"
    torch.testing.assert_close(together / size, alone / size, rtol=0, atol=1e-5)  # each is judged alone
    if learner == "maml":
        changed = {k for k, v in adapted.named_values().items() if not torch.equal(v, learned.meta_params[k])}
        assert changed == {"head.weight", "head.bias"}


def test_stored_needs_statistics() -> None:
    sections = {"tasks": {"type": "glyphs"}, "model": {"type": "resnet12", "widths": [4], "batchnorm": "stored"},
                "algorithm": {"type": "maml"}}  # fmt: skip
    with pytest.raises(ConfigError, match=r"model.batchnorm: blocks.0.main.1 has no statistics of its own; choose"):
        Experiment(validate(sections, "the test")).learner()


def test_numbers_are_refused() -> None:
    sections = {"tasks": {"type": "sinusoid"}, "model": {"type": "backbone", "library": "timm", "name": "resnet18"},
                "algorithm": {"type": "maml"}}  # fmt: skip
    with pytest.raises(ConfigError, match="model.type: backbone takes pictures"):
        Experiment(validate(sections, "the test")).learner()
