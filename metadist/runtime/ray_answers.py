"""Workers as the driver knows them, and waiting for what they answer: by Ray, over channels, or both at a time."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
from ray import ObjectRef
from ray.exceptions import GetTimeoutError, RayError

from metadist.rounds import Lease
from metadist.runtime import channel
from metadist.runtime.channel import Channel, Line
from metadist.runtime.ray_calls import kill
from metadist.runtime.ray_server import RayServer
from metadist.runtime.ray_worker import Cut
from metadist.runtime.shared import Area

_LOOKS_S, _SELDOM_LOOKS_S = 0.002, 0.02
"""How often answers that come by Ray are looked for while others come through channels, and workers that start."""
_COMPANY_S = 0.004
"""How long a small gradient waits for others to be sent with it."""
_COMPANY = 8
"""How many answers have to be out for it to wait at all: with fewer, a message less is worth less than the wait."""


@dataclass(eq=False)
class Handle:
    """A worker: the line to its actor, what it was asked, the node it is on, whether it is to go.

    ``near`` says which shards of the server ``reached`` it shares memory with, as far as it has ``reaching`` answered.
    Nobody reads any more what lies in the areas ``done``. Of an answer that comes over a channel, the channel's call is
    the reference.
    """

    line: Line
    starting: ObjectRef | None
    answers: dict[ObjectRef, tuple[Lease, list[Cut], list[ObjectRef]]] = field(default_factory=dict)
    node: str = ""
    pid: int = 0
    leaving: bool = False
    reached: RayServer | None = None
    reaching: ObjectRef | None = None
    near: list[bool] = field(default_factory=list)
    done: list[Area] = field(default_factory=list)

    @property
    def awaited(self) -> list[ObjectRef]:
        """What it has to answer: that it is ready, or leases."""
        return [self.starting] if self.starting else list(self.answers)

    def end(self) -> None:
        """Ends the process."""
        kill(self.line.by_ray())


def arrived(handles: Iterable[Handle], server: RayServer | None, timeout: float) -> dict[ObjectRef, Any]:
    """The references that workers have answered, with what they said; waits up to ``timeout`` seconds for one.

    A value is left out (None) where one of them cannot be had: each is to be asked by itself then.

    Args:
        handles: the workers.
        server: to which small gradients go; what waits there for others is sent before nothing more may come.
        timeout: seconds.
    """
    handles = list(handles)
    waiting = [ref for handle in handles for ref in handle.awaited]
    if not waiting:
        time.sleep(min(timeout, 0.1))
        return {}
    channels = {h.line.channel.call: h.line.channel for h in handles if h.line.channel and h.answers}
    if channels:
        if server is not None and server.holds_back:
            server.send_batch()
        others = [ref for ref in waiting if ref not in channels]
        starting = {handle.starting for handle in handles}
        look_s = _LOOKS_S if any(ref not in starting for ref in others) else _SELDOM_LOOKS_S if others else timeout
        return _by_either(channels, others, timeout, look_s)
    first: list[ObjectRef] = []
    if server is not None and server.holds_back:
        if len(waiting) >= _COMPANY:
            first, _ = ray.wait(waiting, num_returns=1, timeout=min(timeout, _COMPANY_S))
        if not first:
            server.send_batch()
    if len(waiting) == 1:
        return _answer_to(waiting[0], timeout)
    first = first or ray.wait(waiting, num_returns=1, timeout=timeout)[0]
    if not first:
        return {}
    ready, _ = ray.wait(waiting, num_returns=len(waiting), timeout=0)
    return _answers_to(list(dict.fromkeys(first + ready)))


def _by_either(
    channels: dict[ObjectRef, Channel], others: Sequence[ObjectRef], timeout: float, look_s: float
) -> dict[ObjectRef, Any]:
    """See :func:`arrived`, for answers of which some come through ``channels``, by their calls.

    ``others`` are looked for every ``look_s`` seconds.
    """
    until = time.monotonic() + timeout
    while True:
        left = max(0.0, until - time.monotonic())
        found: dict[ObjectRef, Any] = {}
        for over in channel.ready(channels.values(), min(left, look_s)):
            try:
                answer = over.answer()
            except EOFError:
                found[over.call] = None
            else:
                found |= {} if answer is None else {over.call: answer}
        if others:
            found |= _answers_to(ray.wait(list(others), num_returns=len(others), timeout=0)[0])
        if found or not left:
            # A process that was forked may hold a pipe open: its actor's end is then seen here.
            return found or {call: None for call, over in channels.items() if over.has_ended()}


def _answers_to(refs: list[ObjectRef]) -> dict[ObjectRef, Any]:
    """See :func:`arrived`, for references that are ready."""
    try:
        return dict(zip(refs, ray.get(refs), strict=True))
    except RayError:
        return dict.fromkeys(refs)


def _answer_to(ref: ObjectRef, timeout: float) -> dict[ObjectRef, Any]:
    """See :func:`arrived`, for one reference: an exchange less with Ray's own."""
    try:
        return {ref: ray.get(ref, timeout=timeout)}
    except GetTimeoutError:
        return {}
    except RayError:
        return {ref: None}
