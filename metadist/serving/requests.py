"""What is asked over HTTP, read and judged before anything is computed."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from metadist.adapting import as_input
from metadist.data.tokens import Tokens
from metadist.errors import DataError
from metadist.inputs import Inputs


class Refused(Exception):
    """A request that is not answered.

    Args:
        status: of HTTP.
        why: in a sentence.
    """

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status, self.why = status, why


@dataclass(frozen=True)
class Limits:
    """What a request may ask.

    Args:
        examples: of one request.
        classes: of one adapter.
        body_bytes: of one request.
    """

    examples: int = 200
    classes: int = 50
    body_bytes: int = 16 << 20


@dataclass(frozen=True)
class Reader:
    """Reads the examples of requests as a run's network takes them.

    Args:
        inputs: what they look like.
        tokens: how texts are read, if the run learned from texts.
        limits: see :class:`Limits`.
    """

    inputs: Inputs
    tokens: Tokens | None
    limits: Limits

    @property
    def field(self) -> str:
        """Where an example stands: ``picture`` in base64, or ``text``."""
        return "picture" if self.tokens is None else "text"

    def support(self, body: bytes) -> tuple[Tensor, Tensor, list[str]]:
        """Inputs, class numbers and the names of the classes.

        Raises:
            Refused: it is no support set.
        """
        examples = self._examples(body, "support", ("class", self.field))
        names = [e["class"] for e in examples]
        if any(not name.strip() or len(name) > 200 for name in names):
            raise Refused(400, "a class needs a name of 1 to 200 characters")
        classes = sorted(set(names))
        if len(classes) < 2:
            raise Refused(400, "give examples of two classes at least")
        if len(classes) > self.limits.classes:
            raise Refused(413, f"{len(classes)} classes, more than {self.limits.classes}")
        return self._read(examples), torch.tensor([classes.index(n) for n in names]), classes

    def query(self, body: bytes) -> Tensor:
        """Inputs.

        Raises:
            Refused: they are none.
        """
        return self._read(self._examples(body, "query", (self.field,)))

    def _examples(self, body: bytes, name: str, fields: Sequence[str]) -> list[dict[str, str]]:
        shape = f'{{"{name}": [{{{", ".join(f"{json.dumps(f)}: ..." for f in fields)}}}, ...]}}'
        try:
            found = json.loads(body)[name]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise Refused(400, f"wanted JSON: {shape}") from None
        if not isinstance(found, list) or not found or not all(isinstance(e, dict) for e in found):
            raise Refused(400, f"wanted JSON: {shape}")
        if len(found) > self.limits.examples:
            raise Refused(413, f"{len(found)} examples, more than {self.limits.examples}")
        for place, example in enumerate(found):
            for field in fields:
                if not isinstance(example.get(field), str):
                    raise Refused(400, f"{name}[{place}] has no text for {field!r}; wanted JSON: {shape}")
        return found

    def _read(self, examples: Sequence[dict[str, Any]]) -> Tensor:
        if self.tokens is not None:
            return torch.from_numpy(self.tokens([e["text"] for e in examples]))
        return torch.stack([self._picture(e["picture"], f"picture {i}") for i, e in enumerate(examples)])

    def _picture(self, text: str, where: str) -> Tensor:
        try:
            data = base64.b64decode(text.rpartition(",")[2], validate=True)  # a data: URL is taken as well
        except binascii.Error:
            raise Refused(400, f"{where} is not base64") from None
        try:
            return as_input(data, where, self.inputs)
        except DataError as e:
            raise Refused(400, str(e)) from None
