"""Calls of the parameter server's shards, by Ray or over channels, and what it means when one fails."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from metadist.errors import ServerLostError, first_line
from metadist.runtime import channel
from metadist.runtime.channel import Line

Asked = ObjectRef | Line
"""What an answer comes by: a reference, or a line's channel."""


class Shards:
    """The actors of a server, each with a method ``answer(message)``.

    Args:
        actors: they, each with a part of the parameters.
        timeout_s: how long an answer is waited for.

    ``homes`` are the nodes that they are on, once that is known.
    """

    def __init__(self, actors: Sequence[ActorHandle], timeout_s: float) -> None:
        self._lines = [Line(actor) for actor in actors]
        self._timeout_s = timeout_s
        self._here = ray.get_runtime_context().get_node_id()
        self.homes: list[str] = []

    def actors(self) -> list[ActorHandle]:
        """All, to be called by Ray."""
        return [line.by_ray() for line in self._lines]

    def actor(self, shard: int) -> ActorHandle:
        """One, to be called by Ray."""
        return self._lines[shard].by_ray()

    def ask(self, messages: Sequence[bytes], far: bool = False) -> tuple[list[Asked], list[ObjectRef | None]]:
        """Asks each shard something.

        It is asked over a channel, if it was not called since :meth:`begin_anew`: it would be again.

        Args:
            messages: one for each shard.
            far: whether what they return beside their answers is wanted.

        Returns:
            What the answers come by, and references to what comes beside them.
        """
        asked = [self._ask(shard, message, far) for shard, message in enumerate(messages)]
        return [by for by, _ in asked], [beside for _, beside in asked]

    def _ask(self, shard: int, message: bytes, far: bool) -> tuple[Asked, ObjectRef | None]:
        line, on_this_node = self._lines[shard], bool(self.homes) and self.homes[shard] == self._here
        if on_this_node and not far and not line.called and len(message) <= channel.MOST:
            over = line.by_channel()
            if over is not None:
                over.ask(message)
                return line, None
        call: Any = line.by_ray().answer
        if not far:
            return call.remote(message), None
        told, beside = call.options(num_returns=2).remote(message)
        return told, beside

    def told(self, asked: Sequence[Asked], sure: Sequence[ObjectRef] = ()) -> list[bytes]:
        """The answers to :meth:`ask`; waits until what is ``sure`` to come has come as well.

        Raises:
            ServerLostError: a shard does not answer.
        """
        refs = [ref for ref in asked if not isinstance(ref, Line)]
        try:
            by_ray = iter(self.got([*sure, *refs])[len(sure) :] if sure or refs else [])
            return [self._over(line) if isinstance(line, Line) else next(by_ray) for line in asked]
        except BaseException:
            # Of some the answer has not been heard: it must not be taken for that to another question.
            self.actors()
            raise

    def _over(self, line: Line) -> bytes:
        """The answer that comes over a line's channel."""
        over, until = line.channel, time.monotonic() + self._timeout_s
        assert over is not None, "it was asked over it"
        while True:
            try:
                answer = over.answer()
                ended = answer is None and not channel.ready([over], min(1.0, self._timeout_s)) and over.has_ended()
            except EOFError:
                answer, ended = None, True
            if answer is not None:
                return answer
            if ended:
                self.got([over.call])
                raise ServerLostError("parameter server", "has stopped answering")
            if time.monotonic() > until:
                raise silent(self._timeout_s)

    def begin_anew(self) -> None:
        """Calls by Ray that were made before do not count any more: see :meth:`ask`."""
        for line in self._lines:
            line.called = False

    def got(self, refs: Any, timeout_s: float | None = None) -> Any:
        """What references to answers of shards stand for.

        Raises:
            ServerLostError: a shard does not answer.
        """
        timeout_s = timeout_s or self._timeout_s
        try:
            return ray.get(refs, timeout=timeout_s)
        except GetTimeoutError as e:
            raise silent(timeout_s) from e
        except RayTaskError as e:
            raise cause_of(e) from e
        except RayError as e:
            raise server_is_gone(e) from e


def silent(seconds: float) -> ServerLostError:
    """The error of a server that has not answered for so long."""
    return ServerLostError("parameter server", f"has not answered for {seconds:g} s")


def server_is_gone(error: RayError) -> ServerLostError:
    """The error of a server that cannot be reached any more, or of its weights."""
    return ServerLostError("parameter server", f"is gone ({first_line(error).split('. ')[0]})")


def cause_of(error: RayTaskError) -> BaseException:
    """The error as it was raised in the actor."""
    cause = error.cause if isinstance(getattr(error, "cause", None), BaseException) else None
    return cause if cause is not None else error


def kill(actor: ActorHandle) -> None:
    """Ends an actor, whatever state it is in."""
    with contextlib.suppress(Exception):
        ray.kill(actor)
