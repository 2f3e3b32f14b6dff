"""One replica: adapts, answers, forgets. Ray Serve runs as many as are wanted."""

from __future__ import annotations

import asyncio
import hmac
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from ray import serve
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from torch import Tensor

from metadist.adapting import adapted_model, reading_of
from metadist.api import AdaptedModel, Learner
from metadist.checkpoint import LATEST
from metadist.episode import Examples
from metadist.finished import load_learner
from metadist.serving.adapters import AdapterStore
from metadist.serving.page import page
from metadist.serving.requests import Limits, Reader, Refused

_ROUTES = "GET /, GET /health, POST /adapters, POST /adapters/ID/predict and DELETE /adapters/ID"
_MODELS_HELD = 64
_TOGETHER, _WAIT_S = 16, 0.004


@dataclass(frozen=True)
class Settings:
    """What a replica is told.

    Args:
        run_dir: of the run.
        folder: of the adapters, seen by all replicas.
        checkpoint: see :func:`metadist.finished.load_learner`.
        token: that requests must bear; empty: none.
        adapters: at a time.
        expire_s: seconds for which one is kept.
        limits: of a request.
        code: whether the run's own code may be imported.
    """

    run_dir: Path
    folder: Path
    checkpoint: str = LATEST
    token: str = ""
    adapters: int = 1000
    expire_s: float = 3600.0
    limits: Limits = field(default_factory=Limits)
    code: bool = False


@dataclass(frozen=True)
class _Held:
    """An adapted learner in memory, and when it is no longer answered for, in seconds since 1970."""

    model: AdaptedModel
    classes: list[str]
    expires: float


