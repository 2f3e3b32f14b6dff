"""Access tokens of Ray clusters: used where a cluster asks for one, and in words where it refuses.

A process that uses a token also asks for it whoever calls it back. A cluster without tokens does not send any, so its
calls are refused, and each actor is lost as it begins: a token that is at hand is no reason to use it.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from metadist.errors import ClusterError

_MODE = "RAY_AUTH_MODE"
_turned_on_here = False


@contextlib.contextmanager
def turned_on_by_ray() -> Iterator[None]:
    """For starting a cluster, which turns tokens on for the whole process: remembers whether it did."""
    global _turned_on_here
    given = _MODE in os.environ
    yield
    _turned_on_here = _turned_on_here or (not given and _MODE in os.environ)
    _protect_token()


def use_token_given() -> bool:
    """Sends a token that is at hand, unless RAY_AUTH_MODE says what to do; True if it does so from now on."""
    global _turned_on_here
    if _MODE in os.environ:
        return False
    with contextlib.suppress(ImportError):  # a Ray without tokens
        from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available

        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        _turned_on_here = maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
    return _turned_on_here


def forget_token() -> None:
    """Sends none from now on, unless RAY_AUTH_MODE was set by whoever started this process."""
    global _turned_on_here
    if not _turned_on_here:
        return
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    os.environ.pop(_MODE, None)
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
    _turned_on_here = False


def token_refusal(address: str, error: Exception) -> ClusterError | None:
    """What a cluster that wants a token says, as an error of ours; None of other errors."""
    if type(error).__name__ != "AuthenticationError":  # a Ray without tokens has no such class
        return None
    if "missing or incorrect" in str(error):
        problem = "asks for a token, and none was given or a wrong one"
    else:
        none = "issing" in str(error)
        problem = "asks for a token, and none was given" if none else "does not take the token that was given"
    return ClusterError(
        address,
        problem,
        "set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a file, to the token with which the cluster was started",
    )


def _protect_token() -> None:
    """Ray writes the cluster's access token readable by every user of the machine."""
    with contextlib.suppress(OSError):
        token = Path.home() / ".ray" / "auth_token"
        if token.exists():
            token.chmod(0o600)
