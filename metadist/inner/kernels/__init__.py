"""Operators that torch composes badly from its own, each with a plain form as its oracle and fallback."""

from metadist.inner.kernels.convolutions import AsProducts, Convolution
from metadist.inner.kernels.patches import available

__all__ = ["AsProducts", "Convolution", "available"]
