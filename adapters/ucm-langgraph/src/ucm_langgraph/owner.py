"""Whose a thread, a memory or a cached result is: the keys that they are stored under, and the check on loading."""

from typing import Final

from ucm_middleware import InvalidContextError, UserExecutionContext

THREAD: Final = "langgraph_thread"
"""The kind of key that stands for a client's thread id."""

CHECKPOINTS: Final = "langgraph_checkpoints"
"""The kind of key that says whose a checkpoint is."""

_WHOLE: Final = "all of the user's"


class Owner:
    """What one user's records of a kind begin with, or carry: the key under each secret, the current one's first."""

    __slots__ = ("context", "keys", "kind")

    def __init__(self, context: UserExecutionContext, kind: str) -> None:
        self.context = context
        self.kind = kind
        self.keys = context.candidate_keys(kind, _WHOLE)

    @property
    def key(self) -> str:
        """The key under the current secret."""
        return self.keys[0]

    @property
    def former(self) -> tuple[str, ...]:
        """The keys under the previous secrets: there are some during a rotation only."""
        return self.keys[1:]

    def check(self, found: str | None) -> None:
        """Raise CrossUserAccessError, recorded, unless a loaded record has this user's key and the user's code asks."""
        self.context.check_key(self.kind, _WHOLE, found)


class Thread:
    """A thread: what the client calls it, the keys that it may be stored under, and what says whose it is."""

    __slots__ = ("context", "keys", "name", "owner")

    def __init__(self, context: UserExecutionContext, name: object) -> None:
        self.context = context
        self.name = thread_name(name)
        self.keys = context.candidate_keys(THREAD, self.name)
        self.owner = Owner(context, CHECKPOINTS).key

    @property
    def key(self) -> str:
        """The key under the current secret."""
        return self.keys[0]

    @property
    def former(self) -> tuple[str, ...]:
        """The keys under the previous secrets."""
        return self.keys[1:]

    def check(self, found: str | None) -> None:
        """Raise CrossUserAccessError, recorded, unless what was loaded is this thread's and the user's code asks."""
        self.context.check_key(THREAD, self.name, found)


def thread_name(thread_id: object) -> str:
    """A thread id as text, as LangGraph takes it. Raises InvalidContextError where there is none."""
    if thread_id is None:
        raise InvalidContextError(
            "thread_id", "is missing", 'name the conversation, such as {"configurable": {"thread_id": "trip-to-rome"}}'
        )
    return thread_id if type(thread_id) is str else str(thread_id)
