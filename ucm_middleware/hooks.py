"""What a plugin can do: the hook specifications, one function for each.

A plugin is a module or an object whose functions carry ``@hookimpl`` and the name of a hook, and take those of its
arguments that they want. Implementations are called one after another: those of the plugin that was named first come
first, ``tryfirst`` and ``trylast`` apart.

``identify`` may be asynchronous. All others are called without awaiting and must be plain functions; a plugin whose
implementation does not fit is refused before anything is served. What an implementation raises goes to whoever
asked and fails the request; only what a notification raises is logged, and nothing more.
"""

from collections.abc import AsyncIterable, Awaitable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Final

import pluggy

if TYPE_CHECKING:
    from starlette.requests import HTTPConnection

    from ucm_middleware.agents.run import AgentRun
    from ucm_middleware.context import UserExecutionContext
    from ucm_middleware.identity import Identified
    from ucm_middleware.lifetime import CloseReason
    from ucm_middleware.transactions import IsolationLevel, Transaction
    from ucm_middleware.types import Message

PROJECT: Final = "ucm_middleware"
"""The name of the entry-point group, and of the project in pluggy's terms."""

API_VERSION: Final = 1
"""The version of this page. A plugin may say which one it was written for, as ``UCM_HOOK_API = 1``."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)
"""Marks the implementation of a hook."""

Around = AbstractAsyncContextManager[object] | None
"""What is entered before and left after; None to stay out. Its value is not used, and it cannot swallow errors."""


# The first that does not answer None decides.


@hookspec(firstresult=True)
def ucm_identify(connection: "HTTPConnection") -> "Identified | Awaitable[Identified]":
    """Who a connection comes from, when the application's own ``identify=`` does not say: a Principal or a user id.

    May be asynchronous. Refuses by raising UnauthenticatedError, or an HTTPException of Starlette's.
    """


@hookspec(firstresult=True)
def ucm_derive_key(context: "UserExecutionContext", kind: str, client_id: str) -> str | None:
    """The key under which this user's ``client_id`` of some ``kind`` (a thread, a session) is kept.

    Text that is printable and not empty, the same each time, and never another user's. It takes the place of the key
    that the secret makes, and of those under previous secrets.
    """


@hookspec(firstresult=True)
def ucm_open_transaction(
    context: "UserExecutionContext", isolation_level: "IsolationLevel | None"
) -> "Transaction | None":
    """A transaction for a context, tied to its user, which asks nothing of the database before its first statement.

    It is ended with the context, or before. ``isolation_level`` None stands for the database's own.
    """


@hookspec(firstresult=True)
def ucm_run_agent(run: "AgentRun", agent: Any, parameters: Mapping[str, Any]) -> Awaitable[object] | None:
    """Runs an agent that is of this plugin's framework, once; awaited in the context of the run. None for any other.

    Raises AgentParametersError for parameters that do not fit.
    """


@hookspec(firstresult=True)
def ucm_stream_agent(run: "AgentRun", agent: Any, parameters: Mapping[str, Any]) -> AsyncIterable[object] | None:
    """The same as a stream, which is driven by one task in the context of the run, and closed there with ``aclose``.

    What it comes to, if anything, it leaves in ``run.result``.
    """


# Each is entered in turn, and left in reverse order, whatever happens in between.


@hookspec
def ucm_around_context(context: "UserExecutionContext") -> Around:
    """Around the handling of one request or connection: entered before the application, left at the teardown.

    An anonymous context may still learn its user after the entering; ``ucm_context_bound`` says so.
    """


@hookspec
def ucm_around_message(context: "UserExecutionContext", message: "Message") -> Around:
    """Around one message of a WebSocket: from when the application receives it until it asks for the next or ends."""


@hookspec
def ucm_around_resource(context: "UserExecutionContext", name: str) -> Around:
    """Around a resource that is entered with ``enter_async_context``: from before its entering until after its exit."""


@hookspec
def ucm_around_agent_run(context: "UserExecutionContext", agent_name: str, parameters: Mapping[str, Any]) -> Around:
    """Around one run of an agent, in the child context of that run."""


# A database session, before it is handed out.


@hookspec
def ucm_bind_session(context: "UserExecutionContext", session: Any) -> None:
    """Tie a database session to the context's user, such as by a setting that row policies read.

    Called where the session is used: in a thread without an event loop, in a callback of the driver, more than once.
    What it raises keeps the session from being handed out.
    """


# What a plugin says of its framework.


@hookspec
def ucm_shared_types() -> "Iterable[type]":
    """The types whose objects users share by design, such as engines and pools: ``isolation_report`` stops at those.

    Their subclasses are meant too. Asked once, when the manager is made.
    """
    return ()


@hookspec
def ucm_owned_types() -> "Iterable[type]":
    """The types whose objects work for one user, as a driver's connection does, though their classes do not say so.

    What of them comes out of an owned handle is owned like it, as is what can be called, awaited, iterated or entered.
    Their subclasses are meant too. Asked once, when the manager is made.
    """
    return ()


# Notifications: called in whichever thread it happens, after it happened.


@hookspec
def ucm_context_opened(context: "UserExecutionContext") -> None:
    """A context began to live, as a root or, with a ``parent_request_id``, as a child."""


@hookspec
def ucm_context_bound(context: "UserExecutionContext", anonymous_id: str) -> None:
    """An anonymous context learned its user; ``anonymous_id`` was its ``user_id`` before."""


@hookspec
def ucm_context_closed(context: "UserExecutionContext", reason: "CloseReason") -> None:
    """A context's teardown is through. Its ids are readable, its data is gone."""


@hookspec
def ucm_user_revoked(user_id: str, reason: str) -> None:
    """A user was signed out, and every context of theirs closed: end what outlives a context, such as a session."""


@hookspec
def ucm_access_denied(user_id: str | None, action: str) -> None:
    """Code that runs for this user, or for none, asked for what is not theirs. What it asked for is not said."""
