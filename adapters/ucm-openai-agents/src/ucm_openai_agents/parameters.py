"""What a run is asked with: plain data, checked before the SDK sees any of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, Required, cast, get_args, get_origin, get_type_hints

from agents import TResponseInputItem
from agents.run import DEFAULT_MAX_TURNS
from openai.types.responses import ResponseInputItemParam

from ucm_middleware import AgentParametersError

_KNOWN: Final = ("input", "session_id", "max_turns")
_OF_THE_SERVER: Final = ("conversation_id", "previous_response_id", "auto_previous_response_id")


@dataclass(frozen=True, slots=True)
class RunParameters:
    """``input`` is a text or the SDK's input items, ``session_id`` what the client calls its conversation.

    ``max_turns`` is how often the model may be asked; None for without a limit.
    """

    input: str | list[TResponseInputItem]
    session_id: str | None
    max_turns: int | None


def checked_parameters(agent: str, given: Mapping[str, Any], *, has_sessions: bool) -> RunParameters:
    """Raises AgentParametersError, which names what does not fit, and none of the values."""

    def refuse(problem: str, remedy: str) -> NoReturn:
        raise AgentParametersError(agent, problem, remedy)

    for name in given:
        if name in _OF_THE_SERVER:
            refuse(
                f"{name} names a conversation on OpenAI's server, which is whoever's that names it",
                "give a session_id, which belongs to one user",
            )
        if name not in _KNOWN:
            refuse("a parameter is not known" + _shown(name), f"give {', '.join(_KNOWN)}")
    asked, session_id = given.get("input"), given.get("session_id")
    max_turns = given.get("max_turns", DEFAULT_MAX_TURNS)
    if not (isinstance(asked, str) and asked) and not _are_items(asked):
        refuse(
            "input is absent" if asked is None else "input is neither a text nor a list of input items, or empty",
            'give {"input": "what the user says"}',
        )
    if not isinstance(asked, str) and any(map(_is_reference, cast("list[Any]", asked))):
        refuse(
            "input has a reference to an item on OpenAI's server, which is whoever's that names it",
            "give the item itself, or a session_id, whose items belong to one user",
        )
    if session_id is not None and not isinstance(session_id, str):
        refuse(f"session_id is a {type(session_id).__name__}", "give a text, or leave it out")
    if session_id is not None and not has_sessions:
        refuse("session_id has no sessions to be found in", "name a store: OpenAIAgents(sessions=lambda key: ...)")
    if max_turns is not None and (isinstance(max_turns, bool) or not isinstance(max_turns, int) or max_turns < 1):
        refuse("max_turns is not a number of at least 1", "give one, or None for without a limit")
    return RunParameters(cast("str | list[TResponseInputItem]", asked), session_id, max_turns)


def _are_items(value: object) -> bool:
    items = cast("list[object]", value) if isinstance(value, list) else []
    return bool(items) and all(isinstance(item, dict) for item in items)


def _is_reference(item: Mapping[str, Any]) -> bool:
    """Whether there is nothing but an id, under which OpenAI's server looks up the rest.

    The server takes an item without a type for a reference as well.
    """
    kind = item.get("type")
    if kind is None and item.get("role") is None:
        return True
    content = _CONTENT.get(str(kind or "message"), ())
    return item.get("id") is not None and all(item.get(name) in (None, "") for name in content)


def _content_of_kinds() -> dict[str, set[str]]:
    """What says something in an item of each type that there is: what it must have, but for names of what is elsewhere.

    A reference has nothing of the kind, and neither has a type that is not known yet.
    """
    content: dict[str, set[str]] = {}
    for kind in get_args(ResponseInputItemParam):
        hints = get_type_hints(kind, include_extras=True)
        required = {name for name, hint in hints.items() if get_origin(hint) is Required}
        for name in get_args(get_type_hints(kind)["type"]):
            content.setdefault(str(name), set()).update(required - _NAMES)
    return content


_NAMES: Final = {"type", "id", "status", "role", "container_id"}
_CONTENT: Final = _content_of_kinds()


def _shown(name: object) -> str:
    return f": {name}" if isinstance(name, str) and name.isidentifier() and len(name) <= 40 else ""
