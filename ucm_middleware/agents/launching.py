"""Starting runs: each in a task of its own, in the Context of whoever starts it, for so long and no longer."""

# Contexts, their manager and the middleware open doors to each other that applications are not shown.
# pyright: reportPrivateUsage=false

import asyncio
import inspect
import logging
import math
import threading
import time
from collections.abc import AsyncIterable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from contextvars import Context, copy_context
from functools import partial
from typing import Any, cast

import anyio

from ucm_middleware.agents.catalog import AgentCatalog, RegisteredAgent
from ucm_middleware.agents.channel import Channel
from ucm_middleware.agents.policy import AgentPolicy, checked_timeout
from ucm_middleware.agents.run import AgentRun, agent_run, run_around
from ucm_middleware.agents.runs import AgentRuns
from ucm_middleware.agents.stragglers import Running
from ucm_middleware.ambient import enter
from ucm_middleware.audit.trail import AuditTrail
from ucm_middleware.context import UserExecutionContext
from ucm_middleware.current import ambient_context
from ucm_middleware.dispatch import Hooks
from ucm_middleware.errors import (
    AgentError,
    AgentParametersError,
    AgentTimeoutError,
    ContextClosedError,
    ContextLimitError,
    InvalidContextError,
)
from ucm_middleware.execution import managed_user_context
from ucm_middleware.forking import renewed_after_fork
from ucm_middleware.guard import Guard
from ucm_middleware.ids import checked_user_id
from ucm_middleware.isolation import copy_data, type_name
from ucm_middleware.lifetime import HANDLER_GRACE
from ucm_middleware.waiting import Cancelled, settle, wake

logger = logging.getLogger(__name__)


class Launch:
    """One run that was started, as whoever started it sees it."""

    __slots__ = (
        "_agent",
        "_ends",
        "_is_left",
        "_is_overdue",
        "_is_stopped",
        "_root",
        "_runs",
        "_seconds",
        "_timer",
        "_when_over",
        "run",
        "task",
    )

    task: "asyncio.Task[Any]"

    def __init__(self, agent: str, seconds: float, runs: AgentRuns, root: UserExecutionContext | None) -> None:
        self._agent = agent
        self._seconds = seconds
        self._runs = runs
        self._root = root  # the context that was opened for it, if one was
        self._ends = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self._when_over: list[Callable[[], None]] = []
        self._is_left = False
        self._is_overdue = False
        self._is_stopped = False
        self.run: AgentRun | None = None

    def begins(self, run: AgentRun) -> None:
        """The run has its context: its time begins."""
        self.run = run
        self._ends = time.monotonic() + self._seconds
        run.context.lifetime.limit(self._ends, time.monotonic)
        # In an empty Context: a timer keeps its own until it is due, cancelled or not, and all that is in there.
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._expire, run, context=Context())

    def ended(self) -> None:
        """The task has ended."""
        # By the clock, and not by who noticed: the timer, the sweeper, or whoever used the context first.
        self._is_overdue = time.monotonic() >= self._ends
        if self._timer is not None:
            self._timer.cancel()
        self._tell_over()

    def when_over(self, call: Callable[[], None]) -> None:
        """Call this when the run is over: its task has ended, or was left behind."""
        if self._is_over:
            call()
        else:
            self._when_over.append(call)

    async def outcome(self) -> Any:
        """What the run comes to. When whoever waits is cancelled, so is the run, and is waited for.

        Raises what the agent raised, AgentTimeoutError at the deadline, ContextClosedError when the run's context was
        closed by anything else, AgentError when its stream was left.
        """
        if not self._is_over:
            over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self.when_over(partial(wake, over))
            try:
                await over
            except asyncio.CancelledError:
                await self.stop()
                raise
            except BaseException:  # thrown away, and not cancelled: it cannot wait
                self.task.cancel()
                raise
        task = self.task
        if self._is_stopped and (not task.done() or task.cancelled()):
            raise AgentError(self._agent, "was cut off, since its stream was left", "read a stream inside of its block")
        if not task.done():
            raise self._timeout("did not end, and ignored its cancellation; it is left running")
        if task.cancelled():
            if self._is_overdue:
                raise self._timeout("did not end")
            remedy = "raise CancelledError only where the task was cancelled from outside"
            raise AgentError(self._agent, "cancelled itself", remedy)
        error = task.exception()
        if error is not None and self._is_overdue and self._was_cut_off(error):
            raise self._timeout("did not end") from error
        return task.result()

    async def stop(self) -> None:
        """Cancel the run, and wait until it has ended, through any number of cancellations: for a grace, and where it
        obeys, for its releases, which have deadlines of their own.
        """
        if self._is_over:
            return
        self._is_stopped = True
        self.task.cancel()
        cancelled = Cancelled()
        with anyio.CancelScope(shield=True):
            await settle(self.task, HANDLER_GRACE, cancelled)
            while not self._is_over and self._only_releases:
                await settle(self.task, HANDLER_GRACE, cancelled)
        self._leave_behind()
        cancelled.raise_it()

    @property
    def _is_over(self) -> bool:
        return self._is_left or self.task.done()

    @property
    def _only_releases(self) -> bool:
        """Whether the agent has ended, and what its context held is being released."""
        return self.run is not None and self.run.has_ended

    def _was_cut_off(self, error: BaseException) -> bool:
        # Whatever the agent has made of its cancellation: a group, or an error of its clean-up.
        by_timer = self.run is not None and self.run.context.lifetime.reason == "expired"
        return by_timer or isinstance(error, ContextClosedError)

    def _expire(self, run: AgentRun) -> None:
        """The time is over."""
        self._ends = min(self._ends, time.monotonic())  # uvloop's timers are early, by a millisecond at most
        self._timer = asyncio.get_running_loop().call_later(HANDLER_GRACE, self._leave_behind, context=Context())
        lifetime = run.context.lifetime
        if lifetime.is_open:
            run.context.close("expired")
        elif not run.has_ended and not lifetime.is_interrupted:
            self.task.cancel()  # it closed its context itself, and nothing else would end it

    def _timeout(self, what: str) -> AgentTimeoutError:
        return AgentTimeoutError(
            self._agent,
            f"{what} within {self._seconds:g} seconds",
            "mend what it waits for, or give it a longer timeout",
        )

    def _leave_behind(self) -> None:
        """The agent ignores that it is cancelled. Its run is over all the same, and it is listed until it ends."""
        run, task = self.run, self.task
        if self._is_over or self._only_releases:
            return
        self._is_left = True
        logger.error("agent %s ignored its cancellation and was left running", self._agent)
        if run is not None:
            running = Running(run, None, threading.current_thread().name, time.monotonic())
            self._runs.stragglers.begin(running)
            task.add_done_callback(lambda _: self._runs.stragglers.end(running), context=Context())
            run.end(asyncio.CancelledError())
            run.context.close("cancelled")
        if self._root is not None:
            self._root.close("cancelled" if time.monotonic() < self._ends else "expired")
        task.add_done_callback(_retrieve, context=Context())
        self._tell_over()

    def _tell_over(self) -> None:
        calls, self._when_over = self._when_over, []
        for call in calls:
            call()


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
                    return await self._result(run, made, given)
                await self._pump(run, made, given, channel)
                return run.result
            except Exception as error:
                _blame(run, error)
                raise
            finally:
                agent.done(made)

    async def _result(self, run: AgentRun, agent: Any, given: dict[str, Any]) -> Any:
        work = self._hooks.run_agent(run, agent, given) if self._hooks.run_agent else None
        if work is None:
            work = _called(run, agent, given)
        # Some are both: a stream that may be awaited, and is a stream still.
        if inspect.isawaitable(work) and not hasattr(work, "__aiter__"):
            result = await work
            if not hasattr(result, "__aiter__"):
                return result
            async with _closing(result):
                raise AgentError(
                    run.agent_name,
                    f"came to a {type_name(result)}, which would run where it is read",
                    "return a result, or let it be an async generator for manager.stream_with_agent()",
                )
        _close(work)
        if hasattr(work, "__aiter__"):
            raise AgentError(run.agent_name, "gives a stream", "run it with manager.stream_with_agent()")
        raise _not_asynchronous(run, work)

    async def _pump(self, run: AgentRun, agent: Any, given: dict[str, Any], channel: Channel) -> None:
        """Drive a stream here, whoever reads it."""
        stream = self._hooks.stream_agent(run, agent, given) if self._hooks.stream_agent else None
        if stream is None:
            stream = _called(run, agent, given)
        if not hasattr(stream, "__aiter__"):
            _close(stream)
            if inspect.isawaitable(stream):
                raise AgentError(run.agent_name, "gives no stream", "run it with manager.execute_with_agent()")
            raise _not_asynchronous(run, stream)
        async with _closing(stream):
            async for item in cast("AsyncIterable[Any]", stream):
                await channel.put(item)


