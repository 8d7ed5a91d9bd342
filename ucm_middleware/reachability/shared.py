"""What the process has for everybody: there the walk ends, for all subclasses too."""

import asyncio
import concurrent.futures
import contextvars
import datetime
import decimal
import logging
import pathlib
import selectors
import ssl
import threading
import uuid
from typing import Final

from ucm_middleware.isolation import SINGLETONS, Shared

INERT: Final = frozenset(
    map(
        id,
        (
            *(*SINGLETONS, Shared, datetime.tzinfo, pathlib.PurePath, uuid.UUID, contextvars.ContextVar),
            *(logging.Logger, logging.Handler, ssl.SSLContext, concurrent.futures.Executor),
            *(asyncio.AbstractEventLoop, asyncio.AbstractServer, selectors.BaseSelector),
            # They order what users do one after the other, and hold no data. Events, conditions and queues may tell.
            *(type(threading.Lock()), type(threading.RLock()), asyncio.Lock, asyncio.Semaphore),
            *(threading.Semaphore, threading.Thread, decimal.Context),
        ),
    )
)
"""By id: immutable by their contract, or the process's."""

INERT_NAMES: Final = frozenset(
    {
        *("starlette.applications.Starlette", "starlette.routing.Router", "starlette.routing.BaseRoute"),
        *("uvicorn.config.Config", "uvicorn.server.Server", "uvicorn.server.ServerState"),
        *("hypercorn.config.Config", "websockets.asyncio.server.Server"),
        *("opentelemetry.sdk.trace.TracerProvider", "opentelemetry.sdk.trace.SpanProcessor"),
        *("opentelemetry.sdk.resources.Resource", "opentelemetry.sdk.trace.SpanLimits"),
        *("opentelemetry.sdk.util.instrumentation.InstrumentationScope",),
        *("opentelemetry.sdk.util.instrumentation.InstrumentationInfo", "unittest.mock._SentinelObject"),
    }
)
"""By name, so that none of them is imported here: servers, applications, what records spans, constants."""

PACKAGE: Final = f"{__name__.partition('.')[0]}."
"""This package's own objects: managers, what marks the ambient context. Contexts and handles are met before."""

TYPING: Final = frozenset({"typing", "typing_extensions"})
"""``Optional[int]`` and its like, which are cached."""
