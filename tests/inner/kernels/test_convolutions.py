"""Which convolutions are computed how, and that a network learns the same whichever it is."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from metadist.algorithms import MAML, resolve_objective
from metadist.episode import EpisodeBatch, Examples
from metadist.inner import Engine, FunctionalModel
from metadist.inner.kernels import AsProducts, columns, taps, winograd
from metadist.models import Conv4


@pytest.mark.parametrize(
    ("call", "taken"),
    [
        (lambda x, w: F.conv2d(x, w), "winograd"),
        (lambda x, w: F.conv2d(x, w, padding=(2, 0)), "winograd"),
        (lambda x, w: F.conv2d(x.repeat(1, 1, 3, 3), w, torch.ones(8)), "winograd"),
        (lambda x, w: F.conv2d(x[:, :2], w[:, :2]), "columns"),
        (lambda x, w: F.conv2d(x.repeat(1, 1, 3, 3)[:, :2], w[:, :2]), "columns"),
        (lambda x, w: F.conv2d(x, w, stride=2, padding=(1, 0)), "taps"),
        (lambda x, w: F.conv2d(x, w, None, [2], [1]), "taps"),
        (lambda x, w: F.conv2d(x, w[:, :, :2]), "taps"),
        (lambda x, w: F.conv2d(x.repeat(1, 1, 5, 5), w, stride=2), "taps"),
        (lambda x, w: F.conv2d(x.repeat(1, 1, 5, 5)[:, :6], w[:, :6], stride=2), "torch"),
        (lambda x, w: F.conv2d(x.half(), w.half(), stride=2).float(), "columns"),
        (lambda x, w: F.conv2d(x, w, padding=3), "taps"),
        (lambda x, w: F.conv2d(x, w, padding="same"), "torch"),
        (lambda x, w: F.conv2d(x, w, dilation=2), "torch"),
        (lambda x, w: F.conv2d(x[0], w), "torch"),
        (lambda x, w: F.conv2d(x, w[:, :4], groups=2), "torch"),
    ],
)
def test_what_is_taken_over_and_what_is_left_to_torch(call, taken, monkeypatch) -> None:
    seen: list[str] = []
    for module, name in ((columns, "columns"), (taps, "taps"), (winograd, "winograd")):
        real = module.convolution
        monkeypatch.setattr(module, "convolution", lambda *a, real=real, name=name: seen.append(name) or real(*a))
    x, w = torch.randn(2, 8, 9, 9), torch.randn(8, 8, 3, 3)
    with AsProducts(fast=True):
        made = call(x, w)
    torch.testing.assert_close(made, call(x, w), rtol=1e-4, atol=1e-4)
    assert seen == ([taken] if taken != "torch" else [])
    with AsProducts():
        call(x, w)
    assert not {"winograd", "taps"} & {*seen[1:]}


def network(downsample: str) -> nn.Module:
    whole = Conv4(1, 5, filters=8, downsample=downsample)
    return nn.Sequential(*list(whole.blocks)[:2], nn.Flatten(), nn.Linear(8 * (9 if downsample == "stride" else 4), 5))


@pytest.mark.parametrize(
    ("how", "downsample", "fused", "compile", "batchnorm"),
    [
        ("columns", "stride", False, False, "transductive"),
        pytest.param("columns", "stride", False, True, "transductive", marks=pytest.mark.slow),
        ("columns", "stride", True, "trace", "running"),
        ("winograd", "stride", True, "trace", "transductive"),
        ("winograd", "max_pool", False, "trace", "transductive"),
        ("winograd", "max_pool", True, False, "running"),
        ("winograd", "max_pool", True, "trace", "transductive"),
        ("winograd", "max_pool", True, "trace", "inductive"),
        pytest.param("winograd", "max_pool", True, True, "transductive", marks=pytest.mark.slow),
        ("direct", "max_pool", True, False, "inductive"),
    ],
)
def test_the_meta_gradient_of_a_convolutional_network_is_the_same(how, downsample, fused, compile, batchnorm) -> None:
    torch.manual_seed(0)
    # Pictures of a size that pooling does not divide; two of Conv4's blocks, which are traced in half the time.
    module = network(downsample)
    x = torch.rand(2, 10, 1, 10, 9, dtype=torch.float64)
    y = torch.arange(5).repeat(2, 2)
    batch = EpisodeBatch(Examples(x[:, :5], y[:, :5]), Examples(x[:, 5:], y[:, 5:]))
    results = []
    for options, traced in (({}, False), ({"convolution": how, "fused_norm": fused}, compile)):
        model = FunctionalModel(module, dtype=torch.float64, batchnorm=batchnorm, **options)
        engine = Engine("vectorised", compile=traced)
        learner = MAML(inner_lr=0.1, inner_steps=1 if compile is True else 2)
        learner.bind(model, resolve_objective("auto", y[0]), engine)
        results.append(learner.meta_gradient(learner.initial_meta_params(), batch))
    for name, value in results[0].gradient.items():
        torch.testing.assert_close(results[1].gradient[name], value, rtol=1e-8, atol=1e-11)
    for name, value in results[0].metrics.items():
        torch.testing.assert_close(results[1].metrics[name], value, rtol=1e-8, atol=1e-11)
