"""The meta-update: average, clip, optimizer, schedule, on one flat vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metadist.inner.memory import LARGE, hand_back_what_is_freed
from metadist.outer.vectors import Addends, all_finite

_CHUNK = 1 << 16


def chunk_starts(sizes: Sequence[int]) -> list[int]:
    """Where the chunks of the global norm begin: with each tensor, and at fixed distances within it."""
    starts: list[int] = []
    at = 0
    for size in sizes:
        starts += range(at, at + size, _CHUNK)
        at += size
    return starts


def norm_of(squares: Iterable[float]) -> float:
    """The Euclidean norm of chunks in their order: its bits depend on no thread count and no number of shards."""
    total = 0.0
    for square in squares:
        total += square
    return math.sqrt(total) if math.isfinite(total) else math.inf if total > 0 else math.nan


def learning_rate(lr: float, schedule: str, warmup_steps: int, steps: int, version: int) -> float:
    """The rate of the update that makes ``version + 1`` of ``version``.

    Args:
        lr: the rate the schedule scales.
        schedule: ``constant``, or to zero at ``steps``: ``linear`` or ``cosine`` (Loshchilov and Hutter 2017,
            equation 5).
        warmup_steps: steps over which it rises linearly.
        steps: updates of the whole run.
        version: updates made so far, ``0 <= version``.
    """
    scale = min(1.0, (version + 1) / warmup_steps) if warmup_steps else 1.0
    done = min(1.0, max(0, version - warmup_steps) / max(1, steps - warmup_steps))
    if schedule == "linear":
        scale *= 1.0 - done
    elif schedule == "cosine":
        scale *= 0.5 * (1.0 + math.cos(math.pi * done))
    return lr * scale


@dataclass(frozen=True)
class Prepared:
    """A mean gradient that is ready to be applied.

    Args:
        gradient: the mean ``[numel]``, zero where a rule holds.
        ruled: ``(start, stop, next values)`` of what follows a rule.
        squares: the sums of squares of the gradient's chunks (:meth:`metadist.outer.vectors.Addends.mean_and_squares`).
    """

    gradient: Tensor
    ruled: list[tuple[int, int, Tensor]]
    squares: list[float]


class MetaUpdate:
    """Meta-parameters as a flat vector, or a shard of one, and the optimizer that moves them.

    Args:
        meta_params: the vector ``[numel]``; copied.
        options: the ``outer`` section of the config, as a mapping. ``rules``, if there, lists what no optimizer
            moves, as ``(start, stop, {"kind": ..., "rate": ...})``: a running ``average`` of the mean, something to
            ``replace`` by the sum, or to ``keep`` as it is (see :class:`metadist.algorithms.base.Rule`). ``sizes``, if
            there, are those of the tensors in the vector, in order; without them it is taken for one.
        version: updates made so far.
    """

    def __init__(self, meta_params: Tensor, options: dict[str, Any], version: int = 0) -> None:
        self.options, self.version = options, version
        self.vector = meta_params.detach().clone()
        self._tidy()
        numel = self.vector.numel()
        self._bounds = np.array([*chunk_starts(options.get("sizes", [numel])), numel], np.int64)
        # Vector instructions and what they leave over round differently: chunks make that the same in any shard.
        self._chunks = [torch.nn.Parameter(v) for v in self._cut(self.vector)]
        self.optimizer = _optimizer(self._chunks, options)
        self._state: dict[str, Tensor] | None = None

    def prepare(self, gradients: Addends, tasks: float) -> Prepared:
        """What an update with the mean over ``tasks`` of the meta-gradient needs; nothing has changed yet.

        Args:
            gradients: whose sum is that over all tasks, ``[numel]``.
            tasks: how many.

        Raises:
            FloatingPointError: what follows a rule is not finite.
        """
        gradients = gradients.cast(_of_numpy(self.vector.dtype))
        rules = self.options.get("rules", ())
        ruled = [
            (a, z, self._ruled(a, z, rule, torch.from_numpy(gradients.part(a, z)), tasks)) for a, z, rule in rules
        ]
        if not all(all_finite(values) for _, _, values in ruled):
            raise FloatingPointError("an average or carried state is not finite")
        bounds = self._bounds
        mean, squares = gradients.mean_and_squares(tasks, bounds, torch.get_num_threads())
        for a, z, _ in ruled:
            mean[a:z] = 0
            first, last = np.searchsorted(bounds, a, "right") - 1, np.searchsorted(bounds, z)
            touched = bounds[first : last + 1]
            left = Addends([0], [mean[touched[0] : touched[-1]]])
            _, squares[first:last] = left.mean_and_squares(1.0, touched - touched[0])
        return Prepared(torch.from_numpy(mean), ruled, squares.tolist())

    def apply(self, gradient_sum: Tensor, tasks: float) -> dict[str, float]:
        """:meth:`prepare` and :meth:`move` in one."""
        return self.move(self.prepare(Addends([0], [gradient_sum.numpy()]), tasks))

    def move(self, prepared: Prepared, norm: float | None = None) -> dict[str, float]:
        """One update.

        Args:
            prepared: of this version.
            norm: of the whole mean gradient, where this is a shard of it; None: of ``prepared``.

        Returns:
            ``grad_norm`` (of the mean, before clipping) and ``outer_lr``.

        Raises:
            FloatingPointError: the gradient is not finite; nothing has changed.
        """
        gradient = prepared.gradient
        norm = norm_of(prepared.squares) if norm is None else norm
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the meta-gradient is {norm}")
        clip = self.options.get("clip_norm")
        if clip is not None and norm > clip:
            gradient *= clip / norm
        o = self.options
        lr = learning_rate(o["lr"], o["schedule"], o["warmup_steps"], o["steps"], self.version)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        for chunk, slope in zip(self._chunks, self._cut(gradient), strict=True):
            chunk.grad = slope
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self._state is None:
            self._join()
        for a, z, values in prepared.ruled:
            self.vector[a:z] = values
        self.version += 1
        return {"grad_norm": norm, "outer_lr": lr}

    def _ruled(self, start: int, stop: int, rule: dict[str, Any], new: Tensor, tasks: float) -> Tensor:
        """The next values of a part that follows a rule, of what they sum up to."""
        if rule["kind"] == "replace":
            return new.clone()
        old = self.vector[start:stop].detach()
        if rule["kind"] == "keep":
            return old.clone()
        return old + rule["rate"] * (new / tasks - old)

    def _cut(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector's chunks."""
        return [vector[a:z] for a, z in pairwise(self._bounds.tolist())]

    def state(self, copy: bool = True) -> dict[str, Tensor]:
        """The optimizer's tensors by name (``exp_avg [numel]``, ``step []`` ...); not copied, it goes on with them."""
        return {k: v.clone() if copy else v for k, v in (self._state or {}).items()}

    def load(self, meta_params: Tensor, state: dict[str, Tensor], version: int) -> None:
        """Goes back to a vector, an optimizer state of :meth:`state` and a version."""
        self.vector.copy_(meta_params)
        self.optimizer.state.clear()
        self._state = None
        if state:
            self._share({k: _joined([v]) if v.dim() else v.clone() for k, v in state.items()})
        self.version = version

    def _join(self) -> None:
        """Puts what the optimizer keeps for each chunk, once it has begun, side by side in one vector."""
        held = [self.optimizer.state[chunk] for chunk in self._chunks]
        names = [k for k, v in held[0].items() if isinstance(v, Tensor)]
        joined: dict[str, Tensor] = {}
        for k in names:
            joined[k] = _joined([h[k] for h in held]) if held[0][k].dim() else held[0][k].clone()
            for h in held:
                del h[k]
        self._share(joined)
        self._tidy()

    def move_into(self, memory: Tensor) -> None:
        """Goes on with the meta-parameters in ``memory``, a vector of the same length and dtype."""
        self.vector = memory.copy_(self.vector)
        for chunk, part in zip(self._chunks, self._cut(memory), strict=True):
            chunk.data = part
        self._tidy()

    def _tidy(self) -> None:
        if self.vector.nbytes >= LARGE:
            hand_back_what_is_freed()

    def _share(self, state: dict[str, Tensor]) -> None:
        """Lets the optimizer work on the parts of whole vectors; of a count each chunk has its own."""
        counts = {k: [v, *(v.clone() for _ in self._chunks[1:])] for k, v in state.items() if not v.dim()}
        parts = counts | {k: self._cut(v) for k, v in state.items() if v.dim()}
        for i, chunk in enumerate(self._chunks):
            self.optimizer.state[chunk] |= {k: v[i] for k, v in parts.items()}
        self._state = state


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Parts of a vector as a new one, for which NumPy asks the system for large pages; torch does not."""
    whole = torch.from_numpy(np.empty(sum(len(part) for part in parts), _of_numpy(parts[0].dtype)))
    return torch.cat(list(parts), out=whole)


def _of_numpy(dtype: torch.dtype) -> np.dtype:
    return torch.empty(0, dtype=dtype).numpy().dtype


def _optimizer(chunks: list[torch.nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    lr, decay = options["lr"], options["weight_decay"]
    if options["optimizer"] == "sgd":
        return torch.optim.SGD(chunks, lr=lr, momentum=options["momentum"], weight_decay=decay, fused=True)
    kind = torch.optim.AdamW if options["optimizer"] == "adamw" else torch.optim.Adam
    return kind(chunks, lr=lr, betas=tuple(options["betas"]), weight_decay=decay, fused=True)
