"""A module as a pure function of its parameters: what every inner loop differentiates."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

Tensors = dict[str, Tensor]

_RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)


class FunctionalModel:
    """``module`` with its parameters taken out; calling it changes nothing.

    BatchNorm normalises by the statistics of the very examples it is given (the query set counts as one
    batch, so evaluation is *transductive*): statistics per task keep a task's result independent of the
    tasks computed beside it. Running statistics are neither read nor kept.

    Args:
        module: any module; it is copied, so the one passed in stays as it is.
        device: where the calls run.
        dtype: of floating-point parameters and buffers; None leaves them.
    """

    def __init__(self, module: nn.Module, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
        self.module = copy.deepcopy(module).to(device=device, dtype=dtype)
        self.device = torch.device(device)
        self.has_batchnorm = _use_batch_statistics(self.module)
        self.module.train()
        self.buffers: Tensors = {k: v.detach() for k, v in self.module.named_buffers()}

    def initial_params(self) -> Tensors:
        """The module's parameters, each a detached copy."""
        return {k: v.detach().clone() for k, v in self.module.named_parameters()}

    def __call__(self, params: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """The module's output for ``x [examples, ...]`` under ``params``."""
        return functional_call(self.module, {**params, **self.buffers}, (x,), strict=True)

    @property
    def random(self) -> bool:
        """Whether a call draws random numbers (dropout), so that two calls differ."""
        return any(isinstance(m, _RANDOM) and getattr(m, "p", 1) > 0 for m in self.module.modules())

    @property
    def batchnorm(self) -> str:
        """``transductive``, or ``none`` for a model without BatchNorm."""
        return "transductive" if self.has_batchnorm else "none"


def _use_batch_statistics(module: nn.Module) -> bool:
    """Switches BatchNorm to the batch's own statistics; says whether there was any."""
    found = False
    for m in module.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            found = True
            m.track_running_stats = False
            m.running_mean = m.running_var = m.num_batches_tracked = None
    return found
