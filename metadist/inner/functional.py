"""A module as a pure function of its parameters: what every inner loop differentiates."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from metadist.inner.batchnorm import MEAN, VAR, BatchNormMode, Pass, adopt_batchnorm, fuse_norms
from metadist.inner.kernels import AsProducts, Convolution
from metadist.inner.precision import RoundedProducts

Tensors = dict[str, Tensor]

_RANDOM = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.RReLU)


class FunctionalModel:
    """``module`` with its parameters taken out; calling it changes nothing.

    Args:
        module: any module; it is copied, so the one passed in stays as it is.
        device: where the calls run.
        dtype: of floating-point parameters and buffers; None leaves them.
        batchnorm: whose statistics normalise whom, see :mod:`metadist.inner.batchnorm`. In every mode they
            are per task, so that a task's result does not depend on the tasks computed beside it.
        convolution: ``direct``, torch's own; ``columns``, products of matrices for small pictures; or ``winograd``,
            Winograd's form where it applies and sums in registers elsewhere (:mod:`metadist.inner.kernels`).
        fused_norm: compute BatchNorm with the ReLU and the pooling that follow it by one operator, where it can be had.
        products: the dtype that the factors of products are rounded to (:mod:`metadist.inner.precision`); None: as
            they are.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        batchnorm: BatchNormMode = "transductive",
        convolution: Convolution = "direct",
        fused_norm: bool = False,
        products: torch.dtype | None = None,
    ) -> None:
        self.module, self.device = copy.deepcopy(module), torch.device(device)
        self.norms = adopt_batchnorm(self.module, batchnorm)
        self.module.to(device=device, dtype=dtype)
        if fused_norm:
            fuse_norms(self.module, self.device)
        self.batchnorm: str = batchnorm if self.norms else "none"
        """The mode, or ``none`` for a model without BatchNorm."""
        self.convolution, self.products = convolution, products
        self.module.train()
        self.still: frozenset[str] = frozenset()
        """Parameters with respect to which nobody wants a slope: none is computed, it is zero."""
        self._seen: Tensors | None = None
        self.buffers: Tensors = {k: v.detach() for k, v in self.module.named_buffers()}

    def initial_params(self) -> Tensors:
        """The module's parameters, each a detached copy."""
        return {k: v.detach().clone() for k, v in self.module.named_parameters()}

    def let_go_of_initial_params(self) -> None:
        """From now on the module's own parameters have their shapes but take no memory: calls bring their own."""
        for parameter in self.module.parameters():
            parameter.data = parameter.data.new_zeros(()).expand(parameter.shape)

    def __call__(
        self,
        params: Mapping[str, Tensor],
        x: Tensor,
        *,
        reference: Tensor | None = None,
        step: int = 0,
        evaluation: bool = False,
    ) -> Tensor:
        """The module's output.

        Args:
            params: the module's parameters and, in modes ``running`` and ``stored``, its statistics.
            x: inputs, ``[examples, ...]``.
            reference: the support set's inputs; their statistics normalise ``x`` in mode ``inductive``.
            step: inner steps made so far, for what there is one of for each step.
            evaluation: in use, not learning: dropout and the like are off, and in mode ``running`` the running
                statistics normalise.
        """
        if self.module.training == evaluation:
            self.module.train(not evaluation)
        rows = len(reference) if reference is not None and self.batchnorm == "inductive" else 0
        if rows:
            x = torch.cat([reference, x])  # type: ignore[list-item]
        now = Pass(rows, step, self.batchnorm == "stored" or (evaluation and self.batchnorm == "running"), self._seen)
        for norm in self.norms:
            norm.now = now
        if self.still:
            params = {k: v.detach() if k in self.still else v for k, v in params.items()}
        with self._ways():
            output = functional_call(self.module, {**self.buffers, **params}, (x,), strict=True)
        return output[rows:] if rows else output

    @contextmanager
    def _ways(self) -> Iterator[None]:
        """Within it, torch computes as the model is told to."""
        with contextlib.ExitStack() as ways:
            if self.products is not None:
                ways.enter_context(RoundedProducts(self.products))
            if self.convolution != "direct":
                # Entered last, it is asked first: what it makes products of is rounded as any product.
                ways.enter_context(AsProducts(fast=self.convolution == "winograd"))
            # Of the forms of attention only this one can be differentiated twice.
            ways.enter_context(sdpa_kernel(SDPBackend.MATH))
            ways.enter_context(_layer_by_layer())
            yield

    @property
    def dtype(self) -> torch.dtype:
        """Of the module's floating-point parameters."""
        return next((p.dtype for p in self.module.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def random(self) -> bool:
        """Whether a call draws random numbers (dropout), so that two calls differ."""
        return any(isinstance(m, _RANDOM) and getattr(m, "p", 1) > 0 for m in self.module.modules())

    # ----------------------------------------------------------------- in two parts

    def cut_at(self, head: str) -> None:
        """Makes :meth:`features` and :meth:`classify` available: the model before its last layer, and that layer.

        Args:
            head: name of the layer.
        """
        self._head = head
        self.head_params = tuple(k for k, _ in self.module.named_parameters() if k.startswith(head + "."))

    def features(self, params: Mapping[str, Tensor], x: Tensor, **how: Any) -> Tensor:
        """What goes into the last layer, ``[examples, features]``; arguments as of a call."""
        parent, _, name = self._head.rpartition(".")
        owner = self.module.get_submodule(parent)
        head = getattr(owner, name)
        setattr(owner, name, nn.Identity())
        try:
            return self({k: v for k, v in params.items() if k not in self.head_params}, x, **how)
        finally:
            setattr(owner, name, head)

    def classify(self, params: Mapping[str, Tensor], features: Tensor) -> Tensor:
        """The last layer's output for ``features``."""
        return self.part(self._head, params, features)

    def part(self, name: str, params: Mapping[str, Tensor], *inputs: Tensor) -> Tensor:
        """The output of the submodule ``name`` alone, for ``inputs`` of its own."""
        own = {k[len(name) + 1 :]: v for k, v in params.items() if k.startswith(name + ".")}
        with self._ways():
            return functional_call(self.module.get_submodule(name), own, inputs, strict=True)

    # ----------------------------------------------------------------- BatchNorm

    def initial_statistics(self, steps: int) -> Tensors:
        """Statistics before the first update: ``[steps, channels]`` each of mode ``running``, one row of ``stored``."""
        rows = steps if self.batchnorm == "running" else 1
        return {name: self.buffers[name].repeat(rows, 1) for name in self.statistics}

    @property
    def statistics(self) -> tuple[str, ...]:
        """Names of the statistics that stand among the parameters."""
        kept = self.norms if self.batchnorm in ("running", "stored") else ()
        return tuple(norm.name + part for norm in kept for part in (MEAN, VAR))

    def averages(self) -> dict[str, float]:
        """Names of the statistics that move while learning, with the rate of each."""
        if self.batchnorm != "running":
            return {}
        return {norm.name + part: norm.momentum for norm in self.norms for part in (MEAN, VAR)}

    @contextmanager
    def recording(self) -> Iterator[Tensors]:
        """Within it, calls leave their batches' statistics in the dict it gives, by the names of the averages.

        It stays empty but in mode ``running``. Read it where the call was made: inside the same
        ``torch.func`` transform.
        """
        seen: Tensors = {}
        self._seen = seen if self.batchnorm == "running" else None
        try:
            yield seen
        finally:
            self._seen = None


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Within it, a transformer's layers in use are computed as while learning: their one operator knows no vmap."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
