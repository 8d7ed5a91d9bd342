"""Synchronous functions, which the frameworks run in threads that nothing can stop: who runs one is listed."""

# The frameworks have no public way to what they have registered.
# pyright: reportPrivateUsage=false

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from functools import wraps
from typing import Any, Final

from mcp.server.mcpserver import MCPServer

from ucm_middleware.agents import ToolCall
from ucm_middleware.callables import is_asynchronous

under_way: Final[ContextVar[ToolCall | None]] = ContextVar("ucm_mcp_call", default=None)
"""The call that the running code belongs to; its threads inherit it."""

Look = Callable[[str, Mapping[str, Any]], None]
"""Told of a request's method and parameters before it is handled."""

_MARK: Final = "__ucm_mcp_watched__"


def watch(component: Any) -> None:
    """Let a tool, resource or prompt of either framework say when its function runs in a thread, and when that ends."""
    function = getattr(component, "fn", None)
    if callable(function) and not _is_watched(function) and not is_asynchronous(function):
        component.fn = _watched(function)


def _watched(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def in_thread(*args: Any, **kwargs: Any) -> Any:
        call = under_way.get()
        return (function if call is None else call.in_thread(function))(*args, **kwargs)

    in_thread.__dict__[_MARK] = True
    return in_thread


def _is_watched(function: Callable[..., Any]) -> bool:
    return _MARK in getattr(function, "__dict__", ())


def watch_registered(server: MCPServer, method: str, params: Mapping[str, Any]) -> None:
    """What the SDK is about to run of a server: it may have been registered at any time."""
    name = params.get("name")
    if method == "tools/call" and isinstance(name, str):
        watch(server._tool_manager.get_tool(name))
    elif method == "prompts/get" and isinstance(name, str):
        watch(server._prompt_manager.get_prompt(name))
    elif method == "resources/read":
        for component in (*server._resource_manager.list_resources(), *server._resource_manager.list_templates()):
            watch(component)


def nothing_to_watch(method: str, params: Mapping[str, Any]) -> None:
    """For servers that run nothing in threads by themselves, or say so in another way."""
    del method, params
