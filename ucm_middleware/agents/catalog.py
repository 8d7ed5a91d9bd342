"""Which agents there are: by name, each with what makes one for a run."""

import inspect
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from types import MethodType
from typing import Any, Final

from ucm_middleware.agents.policy import checked_timeout
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.errors import AgentError, ConfigurationError, UnknownAgentError, UserContextError

AgentFactory = Callable[[UserExecutionContext], Any | Awaitable[Any]]
"""Makes an agent for one run, whose own context it is given."""

MAX_NAME: Final = 128
"""Characters of an agent's name."""

_WRAPPED: Final = "__ucm_agent__"
"""What an object of an adapter's has that a factory may return instead of an agent: that agent."""


class RegisteredAgent:
    """An agent's factory, and what it has made so far that is still there."""

    __slots__ = ("_factory", "_made", "_stateless", "name", "timeout")

    def __init__(self, name: str, factory: AgentFactory, *, stateless: bool, timeout: float | None) -> None:
        self.name = name
        self.timeout = timeout
        self._factory = factory
        self._stateless = stateless
        # By identity, and weakly: what cannot be referred to weakly stands here itself, until its run has ended.
        self._made: dict[int, object] = {}

    async def make(self, context: UserExecutionContext) -> Any:
        """An agent for one run. Raises AgentError when the factory fails, or gives what another run had."""
        try:
            agent = self._factory(context)
            if inspect.isawaitable(agent):
                agent = await agent
        except UserContextError:
            raise
        except Exception as error:
            raise AgentError(
                self.name, f"its factory raised {type(error).__name__}", "see the error that caused this one"
            ) from error
        if agent is None:
            raise AgentError(self.name, "its factory returned None", "return the agent that is to run")
        if not self._stateless:
            self._require_fresh(agent)
        return agent

    def done(self, agent: object) -> None:
        """The run that this was made for has ended."""
        what = _what_runs_share(agent)
        if self._made.get(id(what)) is what:
            del self._made[id(what)]

    def _require_fresh(self, agent: object) -> None:
        what = _what_runs_share(agent)
        known = self._made.get(id(what))
        if known is not None and (known is what or (isinstance(known, weakref.ref) and known() is what)):
            raise AgentError(
                self.name,
                f"its factory returned a {type(what).__name__} that another run had already",
                "let it make a new one each time, or register it with stateless=True if it keeps nothing of a run",
            )
        try:
            self._made[id(what)] = weakref.ref(what, self._forgetting(id(what)))
        except TypeError:
            self._made[id(what)] = what

    def _forgetting(self, key: int) -> Callable[[object], None]:
        made = self._made

        def forget(reference: object) -> None:
            if made.get(key) is reference:
                del made[key]

        return forget


class AgentCatalog:
    """The agents of one manager."""

    __slots__ = ("_agents",)

    def __init__(self) -> None:
        self._agents: dict[str, RegisteredAgent] = {}

    def register(self, name: str, factory: AgentFactory, *, stateless: bool, timeout: float | None) -> None:
        """See ``UserContextManager.register_agent``."""
        _check_name(name)
        if name in self._agents:
            raise ConfigurationError(f"an agent {name!r} is registered already; give this one a name of its own")
        if not callable(factory):
            raise ConfigurationError(
                f"the factory of agent {name!r} is a {type(factory).__name__}, which cannot be called; "
                "give a function of the context, such as lambda context: Agent(...)"
            )
        _check_takes_context(name, factory)
        seconds = None if timeout is None else checked_timeout(timeout)
        self._agents[name] = RegisteredAgent(name, factory, stateless=stateless, timeout=seconds)

    def find(self, name: object) -> RegisteredAgent:
        """Raises UnknownAgentError for a name that none is registered under."""
        found = self._agents.get(name) if isinstance(name, str) else None
        if found is None:
            known = ", ".join(sorted(self._agents)) or "none"
            shown = name if isinstance(name, str) and len(name) <= MAX_NAME else f"<{type(name).__name__}>"
            remedy = f"register it with manager.register_agent(); known: {known}"
            raise UnknownAgentError(shown, "none is registered under this name", remedy)
        return found


def _what_runs_share(agent: object) -> object:
    """A method is made anew each time that it is asked for, as is a partial of it; what it is a method of is not. Nor
    is the agent in what an adapter lets a factory return instead.
    """
    if hasattr(type(agent), _WRAPPED):  # the class: a mock has whatever it is asked for
        return _what_runs_share(getattr(agent, _WRAPPED))
    function = agent
    while isinstance(function, partial):
        function = function.func
    return function.__self__ if isinstance(function, MethodType) else agent


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not name.strip() or len(name) > MAX_NAME or not name.isprintable():
        raise ConfigurationError(
            f"an agent's name is printable text of at most {MAX_NAME} characters, not {name!r:.200}"
        )


def _check_takes_context(name: str, factory: AgentFactory) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):  # some of what is written in C does not say
        return
    try:
        signature.bind(None)
    except TypeError:
        raise ConfigurationError(
            f"the factory of agent {name!r} does not take one argument, the context of the run; "
            "give a function of it, such as lambda context: Agent(...)"
        ) from None
