"""The actor that computes leases: a worker's process, what it is asked and what it answers."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from metadist.errors import ClusterError
from metadist.experiment import Experiment
from metadist.rounds import Lease
from metadist.runtime import channel
from metadist.runtime.messages import packed, unpacked
from metadist.runtime.shared import Area, Reader, Shared, SharedMemoryLost, Writer
from metadist.runtime.transport import Transport
from metadist.worker import LeaseWorker

MakeWorker = Callable[[Experiment, str], LeaseWorker]


class WorkerProcess:
    """What the actors that compute have in common: a worker, made when they are asked whether they are ready."""

    def __init__(self, experiment: Experiment, device: str, make: MakeWorker, transport: Transport) -> None:
        self._experiment, self._device, self._make, self._transport = experiment, device, make, transport
        self._reader, self._writer = Reader(), Writer()

    def ready(self) -> dict[str, Any]:
        # Not in the constructor, whose errors reach the driver as text alone.
        self._transport.check()
        if self._device == "cuda" and not torch.cuda.is_available():
            raise ClusterError(
                f"node {ray.util.get_node_ip_address()}",
                "Ray gave a worker a GPU here, but PyTorch finds none",
                "install a PyTorch on it that is built for its GPU and driver, or write runtime.gpus_per_worker=0",
            )
        self._worker = self._make(self._experiment, self._device)
        return {"node": str(ray.get_runtime_context().get_node_id()), "pid": os.getpid()}


@ray.remote
class Worker(WorkerProcess):
    def reach(self, offers: list[Shared | None]) -> list[bool]:
        """Which of these it can open, one for each shard of a server; what it has of another server is closed."""
        self._reader.keep({offer.area.pid for offer in offers if offer is not None})
        return [offer is not None and self._opens(offer) for offer in offers]

    def _opens(self, offer: Shared) -> bool:
        try:
            self._reader.read(offer)
        except SharedMemoryLost:
            return False
        return True

    def attend(self, place: channel.Place) -> bool:
        """Answers :meth:`compute` over a channel, where all weights and gradients lie in memory of the node."""
        return channel.attend(place, self.compute)

    def compute(self, message: bytes, *stored: np.ndarray) -> Any:
        """The report with the places of what is for shards that are near, and what is for each of the others.

        Args:
            message: the :class:`Order`.
            stored: weights of the shards of which its ``weights`` has none.
        """
        order: Order = unpacked(message)
        self._writer.let_go(order.done)
        rest = iter(stored)
        weights = [next(rest) if part is None else self._reader.read(part)[None] for part in order.weights]
        room = self._writer.room if all(is_near for _, _, is_near in order.cuts) else None
        report, blocks = self._worker.compute(order.lease, weights, room)
        near, far = (
            [{block: v[a:z] for block, v in blocks.items()} for a, z, is_near in order.cuts if is_near == wanted]
            for wanted in (True, False)
        )
        told = packed((report, self._writer.write(near) if near and blocks else []))
        return (told, *map(self._transport.pack, far)) if far else told


Cut = tuple[int, int, bool]
"""Where a shard's part begins and ends, and whether its gradient is to lie in memory of the node."""


class Order(NamedTuple):
    """What a worker is asked.

    Args:
        lease: what is computed.
        cuts: of the flat vector, one for each shard.
        done: areas of the worker that nobody reads any more.
        weights: where those of each shard lie, if they lie in memory of the node.
    """

    lease: Lease
    cuts: list[Cut]
    done: list[Area]
    weights: list[Shared | None]
