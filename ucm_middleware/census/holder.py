"""Holder: one thing that still holds a context, in words and, where it can be cancelled, with the way to do that."""

from collections.abc import Callable
from dataclasses import dataclass
from types import AsyncGeneratorType, CoroutineType, FrameType, GeneratorType
from typing import Any, Literal

from ucm_middleware.threads import module_of

HolderKind = Literal["task", "timer", "thread", "executor job", "generator", "reference"]


@dataclass(frozen=True, slots=True)
class Holder:
    """What holds a context. ``name`` is the function that runs, by module and qualified name, or the path to what
    refers to the context; ``where`` the file and line it is at, empty where there is none.
    """

    kind: HolderKind
    name: str
    where: str = ""
    cancel: Callable[[], object] | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name}" + (f", at {self.where}" if self.where else "")


def running(value: object) -> tuple[str, str]:
    """The name of what a coroutine or a generator runs, and where it is."""
    kind = type(value)
    if kind is CoroutineType:
        coroutine: Any = value
        return _named(coroutine.cr_frame, coroutine.__qualname__)
    if kind is AsyncGeneratorType:
        asynchronous: Any = value
        return _named(asynchronous.ag_frame, asynchronous.__qualname__)
    if kind is GeneratorType:
        generator: Any = value
        return _named(generator.gi_frame, generator.__qualname__)
    return kind.__name__, ""


def place(frame: FrameType) -> str:
    """The file and line of a frame."""
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def _named(frame: FrameType | None, name: str) -> tuple[str, str]:
    return (name, "") if frame is None else (f"{module_of(frame)}.{name}", place(frame))
