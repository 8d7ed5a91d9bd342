"""Every error of the package, each with the fields a handler or a log line needs.

One family: ``except UserContextError`` catches them all. A message says which rule was broken, what was found and
what to do. None carries another user's id, a credential or application data.
"""

from collections.abc import Mapping, Sequence
from typing import Any


class UserContextError(Exception):
    """The root of the family."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The constructors take fields and make the message of them: a copy, on its way to another process, needs
        # neither.
        return (_restore, (type(self), self.args, self.__dict__))


class ConfigurationError(UserContextError, ValueError):
    """The application is set up in a way that cannot be served: names the setting, what it was, and the remedy."""


class PluginError(ConfigurationError):
    """A plugin cannot be served: names the plugin, its distribution with the version, what was found, and the remedy.

    ``distribution`` is empty for a plugin that belongs to none.
    """

    def __init__(self, plugin: str, distribution: str | None, problem: str, remedy: str) -> None:
        super().__init__(f"plugin {plugin!r} ({distribution or 'of no distribution'}): {problem}; {remedy}")
        self.plugin = plugin
        self.distribution = distribution or ""
        self.problem = problem
        self.remedy = remedy


class InvalidContextError(UserContextError, ValueError):
    """A value given to a context breaks a rule.

    ``field`` names the value, ``rule`` the rule it breaks. The value itself is not in the message: it may be a secret.
    ``is_wrong_type`` says that it is of a type which no client can have given: that is a mistake of the application.
    """

    def __init__(self, field: str, rule: str, remedy: str, *, is_wrong_type: bool = False) -> None:
        super().__init__(f"{field}: {rule}; {remedy}")
        self.field = field
        self.rule = rule
        self.remedy = remedy
        self.is_wrong_type = is_wrong_type


class ContextNotFoundError(UserContextError, KeyError):
    """There is no context where one was asked for."""

    def __str__(self) -> str:
        # KeyError shows the repr of its argument, which puts quotes around a sentence.
        return Exception.__str__(self)


class ContextExpiredError(ContextNotFoundError):
    """The context under this key reached its deadline."""


class ContextClosedError(UserContextError):
    """A context was used after its teardown began.

    ``reason`` is why it closed, ``opened_by`` where it was opened, ``request_id`` which one it was. ``handle`` names
    the owned handle that was used, and where that was made; None when it was the context itself.
    """

    def __init__(self, request_id: str, opened_by: str, reason: str, handle: str | None = None) -> None:
        of_handle = "" if handle is None else f", and its handle is {handle}"
        super().__init__(
            f"context {request_id} is closed ({reason}); it was opened by {opened_by}{of_handle}. Whatever still uses "
            "it outlived its request: finish that work before the handler returns, or open a context of its own for it"
        )
        self.request_id = request_id
        self.opened_by = opened_by
        self.reason = reason
        self.handle = handle


class HandleRevokedError(ContextClosedError):
    """An owned handle was used after it was revoked; its context may still be open."""

    def __init__(self, request_id: str, opened_by: str, handle: str) -> None:
        super().__init__(request_id, opened_by, "handle revoked", handle)
        self.args = (f"the handle {handle}, of context {request_id}, was revoked; ask its owner for a new one",)


class ContextLimitError(UserContextError, RuntimeError):
    """A limit on live contexts, or on a user's runs of agents, is reached.

    ``scope`` is "user", "connections", "anonymous", "total", "depth", "children" or "agent runs".
    """

    def __init__(self, scope: str, limit: int, remedy: str) -> None:
        counted = "runs of agents at once" if scope == "agent runs" else f"live contexts ({scope})"
        super().__init__(f"the limit of {limit} {counted} is reached; {remedy}")
        self.scope = scope
        self.limit = limit
        self.remedy = remedy


class InvalidEventError(UserContextError, ValueError):
    """An event cannot be sent: ``field`` names what is wrong with it, ``rule`` how. Nothing of it was sent."""

    def __init__(self, field: str, rule: str, remedy: str) -> None:
        super().__init__(f"{field}: {rule}; {remedy}")
        self.field = field
        self.rule = rule
        self.remedy = remedy


class AgentError(UserContextError):
    """An agent cannot be run: ``agent`` is its name, ``problem`` what was found, ``remedy`` what to do about it.

    What an agent itself raises while it runs goes its way as it is, with a note that names the agent.
    """

    def __init__(self, agent: str, problem: str, remedy: str) -> None:
        super().__init__(f"agent {agent!r}: {problem}; {remedy}")
        self.agent = agent
        self.problem = problem
        self.remedy = remedy


class UnknownAgentError(AgentError, KeyError):
    """No agent of that name is registered."""

    def __str__(self) -> str:
        return Exception.__str__(self)  # a KeyError shows its argument's repr


class AgentParametersError(AgentError, ValueError):
    """The parameters given for a run do not fit the agent. None of their values is in the message."""


class AgentTimeoutError(AgentError, TimeoutError):
    """A run did not end before its deadline, and was cut off."""


class MessageLimitError(UserContextError):
    """A client sent more than one connection may: ``scope`` is "size", in bytes, or "rate", in messages a second."""

    def __init__(self, scope: str, limit: float) -> None:
        super().__init__(f"the client sent more than this connection takes ({scope}: {limit:g}); it is closed")
        self.scope = scope
        self.limit = limit


class OriginError(UserContextError):
    """A WebSocket handshake with cookies came from a page of a site that is not allowed."""


class EgressBlockedError(UserContextError):
    """What was being sent has a protected value of another user in it, and is broken off."""


class ContextIsolationError(UserContextError):
    """Something would be, or is, reachable from the contexts of two users. ``findings`` names each by path."""

    def __init__(self, message: str, findings: Sequence[str] = ()) -> None:
        super().__init__(message if not findings else f"{message}: {'; '.join(findings)}")
        self.findings = tuple(findings)


class ContextLeakError(ContextIsolationError):
    """A context has closed, and something that was started in it goes on, or keeps it. ``holders`` says what, one text
    each; ``opened_at`` where the context was opened.
    """

    def __init__(self, request_id: str, opened_at: str, holders: Sequence[str]) -> None:
        super().__init__(
            f"context {request_id}, opened by {opened_at}, is closed and still held by {'; '.join(holders)}; end it "
            "with the request, start it in an empty contextvars.Context(), or name it in CensusPolicy(allow=[...])"
        )
        self.request_id = request_id
        self.opened_at = opened_at
        self.holders = tuple(holders)


class CrossUserAccessError(ContextIsolationError):
    """Code that runs for one user asked for what is not that user's. Foreign and missing look the same, on purpose."""


