"""What the process has for everybody: there the walk ends, for all subclasses too."""

import asyncio
import codecs
import concurrent.futures
import contextvars
import datetime
import decimal
import logging
import operator
import pathlib
import selectors
import ssl
import struct
import sys
import threading
import types
import uuid
from collections.abc import Callable, Iterable
from typing import Any, Final

from ucm_middleware.isolation import SINGLETONS, Shared

_DEEPEST: Final = 100  # of middleware in middleware
# What a class has, read from the type of types, so that neither the class nor its metaclass is asked.
mro_of: Final[Callable[[type], tuple[type, ...]]] = vars(type)["__mro__"].__get__
names_of: Final[Callable[[type], "types.MappingProxyType[str, Any]"]] = vars(type)["__dict__"].__get__

INERT: Final = frozenset(
    map(
        id,
        (
            *(*SINGLETONS, Shared, datetime.tzinfo, pathlib.PurePath, uuid.UUID, contextvars.ContextVar),
            *(logging.Logger, logging.Handler, ssl.SSLContext, concurrent.futures.Executor),
            *(asyncio.AbstractEventLoop, asyncio.AbstractServer, selectors.BaseSelector),
            # They order what users do one after the other, and hold no data. Events, conditions and queues may tell.
            *(type(threading.Lock()), type(threading.RLock()), asyncio.Lock, asyncio.Semaphore),
            *(threading.Semaphore, threading.Thread, decimal.Context, codecs.CodecInfo),
            *(operator.itemgetter, operator.attrgetter, operator.methodcaller, struct.Struct),
        ),
    )
)
"""By id: immutable by their contract, or the process's."""

INERT_NAMES: Final = frozenset(
    {
        *("starlette.applications.Starlette", "starlette.routing.Router", "starlette.routing.BaseRoute"),
        *("starlette.staticfiles.StaticFiles", "websockets.asyncio.server.Server", "websockets.sync.server.Server"),
        *("opentelemetry.sdk.trace.TracerProvider", "opentelemetry.sdk.trace.SpanProcessor"),
        *("opentelemetry.sdk.resources.Resource", "opentelemetry.sdk.trace.SpanLimits"),
        *("opentelemetry.sdk.util.instrumentation.InstrumentationScope",),
        *("opentelemetry.sdk.util.instrumentation.InstrumentationInfo", "unittest.mock._SentinelObject"),
        *("ipaddress._IPAddressBase", "email._policybase._PolicyBase", "werkzeug.local.LocalProxy"),
        *("fastapi.dependencies.models.Dependant", "pydantic_core._pydantic_core.PydanticUndefinedType"),
        *("pydantic.types._SecretBase", "pydantic.networks._BaseUrl", "pydantic_core._pydantic_core.Url"),
    }
)
"""By name, so that none of them is imported here: servers, applications, what records spans, constants."""

PACKAGES: Final = (f"{__name__.partition('.')[0]}.", "uvicorn.", "hypercorn.")
"""This package's own objects: managers, what marks the ambient context. Contexts and handles are met before. And those
of servers, of which each knows all of its connections.
"""

_EVERYBODYS: Final = (
    *(("sys", name) for name in ("stdin", "stdout", "stderr", "__stdin__", "__stdout__", "__stderr__")),
    *(("os", "environ"), ("urllib3.poolmanager", "pool_classes_by_scheme")),
)


def ends_of(applications: Iterable[object]) -> list[Any]:
    """Objects that are the process's: its streams, and of the ASGI applications what they consist of and keep."""
    found = [vars(sys.modules[module]).get(name) for module, name in _EVERYBODYS if module in sys.modules]
    waiting = [(application, 0) for application in applications]
    while waiting:
        value, depth = waiting.pop()
        own = _attributes_of(value)
        found += [value, *(item for item in own.values() if type(item) in (dict, list, set))]
        if depth < _DEEPEST:
            waiting += [(own[name], depth + 1) for name in ("app", "middleware_stack") if own.get(name) is not None]
    return [value for value in found if value is not None]


def _attributes_of(value: object) -> dict[str, Any]:
    """The dict of an object, without asking the object."""
    for base in mro_of(type(value)):
        member = names_of(base).get("__dict__")
        if type(member) is types.GetSetDescriptorType:
            own: object = member.__get__(value)
            return dict(own) if type(own) is dict else {}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    return {}


TYPING: Final = frozenset({"typing", "typing_extensions"})
"""``Optional[int]`` and its like, which are cached."""
