"""Peers: each used for MAML as its own documentation shows, on the same plain PyTorch network.

Where an example of theirs keeps the graphs of all tasks and goes backwards once, ours goes backwards after each task:
the same sum, faster and in far less memory. Every maker takes a job and returns the call that is timed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from metadist.errors import first_line
from tools.bench.adaptation_parts.plain_mann import plain_mann
from tools.bench.adaptation_parts.workloads import Call, Job, Tensors, Workload

# ------------------------------------------------------------------ packages


class _Anything:
    """Stands for whatever a peer takes from a package that this benchmark does not need."""

    def __init__(self, *args: Any, **options: Any) -> None: ...


class _StandIn(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {})


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds what peers import for their data sets and environments alone, also where it is installed and broken."""

    roots = ("torchvision", "gym", "h5py", "qpth", "cvxpy", "scipy", "sklearn", "pandas", "pytorch_lightning")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.roots:
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


@contextmanager
def _stand_ins() -> Iterator[None]:
    finder, before = _StandIns(), set(sys.modules)
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - before:
            if isinstance(sys.modules[name], _StandIn):
                del sys.modules[name]


def import_peer(folder: Path, name: str) -> types.ModuleType:
    """A peer's package, from the folder it was installed to (or from the environment).

    Raises:
        ImportError: it is not there, or does not work with what is.
    """
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # last, so that nothing of the environment is shadowed
    try:
        with _stand_ins():
            return importlib.import_module(name)
    except Exception as e:
        raise ImportError(f"{name} does not import ({type(e).__name__}: {first_line(e)})") from e


# ------------------------------------------------------------------ the peers


def learn2learn(job: Job, package: Any) -> Call:
    w, net = job.workload, job.module()
    maml = package.algorithms.MAML(net, lr=w.inner_lr, first_order=w.first_order)

    def call() -> Tensors:
        net.zero_grad(set_to_none=True)
        for support_x, support_y, query_x, query_y in job.tasks():
            task = maml.clone()
            for _ in range(w.steps):
                task.adapt(w.loss(task(support_x), support_y))
            w.loss(task(query_x), query_y).backward()
        return _grads(net)

    return call


def higher(job: Job, package: Any) -> Call:
    w, net = job.workload, job.module()
    names = [n for n, _ in net.named_parameters()]
    optimizer = torch.optim.SGD(net.parameters(), lr=w.inner_lr)

    def adapted_loss(task: tuple[Tensor, ...], record: bool) -> tuple[Tensor, list[Tensor]]:
        support_x, support_y, query_x, query_y = task
        with package.innerloop_ctx(net, optimizer, copy_initial_weights=False, track_higher_grads=record) as (f, inner):
            for _ in range(w.steps):
                inner.step(w.loss(f(support_x), support_y))
            return w.loss(f(query_x), query_y), list(f.parameters())

    def second_order() -> Tensors:
        net.zero_grad(set_to_none=True)
        for task in job.tasks():
            adapted_loss(task, True)[0].backward()
        return _grads(net)

    def first_order() -> Tensors:
        total: list[Tensor] | None = None
        for task in job.tasks():
            # Without tracking, the adapted weights have no history: the slope there is the first-order one.
            grads = torch.autograd.grad(*adapted_loss(task, False))
            total = list(grads) if total is None else [a + b for a, b in zip(total, grads, strict=True)]
        assert total is not None
        return dict(zip(names, total, strict=True))

    return first_order if w.first_order else second_order


def torchopt(job: Job, package: Any) -> Call:
    w, net = job.workload, job.module()
    inner = package.MetaSGD(net, lr=w.inner_lr)
    start = package.extract_state_dict(net, by="reference", detach_buffers=True)
    inner_start = package.extract_state_dict(inner, by="reference")

    def call() -> Tensors:
        net.zero_grad(set_to_none=True)
        for support_x, support_y, query_x, query_y in job.tasks():
            for _ in range(w.steps):
                inner.step(w.loss(net(support_x), support_y))
            w.loss(net(query_x), query_y).backward()
            package.recover_state_dict(net, start)
            package.recover_state_dict(inner, inner_start)
        return _grads(net)

    return call


