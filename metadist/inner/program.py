"""A function of tensors as one traced graph: run as it is, or compiled by inductor.

Deriving a meta-gradient, transform within transform, costs more than the small operators it ends in. So it is derived
once: traced down to single operators with every derivative written out, after which only those run. Inductor then may
compile the graph, which takes a minute or two and pays where many small operators can be joined; where a few of the
package's own kernels do the work, the traced graph alone is as fast within seconds. (``torch.compile`` by itself cannot
differentiate twice.)
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import operator
import os
import shutil
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from metadist.inner.replay import replayed

Compile = Literal[False, True, "trace"]


class Program:
    """``fn`` traced once for each set of shapes.

    Tracing fixes every branch that ``fn`` takes, so ``fn`` must not branch on tensor values.

    Args:
        fn: ``fn(shared, tasks)``, nested tensors both, gives nested tensors; without side effects.
        inductor: compile what is traced.
        recompute: let ``fn`` compute a thing twice, as the adjoint form does with every inner step so as not to keep
            them all. Otherwise whatever is computed twice is computed once and kept. In both cases, what depends on
            ``tasks`` alone is computed once.
    """

    def __init__(self, fn: Callable[[Any, Any], Any], inductor: bool, recompute: bool) -> None:
        self.fn, self.inductor, self.recompute = fn, inductor, recompute
        self._programs: dict[Any, tuple[Callable[..., Any], pytree.TreeSpec]] = {}

    def __call__(self, shared: Any, tasks: Any) -> Any:
        flat, spec = pytree.tree_flatten((shared, tasks))
        key = (spec, tuple((tuple(t.shape), t.dtype, t.device) for t in flat))
        if key not in self._programs:
            self._programs[key] = self._prepare(flat, spec, len(pytree.tree_leaves(tasks)))
        program, out_spec = self._programs[key]
        with torch.no_grad():
            return pytree.tree_unflatten(program(*flat), out_spec)

    @property
    def shapes(self) -> int:
        """How many sets of shapes it was traced for."""
        return len(self._programs)

    def _prepare(
        self, flat: list[Tensor], spec: pytree.TreeSpec, data: int
    ) -> tuple[Callable[..., Any], pytree.TreeSpec]:
        graph, out_spec = trace(self.fn, flat, spec)
        merge_duplicates(graph, data, everything=not self.recompute)
        with torch.no_grad():
            return replayed(_compiled(graph, flat) if self.inductor else graph, flat), out_spec


def _compiled(graph: fx.GraphModule, flat: list[Tensor]) -> Callable[..., Any]:
    """The graph compiled by inductor, whose cache on disk outlives the process.

    Processes of a machine that want the same graph at the same time take turns: the first compiles it, the others
    find it in the cache.
    """
    program = torch.compile(graph, dynamic=False)
    with alone(graph.code + str([(t.shape, t.dtype, t.device) for t in flat])):
        program(*flat)
    return program


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Within it, no other process of this machine and user is within it for the same ``what``."""
    # Here and not above: it takes a second and more, which processes that compile nothing need not spend.
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    name = hashlib.sha256(what.encode()).hexdigest()[:32]
    folder = Path(cache_dir())
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / f"metadist-{name}.lock", os.O_CREAT | os.O_RDWR)
    except OSError:  # nothing can be kept there: each compiles for itself
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # let go by the system, should the process be killed
        yield
    finally:
        os.close(lock)


def trace(fn: Callable[..., Any], flat: list[Tensor], spec: pytree.TreeSpec) -> tuple[fx.GraphModule, pytree.TreeSpec]:
    """``fn`` as a graph of operators that change nothing in place, from flat inputs to flat outputs; and their tree."""
    trees: list[pytree.TreeSpec] = []

    def flattened(*tensors: Tensor) -> list[Tensor]:
        leaves, tree = pytree.tree_flatten(fn(*pytree.tree_unflatten(list(tensors), spec)))
        trees.append(tree)
        return leaves

    # Of shapes alone: nothing is computed, and no memory taken for values, of which a trace would keep all. The mode is
    # one for everything; left to itself the tracer makes one for each value, which takes half of the time.
    with tracing(TracingContext(FakeTensorMode(allow_fallback_kernels=True, allow_non_fake_inputs=True))):
        traced = functools.partial(make_fx, tracing_mode="fake", _allow_non_fake_inputs=True)
        graph = traced(flattened)(*flat)
        if any(_mutable(n.target) for n in graph.graph.nodes):
            # Only now, as autograd functions of one's own cannot be made functional while they are traced.
            graph = traced(functionalize(graph, remove="mutations"))(*flat)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph, trees[-1]


def merge_duplicates(module: fx.GraphModule, data: int, everything: bool) -> None:
    """Lets operators that repeat an earlier one with the same inputs take its result.

    Args:
        module: the graph, changed in place.
        data: how many of the last inputs are data.
        everything: or only operators of whose inputs none but data and constants are part.
    """
    inputs = [n for n in module.graph.nodes if n.op == "placeholder"]
    learned = set(inputs[: len(inputs) - data])
    seen: dict[Hashable, fx.Node] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not _repeatable(node.target):
            continue
        if any(n in learned for n in node.all_input_nodes):
            learned.add(node)
            if not everything:
                continue
        # The kinds count too: 1, 1.0 and True are equal.
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
        key = (node.target, str(spec), tuple((type(leaf), leaf) for leaf in leaves))
        if (earlier := seen.setdefault(key, node)) is not node:
            node.replace_all_uses_with(earlier)
            module.graph.erase_node(node)
    module.recompile()


def _repeatable(target: Any) -> bool:
    """Whether an operator gives the same for the same inputs and touches nothing else."""
    if target is operator.getitem:
        return True
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return not _mutable(target) and torch.Tag.nondeterministic_seeded not in target.tags


def _mutable(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def compiler_missing() -> str:
    """Why code cannot be compiled on this machine; empty if it can."""
    if torch.cuda.is_available() and importlib.util.find_spec("triton") is None:
        return "no Triton was found"
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        found = shutil.which(get_cpp_compiler())
    except Exception as e:
        return f"no C++ compiler was found ({type(e).__name__})"
    return "" if found else "no C++ compiler was found"
