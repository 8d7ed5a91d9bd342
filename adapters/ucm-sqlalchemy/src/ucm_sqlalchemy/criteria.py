"""Criteria for classes whose rows have an owner: a convenience where the database knows no users, and no boundary.

Whatever does not go through the session's ORM, such as ``text()`` and Core's own tables, goes around it.
"""

from collections.abc import Callable
from typing import Any

from sqlalchemy import String, event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    Mapped,
    ORMExecuteState,
    Session,
    UOWTransaction,
    mapped_column,
    with_loader_criteria,
)

from ucm_middleware import CrossUserAccessError


class UserOwned:
    """For classes whose rows have an owner: ``class Note(UserOwned, Base)``."""

    owner_id: Mapped[str] = mapped_column(String(256), index=True)


def scope_session(owned: type[UserOwned]) -> Callable[[Session | AsyncSession, str], None]:
    """What has a session see and write, of the classes that inherit from ``owned``, the rows of one user."""

    def scope(session: Session | AsyncSession, user_id: str) -> None:
        def add_criteria(state: ORMExecuteState) -> None:
            if state.is_select or state.is_update or state.is_delete:
                criteria = with_loader_criteria(owned, lambda cls: cls.owner_id == user_id, include_aliases=True)
                state.statement = state.statement.options(criteria)

        def own_rows(session: Session, context: UOWTransaction, instances: Any) -> None:
            for instance in [*session.new, *session.dirty, *session.deleted]:
                if isinstance(instance, owned):
                    if instance.owner_id is None:  # pyright: ignore[reportUnnecessaryComparison] - not yet filled in
                        instance.owner_id = user_id
                    elif instance.owner_id != user_id:
                        raise CrossUserAccessError(f"{type(instance).__qualname__}: owner_id is another user's")

        target = session.sync_session if isinstance(session, AsyncSession) else session
        event.listen(target, "do_orm_execute", add_criteria)
        event.listen(target, "before_flush", own_rows)

    return scope