def torchmeta(job: Job, package: Any) -> Call:
    w, net = job.workload, _meta_module(job, importlib.import_module("torchmeta.modules"))
    update = package.utils.gradient_based.gradient_update_parameters

    def call() -> Tensors:
        net.zero_grad(set_to_none=True)
        for support_x, support_y, query_x, query_y in job.tasks():
            params = None
            for _ in range(w.steps):
                loss = w.loss(net(support_x, params=params), support_y)
                params = update(net, loss, params=params, step_size=w.inner_lr, first_order=w.first_order)
            w.loss(net(query_x, params=params), query_y).backward()
        return _grads(net)

    return call


def _meta_module(job: Job, modules: Any) -> nn.Module:
    """The network out of torchmeta's layers, with the names and values of the plain one."""
    makers = {nn.Conv2d: modules.MetaConv2d, nn.BatchNorm2d: modules.MetaBatchNorm2d, nn.Linear: modules.MetaLinear}

    def converted(module: nn.Module) -> nn.Module:
        if isinstance(module, nn.Sequential):
            return modules.MetaSequential(OrderedDict((k, converted(m)) for k, m in module.named_children()))
        if isinstance(module, nn.Conv2d):
            return makers[nn.Conv2d](
                module.in_channels, module.out_channels, module.kernel_size, padding=module.padding, bias=False
            )
        if isinstance(module, nn.BatchNorm2d):
            return makers[nn.BatchNorm2d](module.num_features, track_running_stats=False)
        if isinstance(module, nn.Linear):
            return makers[nn.Linear](module.in_features, module.out_features)
        return module

    class Network(modules.MetaModule):  # type: ignore[misc]
        def __init__(self, plain: nn.Module) -> None:
            super().__init__()
            for name, child in plain.named_children():
                setattr(self, name, converted(child))

        def forward(self, x: Tensor, params: Any = None) -> Tensor:
            for name, child in self.named_children():
                x = child(x.flatten(1) if name == "head" else x, params=self.get_subdict(params, name))
            return x

    net = Network(job.module()).to(job.device, job.dtype)
    net.load_state_dict(job.params)
    return net


def parallel_metalearn(job: Job, package: Any) -> Call:
    w, parts = job.workload, {n: importlib.import_module(f"metalearn.{n}") for n in
                              ("nn_models.basic_layers.BatchNormalization", "model_wrappers", "inner_optimizers",
                               "loss", "algorithms")}  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(job.dtype)  # its inner rate is made in the default
    try:
        net = _with_norm(job.module(), parts["nn_models.basic_layers.BatchNormalization"].BatchNorm)
        model = parts["model_wrappers"].MAML_Model(*_body_and_head(net))
        inner = parts["inner_optimizers"].InnerSGD(
            model.get_fast_weights(), first_order=w.first_order, inner_lr=w.inner_lr, learn_lr=False
        )
    finally:
        torch.set_default_dtype(before)
    for part in (model, inner):
        part.to(job.device)
    learner = parts["algorithms"].MAML(
        model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), inner_optimizer=inner,
        support_loss_fn=_its_loss(w, parts["loss"]), inner_steps=w.steps, chunk_size=len(job.batch),
    )  # fmt: skip
    support_x, support_y, query_x, query_y = job.stacked()
    batch = support_x, {"labels": support_y}, query_x, {"labels": query_y}

    def call() -> Tensors:
        learner.step(iter([batch]))
        grads = (p.grad for p in model.parameters())  # of the mean over tasks, in the order of the plain network
        return {k: g * len(job.batch) for k, g in zip(job.params, grads, strict=True)}

    return call


