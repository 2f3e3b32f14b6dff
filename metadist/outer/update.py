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
from metadist.outer import vectors

_CHUNK = 1 << 16


def chunk_starts(sizes: Sequence[int]) -> list[int]:
    """Where the chunks of the global norm begin: with each tensor, and at fixed distances within it."""
    starts: list[int] = []
    at = 0
    for size in sizes:
        starts += range(at, at + size, _CHUNK)
        at += size
    return starts


def mean_and_squares(vector: Tensor, tasks: float, starts: Sequence[int]) -> list[float]:
    """Divides a vector by ``tasks``, in place; the sum of squares of each chunk, in float64."""
    return vectors.mean_and_squares(vector.numpy(), tasks, np.array([*starts, len(vector)], np.int64))


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
        squares: the sums of squares of the gradient's chunks (:func:`mean_and_squares`).
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
        self._starts = chunk_starts(options.get("sizes", [self.vector.numel()]))
        # Vector instructions and what they leave over round differently: chunks make that the same in any shard.
        self._chunks = [torch.nn.Parameter(v) for v in self._cut(self.vector)]
        self.optimizer = _optimizer(self._chunks, options)
        self._state: dict[str, Tensor] | None = None

    def prepare(self, gradient_sum: Tensor, tasks: float, own: bool = False) -> Prepared:
        """What an update with the mean over ``tasks`` of the meta-gradient needs; nothing has changed yet.

        Args:
            gradient_sum: over tasks, ``[numel]``.
            tasks: how many.
            own: whether the mean may take the place of the sum, for want of another use of it.

        Raises:
            FloatingPointError: what follows a rule is not finite.
        """
        ruled = [(a, z, self._ruled(a, z, rule, gradient_sum, tasks)) for a, z, rule in self.options.get("rules", ())]
        if not all(bool(torch.isfinite(values).all()) for _, _, values in ruled):
            raise FloatingPointError("an average or carried state is not finite")
        gradient = gradient_sum.to(self.vector.dtype, copy=not own)
        for a, z, _ in ruled:
            gradient[a:z] = 0
        return Prepared(gradient, ruled, mean_and_squares(gradient, tasks, self._starts))

    def apply(self, gradient_sum: Tensor, tasks: float) -> dict[str, float]:
        """:meth:`prepare` and :meth:`move` in one."""
        return self.move(self.prepare(gradient_sum, tasks))

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

    def _ruled(self, start: int, stop: int, rule: dict[str, Any], total: Tensor, tasks: float) -> Tensor:
        """The next values of a part that follows a rule."""
        new = total[start:stop].to(self.vector.dtype)
        if rule["kind"] == "replace":
            return new.clone()
        old = self.vector[start:stop].detach()
        if rule["kind"] == "keep":
            return old.clone()
        return old + rule["rate"] * (new / tasks - old)

    def _cut(self, vector: Tensor) -> list[Tensor]:
        """Views of a vector's chunks."""
        return [vector[a:z] for a, z in pairwise([*self._starts, len(vector)])]

    def state(self, copy: bool = True) -> dict[str, Tensor]:
        """The optimizer's tensors by name (``exp_avg [numel]``, ``step []`` ...); not copied, it goes on with them."""
        return {k: v.clone() if copy else v for k, v in (self._state or {}).items()}

    def load(self, meta_params: Tensor, state: dict[str, Tensor], version: int) -> None:
        """Goes back to a vector, an optimizer state of :meth:`state` and a version."""
        self.vector.copy_(meta_params)
        self.optimizer.state.clear()
        self._state = None
        if state:
            self._share({k: v.clone() for k, v in state.items()})
        self.version = version

    def _join(self) -> None:
        """Puts what the optimizer keeps for each chunk, once it has begun, side by side in one vector."""
        held = [self.optimizer.state[chunk] for chunk in self._chunks]
        names = [k for k, v in held[0].items() if isinstance(v, Tensor)]
        joined: dict[str, Tensor] = {}
        for k in names:
            joined[k] = torch.cat([h[k] for h in held]) if held[0][k].dim() else held[0][k].clone()
            for h in held:
                del h[k]
        self._share(joined)
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


def _optimizer(chunks: list[torch.nn.Parameter], options: dict[str, Any]) -> torch.optim.Optimizer:
    lr, decay = options["lr"], options["weight_decay"]
    if options["optimizer"] == "sgd":
        return torch.optim.SGD(chunks, lr=lr, momentum=options["momentum"], weight_decay=decay, fused=True)
    kind = torch.optim.AdamW if options["optimizer"] == "adamw" else torch.optim.Adam
    return kind(chunks, lr=lr, betas=tuple(options["betas"]), weight_decay=decay, fused=True)
