"""The adaptation engine: functional models, inner loops, and their meta-gradients over many tasks."""

from metadist.inner.adjoint import InnerProblem
from metadist.inner.compiled import compiler_missing
from metadist.inner.engine import Engine, TaskGradients, choose_strategy
from metadist.inner.functional import FunctionalModel, Tensors
from metadist.inner.gradients import gradients

__all__ = [
    "Engine",
    "FunctionalModel",
    "InnerProblem",
    "TaskGradients",
    "Tensors",
    "choose_strategy",
    "compiler_missing",
    "gradients",
]
