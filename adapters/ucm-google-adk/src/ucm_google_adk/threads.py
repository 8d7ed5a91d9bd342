"""The threads that ADK runs synchronous tools in, where ``RunConfig.tool_thread_pool_config`` tells it to."""

# ADK has no public way to reach the very function that it runs in a thread.
# pyright: reportPrivateUsage=false

from collections.abc import Awaitable, Callable
from typing import Any

from google.adk.tools.tool_context import ToolContext

from ucm_google_adk.installed import unknown_adk
from ucm_middleware import ToolCall

try:
    from google.adk.utils._sync_runner import (
        _SYNC_CALLABLE_RUNNER,
        _get_tool_thread_pool,
        _make_executor_sync_callable_runner,
    )
except ImportError:
    raise unknown_adk("runs tools in threads") from None


def watch_threads(call: ToolCall, tool_context: ToolContext) -> None:
    """Let the manager know of the thread that this call of a tool runs in, if it runs in one.

    To be called in the Context of this one call, which ADK makes for it.
    """
    config = tool_context.run_config
    if config is None or config.tool_thread_pool_config is None:
        return
    in_pool = _make_executor_sync_callable_runner(_get_tool_thread_pool(config.tool_thread_pool_config.max_workers))

    def watched(target: Callable[..., Any], arguments: dict[str, Any]) -> Awaitable[Any]:
        return in_pool(call.in_thread(target), arguments)

    _SYNC_CALLABLE_RUNNER.set(watched)
