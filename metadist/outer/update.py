"""The meta-update: average, clip, optimizer, schedule, on one flat vector."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_CHUNK = 1 << 16


def global_norm(vector: Tensor) -> float:
    """The Euclidean norm, summed in float64 over fixed chunks so that no thread count changes its bits."""
    total = 0.0
    for chunk in torch.split(vector, _CHUNK):
        wide = chunk.double()
        total += float(torch.dot(wide, wide))
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


class MetaUpdate:
    """Meta-parameters as a flat vector, and the optimizer that moves them.

    Args:
        meta_params: the vector ``[numel]``; copied.
        options: the ``outer`` section of the config, as a mapping. ``rules``, if there, lists what no optimizer
            moves, as ``(start, stop, {"kind": ..., "rate": ...})``: a running ``average`` of the mean, or something to
            ``replace`` by the sum (see :class:`metadist.algorithms.base.Rule`).
        version: updates made so far.
    """

    def __init__(self, meta_params: Tensor, options: dict[str, Any], version: int = 0) -> None:
        self.options, self.version = options, version
        self.vector = torch.nn.Parameter(meta_params.detach().clone())
        self.optimizer = _optimizer(self.vector, options)

    def apply(self, gradient_sum: Tensor, tasks: int) -> dict[str, float]:
        """One update with the mean over ``tasks`` of the meta-gradient.

        Returns:
            ``grad_norm`` (of the mean, before clipping) and ``outer_lr``.

        Raises:
            FloatingPointError: the gradient or what follows a rule is not finite; nothing has changed.
        """
        gradient = gradient_sum.to(self.vector.dtype) / tasks
        ruled = [(a, z, self._ruled(a, z, rule, gradient_sum, tasks)) for a, z, rule in self.options.get("rules", ())]
        for a, z, _ in ruled:
            gradient[a:z] = 0
        norm = global_norm(gradient)
        if not math.isfinite(norm):
            raise FloatingPointError(f"the norm of the meta-gradient is {norm}")
        if not all(bool(torch.isfinite(values).all()) for _, _, values in ruled):
            raise FloatingPointError("an average or carried state is not finite")
        clip = self.options.get("clip_norm")
        if clip is not None and norm > clip:
            gradient *= clip / norm
        o = self.options
        lr = learning_rate(o["lr"], o["schedule"], o["warmup_steps"], o["steps"], self.version)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.vector.grad = gradient
        self.optimizer.step()
        self.vector.grad = None
        with torch.no_grad():
            for a, z, values in ruled:
                self.vector[a:z] = values
        self.version += 1
        return {"grad_norm": norm, "outer_lr": lr}

    def _ruled(self, start: int, stop: int, rule: dict[str, Any], total: Tensor, tasks: int) -> Tensor:
        """The next values of a part that follows a rule."""
        new = total[start:stop].to(self.vector.dtype)
        if rule["kind"] == "replace":
            return new.clone()
        old = self.vector[start:stop].detach()
        return old + rule["rate"] * (new / tasks - old)

    def state(self) -> dict[str, Tensor]:
        """The optimizer's tensors by name (``exp_avg``, ``step`` ...), copied."""
        held = self.optimizer.state[self.vector]
        return {k: v.detach().clone() for k, v in held.items() if isinstance(v, Tensor)}

    def load(self, meta_params: Tensor, state: dict[str, Tensor], version: int) -> None:
        """Goes back to a vector, an optimizer state of :meth:`state` and a version."""
        with torch.no_grad():
            self.vector.copy_(meta_params)
        self.optimizer.state[self.vector] = {k: v.clone() for k, v in state.items()}
        self.version = version


def _optimizer(vector: Tensor, options: dict[str, Any]) -> torch.optim.Optimizer:
    decay = options["weight_decay"]
    if options["optimizer"] == "sgd":
        return torch.optim.SGD([vector], lr=options["lr"], momentum=options["momentum"], weight_decay=decay)
    kind = torch.optim.AdamW if options["optimizer"] == "adamw" else torch.optim.Adam
    return kind([vector], lr=options["lr"], betas=tuple(options["betas"]), weight_decay=decay, fused=True)
