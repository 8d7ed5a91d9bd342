"""What the middleware adds: pages that ask the context itself, for its user and for the supervisor."""

import threading
from collections import Counter
from typing import Annotated, Any

from fastapi import APIRouter, Depends, HTTPException

from examples.helpdesk.store import Desk
from ucm_middleware import EVERYONE, UserContextManager, UserExecutionContext
from ucm_middleware.audit.memory import MemoryLedger
from ucm_middleware.audit.records import Row
from ucm_middleware.fastapi import AuthenticatedContext


class CountingLedger(MemoryLedger):
    """Keeps the newest records of each user, as the default does, and counts all of them by event."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter[str]()
        self._counting = threading.Lock()

    def append(self, row: Row) -> None:
        """Count the record, and keep it."""
        event = row[0]
        with self._counting:
            self.counts[event] += 1
        super().append(row)


# One manager for the application. The default is ten contexts per user; with chats and exports open that is tight.
ledger = CountingLedger()
manager = UserContextManager(max_contexts_per_user=40, ledger=ledger)
router = APIRouter()


@router.get("/me")
async def me(context: AuthenticatedContext) -> dict[str, Any]:
    """Who I am, and the audit trail of what was done in my name."""
    return {"user": context.user_id, "request": context.request_id, "trail": manager.get_audit_trail(context.user_id)}


async def supervising(context: AuthenticatedContext) -> UserExecutionContext:
    """Let the supervisor pass."""
    if context.user_id != "supervisor":
        raise HTTPException(403, "supervisors only")
    return context


Supervising = Annotated[UserExecutionContext, Depends(supervising)]


@router.get("/supervisor/trail/{user}")
async def trail(user: str, _: Supervising) -> dict[str, Any] | None:
    """The audit trail of one user. To look at another user's affairs takes a reason, and that is recorded too."""
    with manager.privileged(reason="the supervisor reads an audit trail", users=[user]):
        return manager.get_audit_trail(user)


@router.get("/supervisor/contexts")
async def contexts(_: Supervising) -> dict[str, int]:
    """Contexts opened, closed and open so far, and database connections. The context of this request is left out."""
    with manager.privileged(reason="the supervisor counts contexts", users=EVERYONE):
        still_open = manager.get_active_contexts()
    return {
        "opened": ledger.counts["opened"] - 1,
        "closed": ledger.counts["closed"],
        "open": len(still_open) - 1,
        "connections_opened": Desk.opened,
        "connections_closed": Desk.closed,
    }
