"""Whether Weights & Biases will take the run."""

from __future__ import annotations

import base64
import json
import os
import re
import urllib.error
import urllib.request
from collections.abc import Iterator

from metadist.doctor.findings import Finding
from metadist.doctor.place import Subject
from metadist.errors import first_line
from metadist.tracking.wandb import account_key, automatic_mode, server_url

_ASK = b'{"query": "query Viewer { viewer { username } }"}'
_LEAST_KEY = 40
_MEND = "run `wandb login` where the driver runs, or set WANDB_API_KEY, or take tracking.wandb.mode=offline"


def tracking(subject: Subject) -> Iterator[Finding]:
    """A run that is to be online has a key, and the server takes it."""
    if subject.experiment is None:
        return
    mode = subject.experiment.config.tracking.wandb.mode
    decided = automatic_mode() if mode == "auto" else mode
    if decided != "online":
        why = " (auto, and no account is set up)" if mode == "auto" and decided == "offline" else ""
        later = "; `wandb sync` sends it later" if decided == "offline" else ""
        yield Finding("tracking", "ok", f"W&B is {decided}{why}{later}")
        return
    if os.environ.get("WANDB_IDENTITY_TOKEN_FILE") and not os.environ.get("WANDB_API_KEY"):
        yield Finding("tracking", "ok", "W&B is online, with an identity token")
        return
    yield from key_findings(account_key(), subject.deadline_s)


def key_findings(key: str | None, timeout_s: float) -> Iterator[Finding]:
    """What is wrong with a key, by its shape and by what the server says of it; the key itself is not told."""
    server, wanted = server_url(), "a key that the server takes, since W&B is online"
    if not key:
        yield Finding("tracking", "wrong", "no W&B key is set up", wanted, _MEND)
    elif len(key.rpartition("-")[2]) < _LEAST_KEY or not re.fullmatch(r"[\w.-]+", key):
        shape = f"has {len(key)} characters" if re.fullmatch(r"[\w.-]+", key) else "has characters that no key has"
        yield Finding("tracking", "wrong", f"the W&B key {shape}", f"{_LEAST_KEY} letters and digits or more", _MEND)
    else:
        try:
            user = _user(server, key, min(timeout_s, 20.0))
        except (OSError, ValueError, LookupError, TypeError) as e:
            mend = f"see that the driver's node reaches {server}, or take tracking.wandb.mode=offline"
            yield Finding("tracking", "wrong", f"{server} cannot be asked ({first_line(e)})", wanted, mend)
            return
        if user is None:
            yield Finding("tracking", "wrong", f"{server} refuses the W&B key", wanted, _MEND)
        else:
            yield Finding("tracking", "ok", f"W&B is online, as {user} at {server}")


def _user(server: str, key: str, timeout_s: float) -> str | None:
    """Whose key it is; None if the server does not take it."""
    word = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Authorization": f"Basic {word}", "Content-Type": "application/json", "User-Agent": "metadist-doctor"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"{server}/graphql", _ASK, headers), timeout=timeout_s
        ) as reply:
            viewer = json.loads(reply.read(1 << 16))["data"]["viewer"]
    except urllib.error.HTTPError as e:
        if e.code in (401, 403):
            return None
        raise
    return None if viewer is None else str(viewer["username"])