def _with_norm(net: nn.Module, norm: Any) -> nn.Module:
    """The network with the package's own BatchNorm, as its own networks have it.

    Through torch's, vectorised as the package does, the second derivatives lack the statistics' part.
    """
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                own = norm(child.num_features, eps=child.eps, track_running_stats=False)
                own.load_state_dict(child.state_dict())
                setattr(module, name, own)
    return net


def _body_and_head(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    class Deaf(nn.Module):
        """A plain module that takes the package's keywords and needs none of them."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor, **_: Any) -> Tensor:
            return self.module(x)

    if hasattr(net, "blocks"):
        return Deaf(net.blocks), Deaf(net.head)  # type: ignore[arg-type]
    layers: Any = net.layers
    return Deaf(nn.Sequential(*layers[:-1])), Deaf(layers[-1])


def _its_loss(workload: Workload, package: Any) -> nn.Module:
    if workload.ways:
        return package.CrossEntropy(metric_fn=package.CategoricalAccuracy())

    class SquaredError(package.BaseLoss):  # type: ignore[misc, name-defined]
        def forward(self, out_dict: Any, targets: Any, model_states: Any = None, **_: Any) -> tuple[Tensor, Tensor]:
            loss = workload.loss(out_dict["logits"], targets["labels"])
            return loss, loss.detach()

    return SquaredError()


def torch_func(job: Job, _: Any) -> Call:
    """All tasks under one vmap of a gradient through gradients, as functorch's own example has it."""
    w, net = job.workload, job.module()
    params = {k: v.detach() for k, v in net.named_parameters()}

    def loss(params: Tensors, x: Tensor, y: Tensor) -> Tensor:
        return w.loss(functional_call(net, params, (x,)), y)

    def task_loss(params: Tensors, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Tensor:
        fast = params
        for _ in range(w.steps):
            slope = grad(loss)(fast, support_x, support_y)
            fast = {k: v - w.inner_lr * (slope[k].detach() if w.first_order else slope[k]) for k, v in fast.items()}
        return loss(fast, query_x, query_y)

    of_all_tasks = vmap(grad(task_loss), in_dims=(None, 0, 0, 0, 0))
    return lambda: {k: v.sum(0) for k, v in of_all_tasks(params, *job.stacked()).items()}


def _grads(net: nn.Module) -> Tensors:
    return {k: p.grad for k, p in net.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------ the list

_GRADIENTS = ("E", "for learners that adapt by gradient steps")


@dataclass(frozen=True)
class Peer:
    """One peer.

    Args:
        name: as in the results.
        package: what is imported; empty if it is made of torch alone.
        make: from a job and the package to the call that is timed.
        on: families of workloads it can do.
        lacks: why it is left out of a family, by letter.
    """

    name: str
    package: str
    make: Callable[[Job, Any], Call]
    on: str = "ABCD"
    lacks: tuple[tuple[str, str], ...] = (_GRADIENTS,)

    def reason(self, family: str) -> str:
        """Why it is left out of a family; empty if it is not."""
        return "" if family in self.on else dict(self.lacks)[family]


PEERS: tuple[Peer, ...] = (
    Peer("learn2learn 0.2.0", "learn2learn", learn2learn),
    Peer("higher 0.2.1", "higher", higher),
    Peer("TorchOpt 0.7.3", "torchopt", torchopt, "ACD",
         (("B", "MetaSGD always records the second-order graph"), _GRADIENTS)),
    Peer("torchmeta 1.8.0", "torchmeta", torchmeta),
    Peer("parallel-metalearn 0.5.6", "metalearn", parallel_metalearn),
    Peer("torch.func recipe", "", torch_func),
    Peer("plain LSTMCell loop", "", lambda job, _: plain_mann(job), "E",
         tuple((f, "for sequences") for f in "ABCD")),
)  # fmt: skip


def make_peer(peer: Peer, job: Job, folder: Path) -> Call:
    """The peer's meta-gradient of the job.

    Raises:
        ImportError: its package does not import.
    """
    return peer.make(job, import_peer(folder, peer.package) if peer.package else None)
