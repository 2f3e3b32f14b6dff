"""The adaptation engine: functional models, inner loops, and their meta-gradients over many tasks."""

from metadist.inner.adjoint import InnerProblem
from metadist.inner.batchnorm import BatchNormMode
from metadist.inner.compiled import compiler_missing
from metadist.inner.engine import Engine, choose_strategy
from metadist.inner.functional import Convolution, FunctionalModel, Tensors
from metadist.inner.gradients import curvature, gradients

__all__ = [
    "BatchNormMode",
    "Convolution",
    "Engine",
    "FunctionalModel",
    "InnerProblem",
    "Tensors",
    "choose_strategy",
    "compiler_missing",
    "curvature",
    "gradients",
]
