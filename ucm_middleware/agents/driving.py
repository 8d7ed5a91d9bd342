"""Running an agent, by the plugin of its framework or as a function of its parameters."""

import inspect
from collections.abc import AsyncIterable
from contextlib import AbstractAsyncContextManager, aclosing, nullcontext
from typing import Any, cast

from ucm_middleware.agents.channel import Channel
from ucm_middleware.agents.run import AgentRun
from ucm_middleware.dispatch import Hooks
from ucm_middleware.errors import (
    AgentError,
    AgentParametersError,
)
from ucm_middleware.isolation import type_name


async def result_of(hooks: Hooks, run: AgentRun, agent: Any, given: dict[str, Any]) -> Any:
    """What an agent comes to. Raises AgentError for one that gives a stream."""
    work = hooks.run_agent(run, agent, given) if hooks.run_agent else None
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


async def pump(hooks: Hooks, run: AgentRun, agent: Any, given: dict[str, Any], channel: Channel) -> None:
    """Drive a stream here, whoever reads it."""
    stream = hooks.stream_agent(run, agent, given) if hooks.stream_agent else None
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
