"""Who a statement runs for: a context's user, nobody, or, in a block that is on record, code that is nobody's."""

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from ucm_django import conf
from ucm_middleware import EVERYONE, ConfigurationError, ContextNotFoundError, UserExecutionContext, current_context
from ucm_postgres import Binding

Settings = tuple[tuple[str, str], ...]


class Block:
    """One ``with`` block of ``unbound`` or ``nobody``, entered in a context or outside of any.

    It ends for tasks and threads that inherited it, too, and it does not reach into contexts that are entered inside.
    """

    __slots__ = ("_context_id", "alive")

    def __init__(self) -> None:
        context = _context_here()
        self._context_id = None if context is None else context.context_id
        self.alive = True

    def covers(self, context: UserExecutionContext | None) -> bool:
        return self.alive and self._context_id == (None if context is None else context.context_id)


_unbound: ContextVar[Block | None] = ContextVar("ucm_django_unbound", default=None)
_nobody: ContextVar[Block | None] = ContextVar("ucm_django_nobody", default=None)


@dataclass(frozen=True, slots=True)
class Runner:
    """Who a statement runs for.

    ``context`` is None in an ``unbound`` block; ``user_id`` is None there, and where a context's statements run as
    nobody.
    """

    context: UserExecutionContext | None
    user_id: str | None
    block: Block | None = None

    @property
    def hands(self) -> "Hands":
        """In whose hands its connection is."""
        return Hands(self.block, self.user_id, None if self.context is None else self.context.context_id)

    def settings(self, binding: Binding) -> Settings:
        """What its transaction is told. Raises as ``Binding.settings`` does."""
        if self.context is None:
            return ()
        if self.user_id is not None:
            return binding.settings(self.context)
        # Said and not left out: then it does not depend on what the session was told before.
        if binding.role_of is not None:
            raise ConfigurationError(
                "role_of gives each user a role, and nobody has none: a statement that runs as nobody cannot have one"
            )
        emptied = (binding.setting, "")
        return (emptied,) if binding.role is None else (emptied, ("role", binding.role))

    def runs_as(self, other: "Runner") -> bool:
        """Whether a transaction of ``other`` may go on for this one."""
        if self.context is None or other.context is None:
            return self.block is other.block
        if self.user_id is None or other.user_id is None:
            return self.user_id is other.user_id and self.context is other.context
        return self.user_id == other.user_id


@dataclass(frozen=True, slots=True)
class Hands:
    """What a connection remembers of whose statements it ran last. It keeps no context alive."""

    block: Block | None
    user_id: str | None
    context_id: str | None

    def are(self, other: "Hands") -> bool:
        """Whether the same user, or the same context, has it still: a context may have learned its user meanwhile."""
        if self.block is not None or other.block is not None:
            return self.block is other.block
        return self.context_id == other.context_id or (self.user_id is not None and self.user_id == other.user_id)


def runner_here() -> Runner:
    """Who a statement of the calling code runs for.

    Raises ContextNotFoundError outside of a context, ContextClosedError in code that outlived its own. That an
    anonymous context is refused is the binding's doing, unless ``UCM_ANONYMOUS`` says otherwise.
    """
    context = _context_here()
    block = _unbound.get()
    if block is not None and block.covers(context):
        return Runner(None, None, block)
    if context is None:
        context = current_context()  # which says what is missing
    block = _nobody.get()
    if (block is not None and block.covers(context)) or (context.is_anonymous and conf.anonymous() == "nobody"):
        return Runner(context, None)
    return Runner(context, context.user_id)


def _context_here() -> UserExecutionContext | None:
    """The running context, None outside. Raises ContextClosedError in code that outlived its own."""
    try:
        return current_context()
    except ContextNotFoundError:
        return None


@contextmanager
def unbound(*, reason: str) -> Generator[None]:
    """``with unbound(reason="nightly report"):`` - statements of the block are tied to no user.

    For management commands and migrations on a database whose connections are otherwise tied to users. What its login
    may see without a user is the policies' to say. It is what ``manager.privileged(reason=..., users=EVERYONE)`` is,
    and on record like it before the first statement; the manager is the project's, ``UCM_MANAGER``.

    Raises ConfigurationError without a manager, InvalidContextError for an empty reason, and what the ledger raises.
    """
    manager = conf.manager()
    if manager is None:
        raise ConfigurationError(
            "unbound() puts on record that statements ran for no user, and there is no manager to do so: "
            "name it in settings.UCM_MANAGER, such as 'project.asgi.manager'"
        )
    with manager.privileged(reason=reason, users=EVERYONE), _entered(_unbound):
        yield


@contextmanager
def nobody() -> Generator[None]:
    """``with nobody():`` - statements of the block run in the context at hand, as nobody: the setting that policies
    read is empty, so that they match no row.

    For what must be read before the user is known, such as sessions and accounts, in tables without row policies.
    """
    with _entered(_nobody):
        yield


@contextmanager
def _entered(variable: ContextVar[Block | None]) -> Generator[None]:
    block = Block()
    token = variable.set(block)
    try:
        yield
    finally:
        block.alive = False
        variable.reset(token)
