"""A pretrained network of timm or torchvision, and a last layer of our own."""

from __future__ import annotations

import importlib
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from metadist.errors import DataError, first_line

Library = Literal["timm", "torchvision"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of red, green and blue, of pictures in [0, 1]; what torchvision's and most of timm's networks were trained with."""

_WITHIN = ("state_dict", "model", "model_state_dict", "teacher")
"""Where training scripts put the parameters in a checkpoint that holds more."""


class Backbone(nn.Module):
    """``body``, a network of another library up to its features, and ``head``, a linear layer.

    Args:
        library: where the network comes from; it must be installed.
        name: of the network there, such as ``resnet18``.
        out_features: classes; None leaves the head out, as an embedding.
        weights: a file of its parameters, safetensors or what ``torch.save`` wrote; None: random ones.
        size: side in pixels to which pictures are scaled; None: as they are.
        mean, std: of each channel, with which pictures in [0, 1] are normalised.

    Input ``[N, 1 or 3, H, W]`` in [0, 1], grey pictures as three equal channels; output ``[N, out_features]``, or
    ``[N, features]`` as an embedding.

    Raises:
        DataError: the library or the network is not there, or the file does not fit it.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        library: Library,
        name: str,
        out_features: int | None,
        weights: str | Path | None = None,
        size: int | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.size = size
        self.body, features = _from_timm(name) if library == "timm" else _from_torchvision(name)
        if weights is not None:
            _load(self.body, Path(weights).expanduser(), f"{library}'s {name}")
        self.head = nn.Identity() if out_features is None else nn.Linear(features, out_features)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        if self.size is not None and x.shape[-2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", antialias=False)
        x = (x - self.mean) / self.std  # one channel becomes three
        return self.head(self.body(x))


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except ImportError as e:
        if e.name != library:
            raise
        mend = f"run `pip install {library}`"
        raise DataError("model.library", f"is {library}, which is not installed", mend) from None
    except RuntimeError as e:  # torchvision for GPUs beside torch without them, and the like
        mend = f"install the {library} that was built for your torch"
        raise DataError("model.library", f"is {library}, which cannot be imported ({first_line(e)})", mend) from None


def _from_timm(name: str) -> tuple[nn.Module, int]:
    timm = _imported("timm")
    try:
        body = timm.create_model(name, pretrained=False, num_classes=0)
    except Exception as e:  # an unknown name, or arguments the network does not take
        raise DataError("model.name", f"timm makes no {name!r} ({first_line(e)})", "see timm.list_models()") from None
    return body, int(body.num_features)  # type: ignore[arg-type]


def _from_torchvision(name: str) -> tuple[nn.Module, int]:
    torchvision = _imported("torchvision")
    try:
        body = torchvision.models.get_model(name, weights=None)
    except Exception as e:
        mend = "see torchvision.models.list_models()"
        raise DataError("model.name", f"torchvision makes no {name!r} ({first_line(e)})", mend) from None
    last = [key for key, module in body.named_modules() if isinstance(module, nn.Linear)]
    if not last:
        raise DataError("model.name", f"{name} ends without a linear layer", "name a network of classification")
    parent, _, child = last[-1].rpartition(".")
    owner = body.get_submodule(parent)
    features = int(getattr(owner, child).in_features)
    setattr(owner, child, nn.Identity())
    return body, features


def _load(body: nn.Module, path: Path, whose: str) -> None:
    """Fills ``body`` from a file; parameters of a last layer that it no longer has are left out."""
    found = _read(path)
    own = body.state_dict()
    if not set(own) & set(found):  # as DataParallel and Lightning have them, behind a common prefix
        first = next(iter(found), "").partition(".")[0] + "."
        found = {k.removeprefix(first): v for k, v in found.items()}
    missing = [k for k in own if k not in found and not k.endswith("num_batches_tracked")]
    if missing:
        some = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise DataError(path, f"is not of {whose}: it lacks {some}", "name the network that it was saved from")
    for key, value in own.items():
        if key in found and found[key].shape != value.shape:
            shapes = f"{list(found[key].shape)}, and {whose} has {list(value.shape)}"
            raise DataError(path, f"holds {key} of shape {shapes}", "name the network that it was saved from")
    body.load_state_dict({k: v for k, v in found.items() if k in own}, strict=False)


def _read(path: Path) -> dict[str, Tensor]:
    mend = "give safetensors, or the state_dict of a network saved by torch.save"
    try:
        held: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except OSError as e:
        raise DataError(path, f"cannot be read ({e.strerror or e})", "check model.weights") from None
    except pickle.UnpicklingError:
        raise DataError(path, "holds more than tensors, which only running it would read", mend) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as e:
        raise DataError(path, f"holds no parameters ({first_line(e)})", mend) from None
    for key in _WITHIN:
        if isinstance(held, Mapping) and isinstance(held.get(key), Mapping):
            held = held[key]
    if not isinstance(held, Mapping) or not all(isinstance(v, Tensor) for v in held.values()):
        raise DataError(path, f"holds {type(held).__name__}, no named tensors", mend)
    return dict(held)
