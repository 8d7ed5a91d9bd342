"""Function tools that tell of themselves, and whose threads are watched.

The SDK runs a synchronous function with ``asyncio.to_thread`` deep inside of the tool, and gives no hook around that.
So the function is wrapped, and the SDK makes the tool's invoker anew from the wrapped one: name, schema, guardrails,
approval, timeout and the handling of errors are the tool's as before.
"""

import asyncio
import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, Final, TypeGuard, cast, get_origin, get_type_hints

from agents import FunctionTool, RunContextWrapper, Tool, UserError, function_tool
from agents.tool_context import ToolContext

from ucm_middleware import (
    ContextNotFoundError,
    CrossUserAccessError,
    UserContextError,
    UserExecutionContext,
    current_context,
)
from ucm_openai_agents.flow import Flow, current_flow

_TELLS: Final = "__ucm_openai_agents_tells__"
_BEGUN_BY: Final = "_ucm_openai_agents_begun_by"
_CONTEXT: Final = "ucm_tool_context"  # the parameter that functions get which take no context themselves


def flow_of(wrapper: RunContextWrapper[Any]) -> Flow | None:
    """The loop that code of the SDK runs in; None where an application calls ``Runner`` itself.

    Raises CrossUserAccessError, which is recorded, in another user's context than the run's, and ContextClosedError
    after that has closed. Where the loop is one of ours, its run raises them, when it is told of what is done.
    """
    flow, owner = current_flow(), wrapper.context
    if flow is None:
        _require_begun_by(wrapper)
        _require_owner(owner)
    elif owner is not flow.current.context:
        try:
            _require_owner(owner)
        except UserContextError as error:
            flow.refuse(error)
            raise
    elif not hasattr(wrapper.usage, _BEGUN_BY):
        setattr(wrapper.usage, _BEGUN_BY, owner.user_id)
    return flow


def _require_begun_by(wrapper: RunContextWrapper[Any]) -> None:
    """Raise CrossUserAccessError, recorded, where a ``RunState`` goes on that another user's run ended in.

    ``Runner.run(agent, state, context=...)`` puts the new context in the place of the old one, and all that was said
    stays. What it keeps as well is the usage, which tools' contexts share: that remembers whose it is.
    """
    owner = wrapper.context
    if not isinstance(owner, UserExecutionContext):
        return
    begun_by = getattr(wrapper.usage, _BEGUN_BY, None)
    if begun_by is None:
        setattr(wrapper.usage, _BEGUN_BY, owner.user_id)
    elif begun_by != owner.user_id:
        if owner.host is not None:
            owner.host.require_owner(begun_by, "state of a run")
        # With a grant too, and in no context: what one user said is not to go on as another's.
        raise CrossUserAccessError("state of a run: another user's run ended in it")


def _require_owner(owner: object) -> None:
    try:
        here = current_context()
    except ContextNotFoundError:
        here = None
    if owner is here or not isinstance(owner, UserExecutionContext):
        return
    owner.require_usable()
    if owner.host is not None:
        owner.host.require_owner(owner.user_id, "run of an agent")


def tells(tool: Tool) -> bool:
    """Whether a tool tells of its calls itself."""
    return isinstance(tool, FunctionTool) and (
        hasattr(tool.on_invoke_tool, _TELLS) or hasattr(_function_of(tool), _TELLS)
    )


def prepare_function(tool: FunctionTool) -> None:
    """Let a tool made by ``function_tool`` tell of itself; once, whoever shares it. Others are left as they are."""
    function = _function_of(tool)
    if function is None or inspect.isclass(function):
        return
    try:
        rebuilt = function_tool(
            _telling(function),
            name_override=tool.name,
            use_docstring_info=False,
            strict_mode=tool.strict_json_schema,
            allowed_callers=tool.allowed_callers,
        )
    except (UserError, NameError, TypeError):  # what it was made from cannot be described a second time
        return
    if rebuilt.output_json_schema == tool.output_json_schema:  # else its output is checked by what only it knows
        tool.on_invoke_tool = rebuilt.on_invoke_tool
        _tie(tool)


def _tie(tool: FunctionTool) -> None:
    """Tie a tool's invoker to the tool, as the SDK does when one is made or copied."""
    made: Any = FunctionTool.__post_init__
    made(tool)


def mark_telling(invoker: object) -> None:
    """Say of a tool's invoker that it tells of its calls."""
    setattr(invoker, _TELLS, True)


def _function_of(tool: FunctionTool) -> Callable[..., Any] | None:
    return getattr(tool, "__wrapped__", None)


def _telling(function: Callable[..., Any]) -> Callable[..., Any]:
    call = _call_of(function)
    signature, hints = inspect.signature(call), get_type_hints(call, include_extras=True)
    takes_context = _takes_context(signature, hints)

    def split(args: tuple[Any, ...]) -> tuple[ToolContext[Any] | None, tuple[Any, ...]]:
        """The context that the SDK gives, which comes first, and what the function itself takes."""
        if args and _is_context(args[0]):
            return args[0], args if takes_context else args[1:]
        return None, args  # not called by the SDK

    if inspect.iscoroutinefunction(call):

        @wraps(call)
        async def asynchronous(*args: Any, **kwargs: Any) -> Any:
            context, args = split(args)
            flow = None if context is None else flow_of(context)
            if flow is None or context is None:
                return await call(*args, **kwargs)
            task = asyncio.current_task()
            assert task is not None
            with flow.current.tool(context.tool_name, context.tool_call_id):
                flow.add_task(task)
                try:
                    return await call(*args, **kwargs)
                finally:
                    flow.discard_task(task)

        described: Any = asynchronous
    else:

        @wraps(call)
        def synchronous(*args: Any, **kwargs: Any) -> Any:
            context, args = split(args)
            flow = None if context is None else flow_of(context)
            if flow is None or context is None:
                return call(*args, **kwargs)
            with flow.current.tool(context.tool_name, context.tool_call_id) as made:
                return made.in_thread(call)(*args, **kwargs)

        described = synchronous
    if not takes_context:
        first = inspect.Parameter(_CONTEXT, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=ToolContext[Any])
        parameters = [first, *signature.parameters.values()]
        if any(each.kind is inspect.Parameter.POSITIONAL_ONLY for each in parameters):
            parameters[0] = first.replace(kind=inspect.Parameter.POSITIONAL_ONLY)
        described.__signature__ = signature.replace(parameters=parameters)
        hints = {_CONTEXT: ToolContext[Any], **hints}
    described.__annotations__ = hints
    setattr(described, _TELLS, True)
    return cast("Callable[..., Any]", described)


def _call_of(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function or method; of an object that can be called, the method that is."""
    return function if inspect.isroutine(function) else cast("Any", function).__call__


def _is_context(value: object) -> TypeGuard[ToolContext[Any]]:
    return isinstance(value, ToolContext)


def _takes_context(signature: inspect.Signature, hints: dict[str, Any]) -> bool:
    first = next(iter(signature.parameters.values()), None)
    if first is None:
        return False
    annotation = hints.get(first.name, first.annotation)
    return (get_origin(annotation) or annotation) in (RunContextWrapper, ToolContext)
