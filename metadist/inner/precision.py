"""Products in fewer bits: what costs the time of an inner loop, where its precision matters least.

Factors are rounded, each sum within a product is kept in single precision by the hardware, and its result is handed on
in the precision of what went in. Parameters, statistics, losses and every sum of gradients keep theirs: the same split
as torch.autocast makes, but for normalisation, whose second derivative cancels too much to be computed in few bits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_PRODUCTS = {
    F.linear, torch.conv1d, torch.conv2d, torch.conv3d, torch.matmul, torch.mm, torch.bmm,
    Tensor.matmul, Tensor.__matmul__, Tensor.mm, Tensor.bmm,
}  # fmt: skip


class RoundedProducts(TorchFunctionMode):
    """Within it, convolutions and products of matrices round their factors to ``dtype``; so do their derivatives."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return func(*args, **kwargs)
        wide = next(t.dtype for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor))
        args, kwargs = pytree.tree_map_only(Tensor, lambda t: t.to(self._dtype), (args, kwargs))
        return func(*args, **kwargs).to(wide)
