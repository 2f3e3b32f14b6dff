"""What every section of a config is made of."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ByteSize, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def in_words(size: int) -> str:
    """A number of bytes for people, as ``engine.memory`` takes it: ``4.0GB``."""
    return ByteSize(size).human_readable(decimal=True)


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class CustomConfig(Section):
    """Your own: a class or function named by import_path."""

    type: Literal["custom"] = "custom"
    import_path: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", description="package.module:Name")
    args: dict[str, Any] = Field(default_factory=dict, description="keyword arguments for it")


class PythonConfig(Section):
    """An object passed to `metadist.train` from Python that has no import path, such as a lambda."""

    type: Literal["python"] = "python"
    name: str = Field(description="how the object calls itself")