def _closing(stream: Any) -> AbstractAsyncContextManager[Any]:
    """What ends a stream that was broken off here, and not wherever a collector finds it."""
    if hasattr(stream, "aclose"):
        return aclosing(stream)
    return cast("AbstractAsyncContextManager[Any]", stream) if hasattr(stream, "__aexit__") else nullcontext()


def _called(run: AgentRun, agent: Any, given: dict[str, Any]) -> Any:
    """What an agent that is no framework's gives: a function of the parameters."""
    if not callable(agent):
        raise AgentError(
            run.agent_name,
            f"a {type_name(agent)} is nothing that any plugin of this manager runs, and cannot be called",
            "name the plugin of its framework in UserContextManager(plugins=[...]), or give an async function",
        )
    try:
        inspect.signature(agent).bind(**given)
    except TypeError as error:
        raise AgentParametersError(
            run.agent_name, f"its parameters do not fit: {error}", f"it takes {inspect.signature(agent)}"
        ) from None
    except ValueError:  # it does not say what it takes
        pass
    return agent(**given)


def _not_asynchronous(run: AgentRun, work: object) -> AgentError:
    return AgentError(
        run.agent_name,
        f"gave a {type_name(work)}, and is to be asynchronous",
        "make it an async function, which may call what blocks with asyncio.to_thread()",
    )


def _close(work: object) -> None:
    if inspect.iscoroutine(work):
        work.close()  # so that nothing complains of a coroutine never awaited


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


def _retrieve(task: "asyncio.Task[Any]") -> None:
    """Say how a run ended that was left behind, so that asyncio does not complain of an error nobody saw."""
    if not task.cancelled() and (raised := task.exception()) is not None:
        logger.error("a run that was left running ended", exc_info=raised)