class Replica:
    """Answers requests; see :mod:`metadist.cli_serve` for the routes."""

    def __init__(self, settings: Settings) -> None:
        torch.set_num_threads(1)
        self.settings = settings
        learner, experiment, checkpoint = load_learner(
            settings.run_dir, {"code": settings.code}, settings.checkpoint
        )
        inputs, tokens = reading_of(experiment)
        self.reader = Reader(inputs, tokens, settings.limits)
        self.learner = Learner(settings.run_dir, learner, checkpoint.meta_params, checkpoint.version)
        self.most_classes = None if learner.any_ways else inputs.classes
        self.apart = learner.model.batchnorm == "transductive"
        self.store = AdapterStore(settings.folder, settings.adapters, settings.expire_s)
        # A network is called with one adapter's parameters at a time: they are put into it for the call.
        self._network = threading.Lock()
        self._models: OrderedDict[str, _Held] = OrderedDict()

    async def __call__(self, request: Request) -> Response:
        try:
            return await self._answer(request)
        except Refused as e:
            return JSONResponse({"error": e.why}, e.status)

    async def _answer(self, request: Request) -> Response:
        parts = [p for p in request.url.path.split("/") if p]
        match request.method, parts:
            case "GET", []:
                return HTMLResponse(page(self.reader, self.settings.run_dir.name, bool(self.settings.token)))
            case "GET", ["health"]:
                return JSONResponse(self._health())
            case "POST", ["adapters"]:
                return await self._adapt(await self._body(request))
            case "POST", ["adapters", name, "predict"]:
                return await self._predict(name, await self._body(request))
            case "DELETE", ["adapters", name]:
                self._admit(request)
                self._models.pop(name, None)
                if not self.store.remove(name):
                    raise _unknown()
                return Response(status_code=204)
        raise Refused(404, f"there are {_ROUTES}")

    def _health(self) -> dict[str, Any]:
        return {
            "run": self.settings.run_dir.name, "version": self.learner.version, "process": os.getpid(),
            "examples": self.reader.field, "inputs": list(self.reader.inputs.x), "most_classes": self.most_classes,
        }  # fmt: skip

    def _admit(self, request: Request) -> None:
        """Lets in who bears the token.

        Raises:
            Refused: with 401.
        """
        wanted = self.settings.token
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if wanted and not hmac.compare_digest(given.encode(), wanted.encode()):
            raise Refused(401, "send the token as `Authorization: Bearer TOKEN`")

    async def _body(self, request: Request) -> bytes:
        self._admit(request)
        most, parts, held = self.settings.limits.body_bytes, [], 0
        async for part in request.stream():
            held += len(part)
            if held > most:
                raise Refused(413, f"a request of more than {most} bytes")
            parts.append(part)
        return b"".join(parts)

    # ----------------------------------------------------------------- adapt, predict

    async def _adapt(self, body: bytes) -> Response:
        x, y, classes = await asyncio.to_thread(self.reader.support, body)
        if self.most_classes is not None and len(classes) > self.most_classes:
            raise Refused(400, f"{len(classes)} classes, and the run's network answers with one of {self.most_classes}")
        model = await asyncio.to_thread(self._adapted, x, y, len(classes))
        kept = await asyncio.to_thread(self.store.put, x, y, classes)
        if kept is None:
            raise Refused(503, f"there are {self.settings.adapters} adapters already; delete one, or come back later")
        name, expires = kept
        self._hold(name, _Held(model, classes, expires))
        until = datetime.fromtimestamp(expires, UTC).isoformat(timespec="seconds")
        counts = {c: int((y == i).sum()) for i, c in enumerate(classes)}
        return JSONResponse({"adapter": name, "classes": counts, "expires": until}, 201)

    async def _predict(self, name: str, body: bytes) -> Response:
        x = await asyncio.to_thread(self.reader.query, body)
        found = await self.together((name, x))
        if isinstance(found, Refused):
            raise found
        scores, classes = found
        rows = scores[:, : len(classes)].softmax(-1).tolist()
        told = [
            {"class": classes[row.index(max(row))], "probabilities": dict(zip(classes, row, strict=True))}
            for row in rows
        ]
        return JSONResponse({"predictions": told})

    @serve.batch(max_batch_size=_TOGETHER, batch_wait_timeout_s=_WAIT_S)
    async def together(self, asked: list[tuple[str, Tensor]]) -> list[Any]:
        """Requests that come at the same time; those of one adapter in one call, if they cannot disturb each other."""
        return await asyncio.to_thread(self._answers, asked)

    def _answers(self, asked: list[tuple[str, Tensor]]) -> list[Any]:
        groups: dict[Any, list[int]] = {}
        for place, (name, _) in enumerate(asked):
            groups.setdefault((name, place) if self.apart else name, []).append(place)
        answers: list[Any] = [None] * len(asked)
        for places in groups.values():
            name, xs = asked[places[0]][0], [asked[p][1] for p in places]
            try:
                held = self._model(name)
                with self._network, torch.no_grad():
                    scores, classes = held.model(torch.cat(xs)).split([len(x) for x in xs]), held.classes
            except Refused as e:
                scores, classes = [e] * len(places), []  # type: ignore[assignment]
            except ValueError:
                why = "one example, which the run normalises by the others it is asked about; send several at once"
                scores, classes = [Refused(400, why)] * len(places), []  # type: ignore[assignment]
            for place, score in zip(places, scores, strict=True):
                answers[place] = score if isinstance(score, Refused) else (score, classes)
        return answers

    def _model(self, name: str) -> _Held:
        """The adapted learner of an id, made again where this replica does not hold it.

        Raises:
            Refused: there is none, or it has expired.
        """
        held = self._models.get(name)
        if held is None:
            stored = self.store.get(name)
            if stored is None:
                raise _unknown()
            model = self._adapted(stored.x, stored.y, len(stored.classes))
            held = _Held(model, stored.classes, stored.expires)
        elif held.expires < time.time() or not self.store.holds(name):  # another replica may have forgotten it
            self._models.pop(name, None)
            raise _unknown()
        self._hold(name, held)
        return held

    def _adapted(self, x: Tensor, y: Tensor, ways: int) -> AdaptedModel:
        with self._network:
            return adapted_model(self.learner, Examples(x, y), ways)

    def _hold(self, name: str, held: _Held) -> None:
        """Keeps it as the one used last; what was used longest ago goes."""
        self._models.pop(name, None)  # it may have been forgotten in between
        self._models[name] = held
        while len(self._models) > _MODELS_HELD:
            self._models.popitem(last=False)


def _unknown() -> Refused:
    return Refused(404, "there is no such adapter, or it has expired; POST /adapters makes one")


def deployed(settings: Settings, replicas: int, queued: int) -> Any:
    """The application for ``serve.run``: what comes beyond ``queued`` requests that wait is answered with 503."""
    made: Callable[..., Any] = serve.deployment(Replica)
    return made.options(  # type: ignore[attr-defined]
        num_replicas=replicas, max_ongoing_requests=2 * _TOGETHER, max_queued_requests=queued,
        ray_actor_options={"num_cpus": 1},
    ).bind(settings)  # fmt: skip


