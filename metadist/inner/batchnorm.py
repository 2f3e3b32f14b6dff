"""BatchNorm in episodes: whose statistics normalise whom.

A few-shot result depends by points on this choice, so it is one word of the config and stands in every
evaluation (Bronskill et al. 2020, "TaskNorm", for a comparison):

``transductive``
    Every set is normalised by its own statistics; the examples of a query set are thus judged together.
``inductive``
    The query set is normalised by the statistics of the support set, so that each of its examples is
    judged alone.
``running``
    Each set by its own statistics while learning, by running averages over the tasks of training in
    evaluation and in use. One average for each inner step (Antoniou et al. 2019, section 4).
``stored``
    Each set by the statistics that the module came with, always: for pretrained networks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metadist.inner.kernels import norm, patches

BatchNormMode = Literal["transductive", "inductive", "running", "stored"]

MEAN, VAR = ".running_mean", ".running_var"


@dataclass
class Pass:
    """What one forward pass asks of every BatchNorm of a model.

    Args:
        reference: leading examples whose statistics normalise all of them; 0 for all.
        step: inner step, which picks the row of per-step weights and running statistics.
        stored: normalise by the running statistics.
        seen: receives each BatchNorm's statistics of the batch, ``[channels]``, by name.
    """

    reference: int = 0
    step: int = 0
    stored: bool = False
    seen: dict[str, Tensor] | None = None


class EpisodeNorm(nn.Module):
    """Stands in for a BatchNorm, whose parameters it takes over.

    Weight and bias may also be given as ``[steps, channels]``: a row for each inner step, of which the
    last holds for all later ones. So may the running statistics.

    Args:
        of: the BatchNorm.
        name: its name in the model.
        statistics: whether it holds statistics. They begin as those of the BatchNorm, if it has any.
    """

    def __init__(self, of: nn.modules.batchnorm._BatchNorm, name: str, statistics: bool) -> None:
        super().__init__()
        self.name, self.eps, self.channels = name, of.eps, of.num_features
        self.two_dimensional = isinstance(of, nn.BatchNorm2d)
        self.momentum = 0.1 if of.momentum is None else of.momentum
        self.weight, self.bias = of.weight, of.bias
        self.pool = 0
        """What follows is done here as well: ReLU alone (1), ReLU and 2x2 max pooling (2), nothing (0)."""
        if statistics:
            mean, var = of.running_mean, of.running_var
            self.register_buffer("running_mean", torch.zeros(1, self.channels) if mean is None else mean.clone()[None])
            self.register_buffer("running_var", torch.ones(1, self.channels) if var is None else var.clone()[None])
        self.now = Pass()

    running_mean: Tensor
    running_var: Tensor

    def forward(self, x: Tensor | Deferred) -> Tensor:
        if not self.pool or self.of_others:
            y = self._normalised(x.outputs() if isinstance(x, Deferred) else x)
            y = torch.relu(y) if self.pool else y
            return F.max_pool2d(y, 2) if self.pool == 2 else y
        weight, bias = _row(self.weight, self.now.step), _row(self.bias, self.now.step)
        assert weight is not None and bias is not None, "only a norm with both is fused"
        if isinstance(x, Deferred):
            if not patches.tracked(x.inputs):
                return self._first_block(x, weight, bias)
            x = x.outputs()
        self._note(x)
        return norm.norm_relu_pool(x, weight, bias, self.eps, self.pool)

    @property
    def of_others(self) -> bool:
        """Whether other statistics than those of all examples at hand normalise them now."""
        return bool(self.now.stored or self.now.reference)

    def _first_block(self, x: Deferred, weight: Tensor, bias: Tensor) -> Tensor:
        conv = x.conv
        windows = patches.Windows(*conv.kernel_size, *conv.stride, *conv.padding, self.pool)  # type: ignore
        y, mean, var = patches.first_block(x.inputs, conv.weight, weight, bias, self.eps, windows)
        if self.now.seen is not None:
            rows, columns = windows.outputs(*x.inputs.shape[-2:])
            n = len(x.inputs) * rows * columns
            shift = 0 if conv.bias is None else conv.bias.detach()
            self.now.seen[self.name + MEAN] = mean.detach() + shift
            self.now.seen[self.name + VAR] = var.detach() * (n / max(1, n - 1))
        return y

    def _normalised(self, x: Tensor) -> Tensor:
        now = self.now
        weight, bias = _row(self.weight, now.step), _row(self.bias, now.step)
        if now.stored:
            # Statistics are observed, not learned: an inner loop over all meta-parameters finds no slope here.
            mean, var = (_row(s.detach(), now.step) for s in (self.running_mean, self.running_var))
            return F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.eps)
        self._note(x)
        if not now.reference:
            return F.batch_norm(x, None, None, weight, bias, True, 0.0, self.eps)
        var, mean = torch.var_mean(x[: now.reference], _all_but_channels(x), correction=0, keepdim=True)
        x = (x - mean) * torch.rsqrt(var + self.eps)
        if weight is None or bias is None:
            return x
        along = [1, -1] + [1] * (x.dim() - 2)
        return x * weight.view(along) + bias.view(along)

    def _note(self, x: Tensor) -> None:
        """Leaves the batch's statistics where they are collected, if they are."""
        if self.now.seen is not None:
            var, mean = torch.var_mean(x.detach(), _all_but_channels(x))
            self.now.seen[self.name + MEAN], self.now.seen[self.name + VAR] = mean, var


