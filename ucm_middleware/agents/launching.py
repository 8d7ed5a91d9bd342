"""Starting runs: each in a task of its own, in the Context of whoever starts it."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
from collections.abc import Callable, Mapping
from contextvars import Context, copy_context
from typing import Any, cast

from ucm_middleware.agents.catalog import AgentCatalog, RegisteredAgent
from ucm_middleware.agents.channel import Channel
from ucm_middleware.agents.driving import pump, result_of
from ucm_middleware.agents.launch import Launch
from ucm_middleware.agents.policy import AgentPolicy, checked_timeout
from ucm_middleware.agents.run import AgentRun, agent_run, run_around
from ucm_middleware.agents.runs import AgentRuns
from ucm_middleware.ambient import enter
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient_context
from ucm_middleware.dispatch import Hooks
from ucm_middleware.errors import (
    AgentParametersError,
    ContextLimitError,
    InvalidContextError,
)
from ucm_middleware.execution import managed_user_context
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.guard import Guard
from ucm_middleware.ids import checked_user_id
from ucm_middleware.isolation import copy_data, type_name


class Launcher:
    """Starts the runs of one manager."""

    __slots__ = ("__weakref__", "_catalog", "_guard", "_hooks", "_policy", "_runs", "_trail", "_under_way")

    _under_way: dict[str, int]

    def __init__(
        self,
        policy: AgentPolicy,
        catalog: AgentCatalog,
        runs: AgentRuns,
        guard: Guard,
        hooks: Hooks,
        trail: AuditTrail,
    ) -> None:
        self._policy = policy
        self._catalog = catalog
        self._runs = runs
        self._guard = guard
        self._hooks = hooks
        self._trail = trail
        self.after_fork()
        renewed_after_fork(self)

    def after_fork(self) -> None:
        """Begin anew in a forked child, in which none of the runs goes on."""
        self._under_way = {}

    def new_channel(self) -> Channel:
        """For the items of a stream."""
        return Channel(self._policy.queue_items)

    def start(
        self,
        user_id: str,
        agent_name: str,
        parameters: Mapping[str, Any] | None,
        timeout: float | None,
        channel: Channel | None,
        open_root: Callable[[str], UserExecutionContext],
    ) -> Launch:
        """Start a run, in a task. Its items go to ``channel``, where there is one, and else it has one result.
        ``open_root`` opens a context for a user, for code that runs in none.

        Raises CrossUserAccessError, UnknownAgentError, AgentParametersError, ContextLimitError, and what opening a
        context raises.
        """
        user_id = checked_user_id(user_id)
        self._guard.require(user_id, "execute_with_agent")
        agent = self._catalog.find(agent_name)
        given = _copied(agent.name, parameters, user_id)
        seconds = next(s for s in (timeout, agent.timeout, self._policy.timeout) if s is not None)
        seconds = checked_timeout(seconds)
        acting = self._guard.acting()
        if acting is not None and acting.user_id == user_id and self._lives_here(acting):
            counted = run_around(acting) is None
            if counted:
                self._count(user_id, agent.name)
            launch = Launch(agent.name, seconds, self._runs, None)
            work = self._run(launch, acting, agent, given, channel)
            self._begin(launch, work, copy_context(), user_id if counted else None, None)
            return launch
        self._count(user_id, agent.name)
        try:
            root = open_root(user_id)
        except BaseException:
            self._uncount(user_id)
            raise
        launch = Launch(agent.name, seconds, self._runs, root)
        # Of another user's Context nothing is taken along.
        variables = copy_context() if ambient_context() is None else Context()
        variables.run(enter, root)
        self._begin(launch, self._run_in_root(launch, root, agent, given, channel), variables, user_id, root)
        return launch

    def _begin(
        self,
        launch: Launch,
        work: Any,
        variables: Context,
        counted: str | None,
        root: UserExecutionContext | None,
    ) -> None:
        # Made directly, not by the loop's factory: an eager factory would step it inside a Context that is already
        # entered.
        launch.task = asyncio.Task(work, loop=asyncio.get_running_loop(), context=variables, name="run of an agent")

        def ended(_: object) -> None:
            launch.ended()
            if counted is not None:
                self._uncount(counted)
            if root is not None and root.is_open:  # the task was cancelled before its first step
                root.close("cancelled")

        launch.task.add_done_callback(ended, context=Context())

    def _lives_here(self, context: UserExecutionContext) -> bool:
        """Not made by hand, and no other manager's: what runs below such a one would be on no record here."""
        return context.host is not None and context.host.guard is self._guard

    def _count(self, user_id: str, agent_name: str) -> None:
        most = self._policy.max_runs_per_user
        under_way = self._under_way
        # Nothing is called between looking and writing: so no other thread comes in between.
        if user_id not in under_way:
            under_way[user_id] = 1
            return
        if under_way[user_id] < most:
            under_way[user_id] += 1
            return
        remedy = f"let one end before agent {agent_name!r} runs, or raise AgentPolicy.max_runs_per_user"
        error = ContextLimitError("agent runs", most, remedy)
        self._trail.refused(user_id, error, str(error))
        raise error

    def _uncount(self, user_id: str) -> None:
        under_way = self._under_way
        if user_id in under_way:  # else it was counted before a fork
            under_way[user_id] -= 1
            if under_way[user_id] <= 0:
                del under_way[user_id]

    async def _run_in_root(
        self,
        launch: Launch,
        root: UserExecutionContext,
        agent: RegisteredAgent,
        given: dict[str, Any],
        channel: Channel | None,
    ) -> Any:
        async with managed_user_context(root):
            return await self._run(launch, root, agent, given, channel)

    async def _run(
        self,
        launch: Launch,
        context: UserExecutionContext,
        agent: RegisteredAgent,
        given: dict[str, Any],
        channel: Channel | None,
    ) -> Any:
        async with agent_run(context, agent.name, given)._telling(launch.begins) as run:
            made = await agent.make(run.context)
            try:
                if channel is None:
                    return await result_of(self._hooks, run, made, given)
                await pump(self._hooks, run, made, given, channel)
                return run.result
            except Exception as error:
                _blame(run, error)
                raise
            finally:
                agent.done(made)


def _copied(agent_name: str, parameters: object, user_id: str) -> dict[str, Any]:
    if parameters is None:
        return {}
    if not isinstance(parameters, Mapping):
        raise AgentParametersError(
            agent_name, f"its parameters are a {type_name(parameters)}", "give a mapping of names to values"
        )
    try:
        # An agent may well take a thread_id.
        return copy_data(cast("Mapping[str, Any]", parameters), "parameters", user_id, reserved=frozenset())
    except InvalidContextError as error:
        raise AgentParametersError(agent_name, f"{error.field} {error.rule}", error.remedy) from None


def _blame(run: AgentRun, error: Exception) -> None:
    note = f"raised in the run {run.context.request_id} of agent {run.agent_name!r}"
    if note not in getattr(error, "__notes__", ()):
        error.add_note(note)
