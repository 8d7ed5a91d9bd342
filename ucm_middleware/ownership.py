"""Who may use what a context owns: one check for a handle and for all that came out of it."""

# pyright: reportPrivateUsage=false

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final, final

from ucm_middleware.callsite import as_text, caller
from ucm_middleware.current import ambient
from ucm_middleware.errors import ContextClosedError, CrossUserAccessError, HandleRevokedError
from ucm_middleware.lifetime import OPEN

if TYPE_CHECKING:
    from ucm_middleware.context import UserExecutionContext
    from ucm_middleware.host import ContextHost

_NOBODY: Final = object()


class Ownership:
    """Binds a target, and what is derived from it, to the context that owns it.

    ``insider`` is the context whose own code needs no closer look while it is open. ``outer`` is whose handle this one
    was made of: that must be of use too.
    """

    __slots__ = ("_cells", "_host", "_made_at", "_outer", "also", "insider", "is_revoked", "lifetime", "name", "owner")

    def __init__(self, owner: "UserExecutionContext", name: str, outer: "Ownership | None" = None) -> None:
        self.owner = owner
        self.lifetime = owner.lifetime
        # A child ends with its parents' deadlines too, which is the closer look.
        self.insider: object = owner if owner.operation_depth == 0 and outer is None else _NOBODY
        self.name = name
        # What plugins have named, to be owned where it comes out of a use.
        self.also: tuple[type, ...] = () if owner.host is None else owner.host.owned_types
        self.is_revoked = False
        self._outer = outer
        self._cells: dict[int, Cell] = {}
        self._made_at = caller()
        self._host: ContextHost | None = None

    @property
    def state(self) -> str:
        """In a word, for a repr."""
        return "revoked" if self.is_revoked else self.lifetime.state.value

    def require(self) -> None:
        """Raise unless the asking code may use what is owned, now.

        CrossUserAccessError, recorded by the manager, in another user's context; ContextClosedError from the closing
        on, except in the releases of the context and of its children; HandleRevokedError.

        Code in no context has been given the handle, and that is its permission: nothing else tells a thread of the
        owner's from another.
        """
        self.require_user()
        if self.is_revoked:
            raise HandleRevokedError(self.owner.request_id, self.lifetime.where(), self.described())
        if self._outer is not None:
            self._outer.require()
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
        return ContextClosedError(self.owner.request_id, lifetime.where(), lifetime.why, self.described())

    def described(self) -> str:
        """The handle's name and where it was made, for an error."""
        return f"{self.name}, made at {as_text(self._made_at)}"

    def targets(self) -> list[object]:
        """What handles stand for, the one from ``own`` first."""
        return [target for cell in list(self._cells.values()) if (target := cell.target) is not None]

    def keep(self, cell: "Cell") -> None:
        """Take a handle's cell in, to empty it at the teardown; at once when that is through."""
        self._cells[id(cell)] = cell
        handles = self.owner._handles
        if handles is None:
            self.end()
        else:
            handles[id(self)] = self

    def forget(self, cell: "Cell") -> None:
        """A handle is gone; with the last one, so is the reason to remember any of it."""
        self._cells.pop(id(cell), None)
        if not self._cells and (handles := self.owner._handles) is not None:
            handles.pop(id(self), None)

    def revoke(self) -> None:
        """Refuse every use from now on. The targets stay until the teardown, so that blocks can still be left."""
        self.is_revoked = True
        self.insider = _NOBODY

    def end(self) -> None:
        """The teardown is through: let go of the targets, and remember who records what is denied later."""
        self._host = self.owner.host or self._host
        self.insider = _NOBODY
        for cell in list(self._cells.values()):
            cell.target = None
        self._cells.clear()


@final
class Cell:
    """What one handle stands for. Emptied at the teardown, so that a handle that is kept keeps nothing else alive.

    ``parent`` is the handle that this one came out of. ``methods`` has, by their names, what stands for the plain
    methods of the target's type.
    """

    __slots__ = ("kind", "methods", "ownership", "parent", "target")

    def __init__(
        self,
        ownership: Ownership,
        target: object,
        kind: type,
        methods: Mapping[str, Callable[..., Any]],
        parent: object,
    ) -> None:
        self.ownership = ownership
        self.target: Any = target
        self.kind = kind
        self.methods = methods
        self.parent = parent

    def use(self) -> Any:
        """The target, for one use of it by the asking code. Raises what ``Ownership.require`` raises."""
        ownership = self.ownership
        lifetime = ownership.lifetime
        if (
            ambient.get() is not ownership.insider
            or lifetime.state is not OPEN
            or (lifetime.deadline is not None and lifetime.is_expired)
            or (lifetime.lease is not None and not lifetime.lease.is_held)
        ):
            ownership.require()
        target = self.target
        if target is None:
            raise ownership.closed_error()
        return target


def _is_release_of_child(owner: "UserExecutionContext") -> bool:
    """Whether the asking code releases what a child holds, which happens while the parent is closing."""
    inside = ambient.get()
    context: Any = None if inside is None else inside.context
    if owner.is_open or context is None or context.is_open or not context.lifetime.permits_use:
        return False
    while context is not None and context is not owner:
        context = context._parent
    return context is owner
