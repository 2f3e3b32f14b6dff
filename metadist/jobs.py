"""Jobs of a Ray cluster: the way to its dashboard, and what one asks of a job there."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from metadist.errors import ClusterError, ConfigError, first_line
from metadist.runtime.tokens import token_refusal, use_token_given

ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray's own, in the order in which it looks at them."""

_POLL_S = 1.0
_AGENT_TIMEOUT_S = 120.0
_CONNECT_TIMEOUT_S = 10.0
_ANSWER_TIMEOUT_S = 60.0
_SILENCE_S = 60.0

_TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.working_dir",
    "ray._private.runtime_env.packaging",
)

Out = Callable[[str], None]


class Jobs:
    """The jobs of one cluster.

    Args:
        address: of its dashboard, ``http://HOST:8265``; None takes what :data:`ADDRESS_VARIABLES` name.

    Raises:
        ConfigError: no address is given.
        ClusterError: no dashboard answers there, its Ray is of another version, or it wants a token.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or next((v for n in ADDRESS_VARIABLES if (v := os.environ.get(n))), "")
        if not self.address:
            raise ConfigError(
                "--address", "is not given", f"name the dashboard, http://HOST:8265, or set {ADDRESS_VARIABLES[0]}"
            )
        _check_reachable(self.address)
        self._client = _client(self.address)

    def send(self, entrypoint: str, runtime_env: dict[str, Any], metadata: Mapping[str, str]) -> str:
        """Submits a job; a head that has just started has no agent to take it for some seconds.

        Returns:
            The job's id.
        """
        deadline = time.monotonic() + _AGENT_TIMEOUT_S
        while True:
            with self._asking("the cluster did not take the job"):
                try:
                    return str(
                        self._client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env, metadata=dict(metadata))
                    )
                except RuntimeError as e:
                    if "No available agent" not in str(e) or time.monotonic() > deadline:
                        raise
            time.sleep(_POLL_S)

    def follow(self, job: str, out: Out) -> bool:
        """Hands on what the job's log gains until the job is over; whether it succeeded."""
        from aiohttp import ClientError

        shown, silent_since = 0, time.monotonic()

        async def tail() -> None:
            nonlocal shown, silent_since
            seen = 0
            async for text in self._client.tail_job_logs(job):
                if len(new := text[max(shown - seen, 0) :]):  # after a loss of the line it comes from the start again
                    out(new)
                    shown += len(new)
                seen += len(text)
                silent_since = time.monotonic()

        while True:
            try:
                _interruptible(lambda: asyncio.run(tail()))
                if self.details(job).status.is_terminal():
                    break
            except (OSError, RuntimeError, ClusterError, ClientError) as e:
                if _gone(e):
                    raise
                if time.monotonic() - silent_since > _SILENCE_S:
                    raise ClusterError(
                        self.address,
                        f"has not answered for {_SILENCE_S:.0f} s ({first_line(e)}); job {job} may still run",
                        f"see with `metadist submit logs {job} --follow --address {self.address}`",
                    ) from e
            time.sleep(_POLL_S)
        if len(log := self.logs(job)) > shown:
            out(log[shown:])
        return bool(self.details(job).status.value == "SUCCEEDED")

    def details(self, job: str) -> Any:
        """Ray's ``JobDetails``."""
        with self._asking("did not tell of the job", job):
            return self._client.get_job_info(job)

    def all(self) -> list[Any]:
        """Ray's ``JobDetails`` of all that were submitted, the newest first."""
        with self._asking("did not tell of its jobs"):
            found = [j for j in self._client.list_jobs() if j.submission_id]
        return sorted(found, key=lambda j: -(j.start_time or 0))

    def logs(self, job: str) -> str:
        """What the job has written so far."""
        with self._asking("did not give the log", job):
            return str(self._client.get_job_logs(job))

    def stop(self, job: str) -> bool:
        """Asks the job to end: it finishes its step and writes a checkpoint; False if it had ended."""
        with self._asking("did not stop the job", job):
            return bool(self._client.stop_job(job))

    @contextlib.contextmanager
    def _asking(self, failure: str, job: str | None = None) -> Iterator[None]:
        from ray.exceptions import RayError

        try:
            yield
        except (OSError, RuntimeError, ValueError, RayError) as e:
            if job is not None and "does not exist" in str(e):
                mend = f"see `metadist submit status --all --address {self.address}`"
                raise ClusterError(job, f"is no job of {self.address}", mend) from e
            raise token_refusal(self.address, e) or ClusterError(self.address, f"{failure} ({first_line(e)})") from e


def _interruptible(run: Callable[[], None]) -> None:
    """Calls ``run`` in a thread that dies with the process, so that Ctrl-C ends the wait whatever it is doing.

    To a coroutine Ctrl-C comes as a cancellation, which whoever reads the socket may take for a lost connection.
    """
    raised: list[BaseException] = []

    def call() -> None:
        try:
            run()
        except BaseException as e:
            raised.append(e)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
    if raised:
        raise raised[0]


def _check_reachable(address: str) -> None:
    """Fails within seconds where Ray's own client would wait for minutes."""
    parts = urlsplit(address)
    try:
        if parts.scheme in ("http", "https"):
            where = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
            socket.create_connection(where, timeout=_CONNECT_TIMEOUT_S).close()
    except (OSError, ValueError) as e:
        raise _away(address, e) from e


def _client(address: str) -> Any:
    import ray
    from ray.exceptions import RayError
    from ray.job_submission import JobSubmissionClient

    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.ERROR)
    use_token_given()

    class Client(JobSubmissionClient):
        """A dashboard that hangs is an error as well."""

        def _do_request(self, *args: Any, **options: Any) -> Any:
            return super()._do_request(*args, **{"timeout": _ANSWER_TIMEOUT_S, **options})

    try:
        with _without(ADDRESS_VARIABLES):  # Ray would take them in place of an address that is given
            client = Client(address)
    except (OSError, RuntimeError, ValueError, KeyError, RayError) as e:
        raise token_refusal(address, e) or _away(address, e) from e
    theirs = str(client._server_ray_version)
    if theirs.split(".")[:2] != ray.__version__.split(".")[:2]:
        raise ClusterError(
            address,
            f"runs Ray {theirs}, and here is Ray {ray.__version__}",
            f"run `pip install 'ray[default]=={theirs}'` here, or the other on every node",
        )
    return client


def _away(address: str, error: Exception) -> ClusterError:
    return ClusterError(
        "--address",
        f"no Ray dashboard answers at {address} ({first_line(error)})",
        "give the dashboard's address, usually http://HOST:8265, and see that the head runs its dashboard",
    )


def _gone(error: Exception) -> bool:
    return isinstance(error, ClusterError) and "is no job" in error.problem


@contextlib.contextmanager
def _without(names: tuple[str, ...]) -> Iterator[None]:
    kept = {n: os.environ.pop(n) for n in names if n in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
