"""What else moves gradients and weights: Ray's parameter-server example, its empty calls, and gloo's all-reduce."""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch

from metadist.allreduce import join, meeting_place
from tools.bench.distribution_parts.emulated import gradient, numbers, shapes

_PATIENCE_S = 1800.0


def _as_tensors(flat: np.ndarray, model: str) -> list[np.ndarray]:
    found, at = [], 0
    for shape in shapes(model):
        size = int(np.prod(shape))
        found.append(flat[at : at + size].reshape(shape))
        at += size
    return found


@ray.remote(num_cpus=0)
class ExampleServer:
    """As in Ray's parameter-server example: state dicts out, lists of arrays in, stacked and summed."""

    def __init__(self, model: str) -> None:
        torch.set_num_threads(1)
        self.params = {f"p{i}": torch.nn.Parameter(torch.zeros(s)) for i, s in enumerate(shapes(model))}
        self.optimizer = torch.optim.Adam(self.params.values(), lr=1e-3)

    def get_weights(self) -> dict[str, torch.Tensor]:
        return {k: v.detach() for k, v in self.params.items()}

    def apply_gradients(self, *gradients: list[np.ndarray]) -> dict[str, torch.Tensor]:
        summed = [np.stack(same).sum(axis=0) / len(gradients) for same in zip(*gradients, strict=True)]
        for parameter, g in zip(self.params.values(), summed, strict=True):
            parameter.grad = torch.from_numpy(g)
        self.optimizer.step()
        return self.get_weights()

    def nothing(self, *answers: Any) -> None:
        """An empty call."""


@ray.remote(num_cpus=1)
class ExampleWorker:
    """Its worker, whose gradient is made up once. It can also take part in an all-reduce."""

    def __init__(self, model: str, number: int) -> None:
        torch.set_num_threads(1)
        self.flat = gradient(numbers(model), number)
        self.gradients = _as_tensors(self.flat, model)
        self.params = {f"p{i}": torch.zeros(s) for i, s in enumerate(shapes(model))}

    def compute_gradients(self, weights: dict[str, torch.Tensor]) -> list[np.ndarray]:
        for k, v in weights.items():
            self.params[k].copy_(v)
        return self.gradients

    def nothing(self, weights: Any) -> None:
        """An empty call."""

    def meeting_place(self) -> int:
        """The port where a process group meets."""
        self.store = meeting_place("127.0.0.1")
        return self.store.port

    def join(self, rank: int, world: int, port: int) -> None:
        """Becomes a member of a process group."""
        join("127.0.0.1", port, rank, world, _PATIENCE_S, None if rank else self.store)

    def all_reduce(self, times: int) -> np.ndarray | None:
        """Sums everybody's gradient, ``times`` over; the first numbers of the sum."""
        buffer = torch.empty(len(self.flat))  # not kept: sixteen of 100 MB leave little room for the others
        for _ in range(times):
            buffer.copy_(torch.from_numpy(self.flat))
            torch.distributed.all_reduce(buffer)
        return buffer[:1000].numpy().copy()

    def leave(self) -> None:
        """Ends the membership."""
        torch.distributed.destroy_process_group()


class Example:
    """Server and workers of the example, driven as the example drives them.

    Args:
        model: see :func:`~tools.bench.distribution_parts.emulated.shapes`.
        workers: how many.
    """

    def __init__(self, model: str, workers: int) -> None:
        self.server = ExampleServer.remote(model)  # type: ignore[attr-defined]
        self.workers = [ExampleWorker.remote(model, i) for i in range(workers)]  # type: ignore[attr-defined]
        port = ray.get(self.workers[0].meeting_place.remote())
        ray.get([w.join.remote(i, workers, port) for i, w in enumerate(self.workers)])
        self.weights = self.server.get_weights.remote()
        self.blank = self.server.nothing.remote()

    def step(self) -> None:
        """One update."""
        gradients = [w.compute_gradients.remote(self.weights) for w in self.workers]
        self.weights = self.server.apply_gradients.remote(*gradients)
        ray.wait([self.weights], fetch_local=False)

    def empty_step(self) -> None:
        """The calls of an update of ours that carry nothing: a lease and its sum for each worker, a commit."""
        answers = [w.nothing.remote(self.blank) for w in self.workers]
        open_ = list(answers)
        adding = []
        while open_:
            done, open_ = ray.wait(open_, num_returns=1)
            adding += [self.server.nothing.remote(ref) for ref in done]
        self.blank = self.server.nothing.remote()
        ray.get([*adding, self.blank])

    def all_reduce(self, times: int) -> np.ndarray:
        """``times`` sums over all workers; the first numbers of the last."""
        found = ray.get([w.all_reduce.remote(times) for w in self.workers])
        return np.asarray(found[0])

    def flat_weights(self) -> np.ndarray:
        """The server's parameters as one vector."""
        return np.concatenate([v.numpy().ravel() for v in ray.get(self.weights).values()])

    def close(self) -> None:
        """Ends the actors."""
        ray.get([w.leave.remote() for w in self.workers])
        for actor in [*self.workers, self.server]:
            ray.kill(actor)
