"""The adaptation engine: functional models, inner loops, and their meta-gradients over many tasks."""

from metadist.inner.adjoint import InnerProblem
from metadist.inner.batchnorm import BatchNormMode
from metadist.inner.engine import Engine, choose_strategy
from metadist.inner.functional import FunctionalModel, Tensors
from metadist.inner.gradients import curvature, gradients
from metadist.inner.kernels import Convolution
from metadist.inner.optimizers import SGD, Adam, InnerOptimizer, Momentum
from metadist.inner.program import Compile, compiler_missing

__all__ = [
    "SGD",
    "Adam",
    "BatchNormMode",
    "Compile",
    "Convolution",
    "Engine",
    "FunctionalModel",
    "InnerOptimizer",
    "InnerProblem",
    "Momentum",
    "Tensors",
    "choose_strategy",
    "compiler_missing",
    "curvature",
    "gradients",
]
