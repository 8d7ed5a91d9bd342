"""What a run is asked with: plain data, checked before the SDK sees any of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NoReturn, cast

from agents import TResponseInputItem
from agents.run import DEFAULT_MAX_TURNS

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
    """OpenAI's server takes one without a type for a reference as well."""
    kind = item.get("type")
    return kind == "item_reference" or (kind is None and "role" not in item)


def _shown(name: object) -> str:
    return f": {name}" if isinstance(name, str) and name.isidentifier() and len(name) <= 40 else ""
