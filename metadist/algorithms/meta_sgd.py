"""MAML with learned rates, one for every parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from metadist.algorithms.maml import MAML
from metadist.episode import Examples
from metadist.inner import Tensors

RATES = "inner_lr/"


class MetaSGD(MAML):
    """MAML whose inner rates are learned, one number for each parameter (Li et al. 2017, equation 2).

    ``theta_{k+1} = theta_k - alpha * grad L_support(theta_k)`` elementwise; a learned rate may turn negative.
    ``inner_lr`` is where all rates set out. They are the meta-parameters ``inner_lr/NAME``.
    """

    def initial_meta_params(self) -> Tensors:
        params = super().initial_meta_params()
        return {**params, **{RATES + k: torch.full_like(params[k], self.inner_lr) for k in self.parameter_names}}

    def start(
        self, meta_params: Tensors, constants: Tensors, support: Examples, evaluation: bool
    ) -> tuple[dict[str, Any], Tensors]:
        shared, fast = super().start(meta_params, constants, support, evaluation)
        shared["rates"] = {k: meta_params[RATES + k] for k in fast}
        return shared, fast

    def rate(self, shared: Any, name: str, k: int) -> Tensor:
        return shared["rates"][name]

    def has_rates(self) -> bool:
        return True