class IdentityConflictError(ContextIsolationError):
    """A context that already has an identity was given a second, different one."""


class UnauthenticatedError(UserContextError):
    """No identity where one is required, or one whose credentials have expired."""


class ManagerDrainingError(UserContextError):
    """The manager is shutting down and opens no new contexts."""


class LedgerUnavailableError(UserContextError):
    """The audit ledger cannot keep records at the moment, and what may not go unrecorded is refused meanwhile."""


class ClusterUnavailableError(UserContextError):
    """The store that workers share cannot be asked at the moment, and what depends on it is refused meanwhile.

    ``reason`` is "down", "timeout", "login", "memory", "loading", "read-only", "refused" or "recovering";
    ``retry_after`` in how many seconds to come again. With ``is_unknown``, what was asked for may have been done.
    ``detail`` is for whoever operates the store: what it lacks, where that is known, or "".
    """

    def __init__(self, reason: str, *, retry_after: float = 1.0, is_unknown: bool = False, detail: str = "") -> None:
        message = f"the cluster's store cannot be used ({reason}); try again in {retry_after:.0f} seconds"
        super().__init__(f"{message}: {detail}" if detail else message)
        self.detail = detail
        self.reason = reason
        self.retry_after = retry_after
        self.is_unknown = is_unknown


class LedgerFileError(UserContextError):
    """A ledger or a key file cannot be used: ``path`` says which one, the message what was found and what to do."""

    def __init__(self, path: str, problem: str, remedy: str) -> None:
        super().__init__(f"{path}: {problem}; {remedy}")
        self.path = path
        self.problem = problem
        self.remedy = remedy


class ErasureIncompleteError(LedgerFileError):
    """A user's keys are deleted, and what they were stored in could not be cleaned of the last bytes yet.

    ``subjects`` are the deleted ones, 16 bytes each.
    """

    def __init__(self, path: str, problem: str, remedy: str, subjects: Sequence[bytes]) -> None:
        super().__init__(path, problem, remedy)
        self.subjects = tuple(subjects)


def _restore(kind: type[UserContextError], args: tuple[Any, ...], fields: Mapping[str, Any]) -> UserContextError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(fields)
    return error
