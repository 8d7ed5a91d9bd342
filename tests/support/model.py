"""What contexts there are, whose, and under which keys: the rules of the manager, told as simply as possible."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ucm_middleware import (
    ContextClosedError,
    ContextExpiredError,
    ContextLimitError,
    ContextNotFoundError,
    CrossUserAccessError,
    IdentityConflictError,
    UserExecutionContext,
)

from .world import Inside, Thing

Key = str | tuple[str, str]
Phase = Literal["live", "closing", "closed"]

INTERRUPTING: Final = frozenset({"expired", "revoked", "shutdown"})
"""The reasons that stop a handler."""

ENDED_WELL: Final = frozenset({"finished", "closed", "cleared"})
"""The reasons after which a resource sees no error."""


@dataclass(eq=False, slots=True)
class Known:
    """What the model knows of one context. ``closing`` is one that waits for its handler with its resources."""

    context: UserExecutionContext
    owner: str
    anonymous: bool = False
    keys: list[Key] = field(default_factory=list)
    deadline: float | None = None
    latest: float | None = None
    parent: "Known | None" = None
    children: "list[Known]" = field(default_factory=list)
    things: list[Thing] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)
    taken: dict[str, Any] = field(default_factory=dict)
    inside: Inside | None = None
    saw_error: bool = False
    failed_late: int = 0
    phase: Phase = "live"
    reason: str | None = None

    def ancestors(self) -> "Iterator[Known]":
        """Itself, and all above."""
        node: Known | None = self
        while node is not None:
            yield node
            node = node.parent


class Refused(Exception):  # noqa: N818 - an answer of the model
    """What the model says must be raised, and changes nothing. ``scope`` is that of a limit."""

    def __init__(self, kind: type[Exception], scope: str | None = None) -> None:
        super().__init__(kind, scope)
        self.kind = kind
        self.scope = scope


class Model:
    """Foretells what the manager does. ``asker`` is the context that the asking code runs in, None for trusted code."""

    def __init__(self, per_user: int, total: int, anonymous: int) -> None:
        self.per_user, self.total, self.max_anonymous = per_user, total, anonymous
        self.now = 0.0
        self.all: list[Known] = []
        self.registered: list[Known] = []

    # What is there.

    def is_expired(self, known: Known) -> bool:
        return known.deadline is not None and self.now >= known.deadline

    def is_live(self, known: Known) -> bool:
        return known.phase == "live" and not self.is_expired(known)

    def is_usable(self, known: Known) -> bool:
        return all(self.is_live(node) for node in known.ancestors())

    def live(self, owner: str | None = None) -> list[Known]:
        """The contexts that count and are listed."""
        return [known for known in self.registered if self.is_live(known) and owner in (None, known.owner)]

    def at(self, key: Key) -> Known | None:
        """Under a key, expired or not."""
        return next((known for known in self.registered if key in known.keys), None)

    # What may be done. Each raises Refused for what must be refused.

    def require_asker(self, asker: Known | None) -> None:
        if asker is not None and not self.is_usable(asker):
            raise Refused(ContextClosedError)

    def own_key(self, asker: Known | None, key: Key) -> Key:
        self.require_asker(asker)
        return key if asker is None or isinstance(key, tuple) or key == asker.owner else (asker.owner, key)

    def get(self, asker: Known | None, key: Key) -> Known:
        own = self.own_key(asker, key)
        found = self.at(own)
        if found is not None and (asker is None or found.owner == asker.owner):
            if self.is_live(found):
                return found
            raise Refused(ContextExpiredError)
        owner = own if isinstance(own, str) else own[0]
        if asker is not None and (own != key or owner != asker.owner):
            raise Refused(CrossUserAccessError)
        raise Refused(ContextNotFoundError)

    def put(self, asker: Known | None, known: Known, asked: Key, ttl: float | None) -> None:
        """Put a context under a key, new here or not."""
        key = self.own_key(asker, asked)
        if not self.is_usable(known):
            raise Refused(ContextClosedError)
        owner = known.owner
        if (asker is not None and asker.owner != owner) or self.is_foreign(owner, key):
            raise Refused(CrossUserAccessError)
        keys: list[Key] = [key] if isinstance(key, tuple) or key == owner else [key, (owner, key)]
        going = self.must_go(known, keys)
        if known not in self.registered:
            self.require_room(owner, known.anonymous, going)
            self.registered.append(known)
        known.keys += [key for key in keys if key not in known.keys]
        self.take_key_from_squatter(owner)
        for other, reason in going.items():
            self.close(other, reason, asker)
        if ttl is not None:
            self.set_deadline(known, self.now + ttl)

    def is_foreign(self, owner: str, key: Key) -> bool:
        if isinstance(key, tuple):
            return key[0] != owner
        if key == owner:
            return False
        present = self.at(key)
        return (present is not None and self.is_live(present) and present.owner != owner) or bool(self.live(key))

    def must_go(self, newcomer: Known, keys: list[Key]) -> dict[Known, str]:
        """Who has to make way, and why. Those that have expired go as expired ones."""
        going: dict[Known, str] = {}
        for key in keys:
            present = self.at(key)
            if present is None or present is newcomer:
                continue
            reason = "replaced" if present.owner == newcomer.owner else "evicted"
            going[present] = reason if self.is_live(present) else "expired"
        return going

    def require_room(self, owner: str, anonymous: bool, going: dict[Known, str]) -> None:
        staying = [known for known in self.live() if known not in going]
        if anonymous:
            if sum(known.anonymous for known in staying) >= self.max_anonymous:
                raise Refused(ContextLimitError, "anonymous")
        elif sum(known.owner == owner for known in staying) >= self.per_user:
            raise Refused(ContextLimitError, "user")
        elif sum(not known.anonymous for known in staying) >= self.total:
            raise Refused(ContextLimitError, "total")

    def take_key_from_squatter(self, owner: str) -> None:
        """A key that equals a user's id is that user's. Who stood there lives on under its pair."""
        for known in self.registered:
            if owner in known.keys and known.owner != owner:
                known.keys.remove(owner)
                known.keys = known.keys or [(known.owner, known.context.request_id)]

    def bind(self, known: Known, user: str, seconds: float | None, asker: Known | None) -> None:
        """Give it its user, whose credentials last so many seconds more."""
        if not self.is_usable(known):
            raise Refused(ContextClosedError)
        if not known.anonymous:
            if known.owner != user:
                raise Refused(IdentityConflictError)
            self.limit(known, seconds)
            return
        if known.things or known.children:
            raise Refused(IdentityConflictError)
        self.require_room(user, False, {})
        old, known.owner, known.anonymous = known.owner, user, False
        renamed: list[Key] = [(user, key[1]) for key in known.keys if isinstance(key, tuple) and key[0] == old]
        going = self.must_go(known, renamed)
        self.take_key_from_squatter(user)
        known.keys = renamed + [key for key in known.keys if isinstance(key, str)]
        for other, reason in going.items():
            self.close(other, reason, asker)
        self.limit(known, seconds)

    def limit(self, known: Known, seconds: float | None) -> None:
        if seconds is not None:
            known.latest = min(self.now + seconds, math.inf if known.latest is None else known.latest)
            self.set_deadline(known, known.latest if known.deadline is None else known.deadline)

    def set_deadline(self, known: Known, deadline: float) -> None:
        known.deadline = deadline if known.latest is None else min(deadline, known.latest)

    # The end.

    def close(self, known: Known, reason: str, asker: Known | None = None) -> None:
        """It is live no longer, and lets go of its resources, unless it waits for its handler with that."""
        if known.phase != "live":
            return
        known.phase, known.reason = "closing", reason
        known.keys.clear()
        if known in self.registered:
            self.registered.remove(known)
        from_within = asker is not None and known in asker.ancestors()
        if known.inside is None or from_within or reason in INTERRUPTING:
            self.tear_down(known)

    def tear_down(self, known: Known, *, failed: bool = False) -> None:
        """The handler has ended, or failed, or there was none to wait for."""
        known.saw_error = failed or known.reason not in ENDED_WELL
        for child in reversed(known.children.copy()):
            child.phase, child.reason = "closing", known.reason
            self.tear_down(child, failed=known.saw_error)
        known.phase = "closed"
        if known.parent is not None:
            known.parent.children.remove(known)

    def notice_expired(self) -> None:
        """Who has expired may go at any time from then on, whoever notices: only the reason is foretold."""
        for known in [known for known in self.registered if self.is_expired(known)]:
            if not known.context.is_open:
                self.close(known, "expired")
