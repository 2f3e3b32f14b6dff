"""Channels: messages between the driver and an actor of its node, through pipes and past Ray.

A call takes Ray a millisecond there and back, and time of a dozen threads in three processes; a message through a pipe
takes a twentieth of that. Ray starts the actors, tells of their end, and makes the calls that are seldom or go to other
nodes: an actor attends a channel within one long call, which ends when the driver hangs up or is gone.

Like :mod:`metadist.runtime.shared`, a pipe has no name and is opened as what another process has open, so nothing is
left of it however its processes end; and the end of one is seen by the other at once.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import stat
import struct
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import ray
from ray import ObjectRef
from ray.actor import ActorHandle
from ray.exceptions import RayError

MOST = 1 << 15
"""Bytes of a message that surely finds room in a pipe, so that the driver need not wait for who reads it."""
_LENGTH = struct.Struct("<I")
_PIECE = 1 << 16
_OPENED_WITHIN_S, _LOOKS_S = 1.0, 0.05
_AGAIN_S = 30.0
"""How soon an actor that did not open its end in time is asked to again; each time it does not, in twice the time."""


class _Pipe(NamedTuple):
    """An end of a pipe that a process has open: its descriptor there, and what tells this pipe from others."""

    descriptor: int
    device: int
    inode: int

    @classmethod
    def of(cls, descriptor: int) -> _Pipe:
        found = os.fstat(descriptor)
        return cls(descriptor, found.st_dev, found.st_ino)

    def opened(self, pid: int, flags: int) -> int:
        """A descriptor of the same pipe in this process.

        Raises:
            OSError: process ``pid`` cannot be seen from here, or is another one than was meant.
        """
        path = f"/proc/{pid}/fd/{self.descriptor}"
        found = os.stat(path)
        if not stat.S_ISFIFO(found.st_mode) or (found.st_dev, found.st_ino) != (self.device, self.inode):
            raise OSError(f"{path} is not the pipe that was meant")
        return os.open(path, flags)


class Place(NamedTuple):
    """Where an actor finds its ends of a channel: the driver's process, what it reads and what it writes."""

    pid: int
    orders: _Pipe
    answers: _Pipe


class Channel:
    """The driver's end of a channel, over which one thing at a time is asked.

    Args:
        attend: calls the actor's method that hands its argument to :func:`attend`.

    Raises:
        TimeoutError: the actor did not open it in time.
        OSError: the actor cannot open it.

    ``call`` is the call in which the actor attends. Where that ends before an answer has come, it says how.
    """

    def __init__(self, attend: Callable[[Place], ObjectRef]) -> None:
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        os.set_blocking(self._answers, False)
        self._come = bytearray()
        try:
            self.call = attend(Place(os.getpid(), _Pipe.of(orders), _Pipe.of(answers)))
            self._wait_until_opened()
        except BaseException:
            self.hang_up()
            raise
        finally:
            # The actor has its own by now; with these, its end would not be seen.
            os.close(orders)
            os.close(answers)

    def _wait_until_opened(self) -> None:
        until = time.monotonic() + _OPENED_WITHIN_S
        while self.answer() is None:
            if time.monotonic() > until:
                raise TimeoutError("the actor did not open the channel in time")
            if ray.wait([self.call], timeout=0)[0]:
                raise OSError("the actor cannot open the channel")
            ready([self], _LOOKS_S)

    def fileno(self) -> int:
        """What is readable when an answer has come, or the end."""
        return self._answers

    def ask(self, message: bytes) -> None:
        """Sends a message of up to :data:`MOST` bytes. If nobody is there, :meth:`answer` will say so."""
        with contextlib.suppress(BrokenPipeError):
            _send(self._orders, message)

    def answer(self) -> bytes | None:
        """The answer, if it has come as a whole.

        Raises:
            EOFError: the actor attends no more.
        """
        ended = False
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._answers, _PIECE):
                self._come += piece
            ended = True
        if len(self._come) >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._come)
            if len(self._come) >= _LENGTH.size + length:
                answer = bytes(self._come[_LENGTH.size : _LENGTH.size + length])
                del self._come[: _LENGTH.size + length]
                return answer
        if ended:
            raise EOFError
        return None

    def has_ended(self) -> bool:
        """Whether the actor attends no more, asked of Ray."""
        try:
            return bool(ray.wait([self.call], timeout=0)[0])
        except RayError:
            return True

    def hang_up(self) -> None:
        """Ends the actor's call, once it has answered what it was asked."""
        for descriptor in (self._orders, self._answers):
            os.close(descriptor)


class Line:
    """A way to an actor of the driver's: calls by Ray, or messages over a channel, never both at a time.

    Args:
        actor: which has a method ``attend(place)`` that hands it to :func:`attend`.

    ``called`` says whether it was called by Ray; whoever wants to know from when on resets it.
    """

    _clock = staticmethod(time.monotonic)

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor
        self.channel: Channel | None = None
        self.called = False
        self._not_before, self._again_s = 0.0, _AGAIN_S

    def by_channel(self) -> Channel | None:
        """Its channel, opened if need be; None if it cannot be opened. The actor is idle, and on the driver's node."""
        if self.channel is None and self._clock() >= self._not_before:
            try:
                self.channel = Channel(self._actor.attend.remote)
            except TimeoutError:  # the machine is busy
                self._not_before, self._again_s = self._clock() + self._again_s, 2.0 * self._again_s
            except OSError:
                self._not_before = math.inf
        return self.channel

    def by_ray(self) -> ActorHandle:
        """The actor, for calls, which a channel would be in the way of."""
        self.called = True
        if self.channel is not None:
            self.channel.hang_up()
            self.channel = None
        return self._actor


def ready(channels: Iterable[Channel], timeout: float) -> list[Channel]:
    """Those on which an answer comes, or the end; waits up to ``timeout`` seconds for one."""
    poll, by_descriptor = select.poll(), {channel.fileno(): channel for channel in channels}
    for descriptor in by_descriptor:
        poll.register(descriptor, select.POLLIN)
    return [by_descriptor[descriptor] for descriptor, _ in poll.poll(1e3 * timeout)]


def attend(place: Place, answer: Callable[[bytes], bytes]) -> bool:
    """Answers what is asked over a channel until the driver hangs up; False if it cannot be opened.

    Args:
        place: of the channel.
        answer: makes the answer. What it raises ends the call, and comes to the driver as that call's error.
    """
    with contextlib.ExitStack() as stack:
        try:
            orders = place.orders.opened(place.pid, os.O_RDONLY)
            stack.callback(os.close, orders)
            answers = place.answers.opened(place.pid, os.O_WRONLY)
            stack.callback(os.close, answers)
        except OSError:
            return False
        message: bytes | None = b""
        while message is not None:
            told = answer(message) if message else b""  # which says that it is open
            try:
                _send(answers, told)
            except BrokenPipeError:
                break
            message = _received(orders)
    return True


def _send(descriptor: int, message: bytes) -> None:
    left = memoryview(_LENGTH.pack(len(message)) + message)
    while left:
        left = left[os.write(descriptor, left) :]


def _received(descriptor: int) -> bytes | None:
    """A message; None at the end."""
    head = _exactly(descriptor, _LENGTH.size)
    return None if head is None else _exactly(descriptor, _LENGTH.unpack(head)[0])


def _exactly(descriptor: int, size: int) -> bytes | None:
    come = b""
    while len(come) < size:
        piece = os.read(descriptor, size - len(come))
        if not piece:
            return None
        come += piece
    return come
