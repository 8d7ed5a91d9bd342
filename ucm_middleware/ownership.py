"""Who may use what a context owns: one check for a handle and for all that came out of it."""

from typing import TYPE_CHECKING, Any, Final

from ucm_middleware.callsite import as_text, caller
from ucm_middleware.current import ambient
from ucm_middleware.errors import ContextClosedError, CrossUserAccessError, HandleRevokedError

if TYPE_CHECKING:
    from ucm_middleware.context import UserExecutionContext
    from ucm_middleware.host import ContextHost

_NOBODY: Final = object()


class Ownership:
    """Binds a target, and what is derived from it, to the context that owns it.

    The targets are kept here and not in the handles: so that one step takes them away from all of them, and a handle
    that is kept does not keep its target. ``insider`` is the context whose own code needs no closer look.
    """

    __slots__ = ("_host", "_made_at", "insider", "is_revoked", "lifetime", "name", "owner", "targets")

    def __init__(self, owner: "UserExecutionContext", name: str) -> None:
        self.owner = owner
        self.lifetime = owner.lifetime
        # A child ends with its parents' deadlines too, which is the closer look.
        self.insider: object = owner if owner.operation_depth == 0 else _NOBODY
        self.name = name
        self.targets: dict[int, Any] = {}
        self.is_revoked = False
        self._made_at = caller()
        self._host: ContextHost | None = None

    @property
    def state(self) -> str:
        """In a word, for a repr."""
        return "revoked" if self.is_revoked else self.lifetime.state.value

    def require(self) -> None:
        """Raise unless the asking code may use what is owned, now.

        CrossUserAccessError, recorded by the manager, in another user's context; ContextClosedError from the closing on,
        except in the releases of the context and of its children; HandleRevokedError.

        Code in no context has been given the handle, and that is its permission: nothing else tells a thread of the
        owner's from another.
        """
        self.require_user()
        if self.is_revoked:
            raise HandleRevokedError(self.owner.request_id, self.lifetime.where(), self.described())
        if not self.lifetime.permits_use and _is_release_of_child(self.owner):
            return
        try:
            self.owner.require_usable()
        except ContextClosedError:
            raise self.closed_error() from None

    def require_user(self) -> None:
        """Raise CrossUserAccessError, recorded, in another user's context and no grant; ContextClosedError in code
        that outlived its own.
        """
        inside = ambient.get()
        context = None if inside is None else inside.context
        if context is None or context is self.owner:
            return
        context.require_usable()
        user_id = self.owner.user_id
        if context.user_id == user_id:
            return
        host = self.owner.host or self._host or context.host
        if host is None:
            raise CrossUserAccessError(f"handle {self.name}: this code runs in another user's context")
        host.require_owner(user_id, f"handle {self.name}")

    def closed_error(self) -> ContextClosedError:
        """The error for a use that comes too late."""
        lifetime = self.lifetime
        return ContextClosedError(
            self.owner.request_id, lifetime.where(), lifetime.reason or "expired", self.described()
        )

    def described(self) -> str:
        """The handle's name and where it was made, for an error."""
        return f"{self.name}, made at {as_text(self._made_at)}"

    def keep(self, place: int, target: object) -> None:
        """Hold a target for the handle at this place, unless the teardown is through."""
        self.targets[place] = target
        if self.owner._handles is None:
            self.targets.clear()

    def forget(self, place: int) -> None:
        """The handle at this place is gone; with the last one, so is the reason to remember any of it."""
        self.targets.pop(place, None)
        if not self.targets and (handles := self.owner._handles) is not None:
            handles.pop(id(self), None)

    def revoke(self) -> None:
        """Refuse every use from now on. The targets stay until the teardown, so that blocks can still be left."""
        self.is_revoked = True
        self.insider = _NOBODY

    def end(self) -> None:
        """The teardown is through: let go of the targets, and remember who records what is denied later."""
        self._host = self.owner.host
        self.insider = _NOBODY
        self.targets.clear()


def _is_release_of_child(owner: "UserExecutionContext") -> bool:
    """Whether the asking code releases what a child holds, which happens while the parent is closing."""
    inside = ambient.get()
    context: Any = None if inside is None else inside.context
    if owner.is_open or context is None or context.is_open or not context.lifetime.permits_use:
        return False
    while context is not None and context is not owner:
        context = context._parent
    return context is owner
