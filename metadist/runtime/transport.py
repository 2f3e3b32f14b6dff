"""How gradients come from the actors that compute them to those that add them up."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import ray
import torch

from metadist.errors import ClusterError
from metadist.outer.gradient import Block

Gradients = Mapping[Block, np.ndarray]


class Transport(Protocol):
    """A way between actors. Whoever computes packs, whoever adds up unpacks; the driver hands on what was packed.

    It is pickled into the actors, so it holds nothing that lives in one process.

    ``options`` are those that actors at its ends need. What is lost on the way, with the process that packed it, is
    told by ``unpack`` raising a :class:`ray.exceptions.RayError`: the microbatches in it are then computed again.
    """

    options: Mapping[str, Any]
    within_messages: bool
    """Whether what is small goes within messages, so that nothing of it is lost with a process."""
    shares_memory: bool
    """Whether processes of one node hand each other what lies in memory they share, and nothing is packed for them."""

    def check(self) -> None:
        """Called in the process of each worker, and of each shard of the server, before it has anything to do.

        Raises:
            ClusterError: it does not work there.
        """

    def pack(self, gradients: Gradients) -> Any:
        """What an actor returns for ``gradients``, flat arrays of float32 or, of half the bytes, uint16."""

    def unpack(self, packed: Any) -> Gradients:
        """The gradients again, to be read alone."""


class ObjectStore:
    """Ray's object store: read without a copy on the node they were computed on, sent once to any other."""

    options: Mapping[str, Any] = {}
    within_messages = True
    shares_memory = False

    def check(self) -> None:
        """It is always there."""

    def pack(self, gradients: Gradients) -> Gradients:
        """As they are: what an actor returns is put into the store."""
        return gradients

    def unpack(self, packed: Gradients) -> Gradients:
        """As they are."""
        return packed


class NodeMemory(ObjectStore):
    """Memory that the processes of a node share; the object store between nodes."""

    shares_memory = True


class Nixl:
    """NIXL by Ray's direct transport: read from the memory of the process that computed them, by RDMA where there is.

    One-sided: when a process dies nobody else does, and nothing but what lay in it is lost.
    """

    options: Mapping[str, Any] = {"enable_tensor_transport": True}
    within_messages = False
    shares_memory = False

    def check(self) -> None:
        """See :meth:`Transport.check`."""
        if importlib.util.find_spec("nixl") is None:
            raise ClusterError(
                "runtime.transport",
                "is nixl, but the package nixl is not installed where the workers and the server run",
                "pip install nixl on every node, or write transport: object_store",
            )

    def pack(self, gradients: Gradients) -> list[Any]:
        """A reference to them, in this process's memory; the list keeps Ray from looking it up for who gets it."""
        tensors = {block: torch.from_numpy(np.ascontiguousarray(v)) for block, v in gradients.items()}
        return [ray.put(tensors, _tensor_transport="nixl")]

    def unpack(self, packed: list[Any]) -> Gradients:
        """Fetches them."""
        return {b: v.numpy() for b, v in ray.get(packed[0]).items()}


def transport_named(name: str) -> Transport:
    """The transport of ``runtime.transport``."""
    kinds: dict[str, type[Transport]] = {"auto": NodeMemory, "object_store": ObjectStore, "nixl": Nixl}
    return kinds[name]()