class DeferredConv(nn.Module):
    """Stands in for a convolution before a BatchNorm that computes both together; has its parameters."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding

    def forward(self, x: Tensor) -> Deferred:
        return Deferred(x, self)


@dataclass(frozen=True)
class Deferred:
    """A convolution's inputs on their way to the BatchNorm after it."""

    inputs: Tensor
    conv: DeferredConv

    def outputs(self) -> Tensor:
        """What the convolution alone makes of them."""
        conv = self.conv
        return F.conv2d(self.inputs, conv.weight, conv.bias, conv.stride, conv.padding)


def _all_but_channels(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def adopt_batchnorm(module: nn.Module, mode: BatchNormMode) -> list[EpisodeNorm]:
    """Replaces every BatchNorm below ``module`` in place; returns what stands there now.

    Raises:
        ValueError: the module itself is one, or has no statistics that could be ``stored``.
    """
    found = []
    for name, child in list(module.named_modules()):
        if isinstance(child, nn.modules.batchnorm._BatchNorm):
            if not name:
                raise ValueError("the model is a single BatchNorm; wrap it in nn.Sequential")
            if mode == "stored" and child.running_mean is None:
                raise ValueError(f"{name} has no statistics of its own; choose another mode than stored")
            made = EpisodeNorm(child, name, mode in ("running", "stored"))
            parent, _, last = name.rpartition(".")
            setattr(module.get_submodule(parent), last, made)
            found.append(made)
    return found


def fuse_norms(module: nn.Module, device: torch.device) -> None:
    """Joins BatchNorm, ReLU and 2x2 max pooling that follow each other in an ``nn.Sequential`` below ``module``.

    A convolution of few numbers before them joins in. All in place, after :func:`adopt_batchnorm` and with the
    parameters where they will be; their names stay as they are.
    """
    for parent in list(module.modules()):
        if type(parent).forward is not nn.Sequential.forward:
            continue
        children: list[tuple[str, Any]] = [("", None), *parent.named_children(), ("", None), ("", None)]
        for (conv_name, conv), (_, stand_in), (relu_name, relu), (pool_name, pool) in zip(
            children, children[1:], children[2:], children[3:], strict=False
        ):
            if not (_fusible(stand_in, device) and type(relu) is nn.ReLU and not _watched(relu)):
                continue
            pools = isinstance(pool, nn.MaxPool2d) and _halves(pool) and not _watched(pool)
            stand_in.pool = 2 if pools else 1
            setattr(parent, relu_name, nn.Identity())
            if pools:
                setattr(parent, pool_name, nn.Identity())
            if _few_numbers(conv, device) and not _watched(conv):
                setattr(parent, conv_name, DeferredConv(conv))


def _fusible(module: Any, device: torch.device) -> bool:
    return (
        isinstance(module, EpisodeNorm)
        and module.two_dimensional
        and module.weight is not None
        and norm.available(device, module.weight.dtype)
        and not _watched(module)
    )


def _few_numbers(conv: Any, device: torch.device) -> bool:
    """Whether a convolution is one that :func:`~metadist.inner.kernels.patches.first_block` computes."""
    return (
        type(conv) is nn.Conv2d
        and conv.groups == 1
        and conv.dilation == (1, 1)
        and not isinstance(conv.padding, str)
        and conv.padding_mode == "zeros"
        and conv.weight[0].numel() <= patches.FEW_NUMBERS
        and patches.available(device, conv.weight.dtype)
    )


def _watched(module: nn.Module) -> bool:
    """Whether somebody hooked in between, who must see what is there."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _halves(pool: nn.MaxPool2d) -> bool:
    def both(value: object, wanted: int) -> bool:
        return value in (wanted, (wanted, wanted), [wanted, wanted])

    return (
        both(pool.kernel_size, 2) and both(pool.stride, 2) and both(pool.padding, 0) and both(pool.dilation, 1)
        and not (pool.ceil_mode or pool.return_indices)
    )  # fmt: skip


def _row(values: Tensor | None, step: int) -> Tensor | None:
    if values is None or values.dim() == 1:
        return values
    return values[min(step, values.shape[0] - 1)]
