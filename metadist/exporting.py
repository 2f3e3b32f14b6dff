"""An adapted learner for where there is torch alone: ``metadist export``."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from metadist.adapting import Adapted
from metadist.errors import DataError
from metadist.files import write_for_a_person

SCHEMA = "metadist.adapted/1"
DESCRIPTION = "metadist.json"


class Scores(nn.Module):
    """Scores of the classes that an adapted learner was shown, ``[N, classes]``."""

    def __init__(self, adapted: Adapted) -> None:
        super().__init__()
        self.model, self.classes = adapted.model, len(adapted.classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)[:, : self.classes]


def described(adapted: Adapted) -> dict[str, Any]:
    """What whoever uses it must know."""
    inputs = adapted.inputs
    if adapted.tokens is not None:
        reading: dict[str, Any] = {
            "kind": "tokens", "dtype": inputs.x_dtype, "shape": ["N", *inputs.x], "tokens": adapted.tokens.kind,
            "length": adapted.tokens.length, "vocabulary": adapted.tokens.vocabulary, "padding": 0,
        }  # fmt: skip
    else:
        reading = {
            "kind": "pictures", "dtype": "float32", "shape": ["N", *inputs.x], "range": [0.0, 1.0],
            "mode": "L" if inputs.x[0] == 1 else "RGB",
            "resize": "scaled and cropped about the centre, Lanczos (PIL.ImageOps.fit)",
        }  # fmt: skip
    return {
        "schema": SCHEMA, "run_dir": str(adapted.run_dir), "version": adapted.version, "classes": adapted.classes,
        "support": adapted.shots, "inputs": reading, "outputs": "scores [N, classes]; softmax gives probabilities",
        "batchnorm": adapted.batchnorm, **({"note": adapted.note} if adapted.note else {}),
    }  # fmt: skip


def to_torch_export(adapted: Adapted, path: Path) -> None:
    """Writes a program that ``torch.export.load(path).module()`` runs, for any number of inputs at once.

    Args:
        adapted: by :func:`metadist.adapting.adapt` with ``plain``.
        path: ends in ``.pt2``; its description stands within, and beside it as ``.json``.

    Raises:
        DataError: the learner's computation cannot be exported.
    """
    if path.suffix != ".pt2":
        raise DataError(path, f"ends in {path.suffix!r}", "write to a name that ends in .pt2")
    two = adapted.inputs.example().support.x[:1].repeat(2, *(1 for _ in adapted.inputs.x))
    module = Scores(adapted).eval()
    for p in module.parameters():
        p.requires_grad_(False)
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(module, (two,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    except Exception as e:  # of dynamo, of shapes, of operators: each has errors of its own
        first = str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__
        told = f"its learner cannot be exported by torch.export ({first})"
        raise DataError(adapted.run_dir, told, "use --format safetensors") from e
    told = json.dumps(described(adapted), indent=1)
    held = io.BytesIO()
    torch.export.save(program, held, extra_files={DESCRIPTION: told})
    write_for_a_person(path, held.getvalue())
    write_for_a_person(path.with_suffix(".json"), told + "\n")


def to_safetensors(adapted: Adapted, path: Path) -> None:
    """Writes what the learner has adapted as named tensors, and what they are as JSON beside it.

    Of learners that adapt a network, names are those of its parameters, as ``load_state_dict`` takes them.
    """
    from safetensors.torch import save

    if path.suffix != ".safetensors":
        raise DataError(path, f"ends in {path.suffix!r}", "write to a name that ends in .safetensors")
    tensors = {name: value.detach().contiguous() for name, value in adapted.model.named_values().items()}
    told = {**described(adapted), "tensors": {name: list(t.shape) for name, t in tensors.items()}}
    write_for_a_person(path, save(tensors, metadata={"metadist": json.dumps(described(adapted))}))
    write_for_a_person(path.with_suffix(".json"), json.dumps(told, indent=1) + "\n")


FORMATS: dict[str, Callable[[Adapted, Path], None]] = {"torch-export": to_torch_export, "safetensors": to_safetensors}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch.export logs and warns of."""
    logger = logging.getLogger("torch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
