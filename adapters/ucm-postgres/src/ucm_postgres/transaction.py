"""One transaction of a user's on a connection of a pool, whichever the driver."""

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Final, Generic, Protocol, TypeVar

from ucm_middleware import (
    HandleRevokedError,
    IsolationLevel,
    StatementResult,
    TransactionLog,
    UserExecutionContext,
    current_context,
    hookimpl,
)
from ucm_postgres.binding import Binding
from ucm_postgres.blocks import Nesting, inside, is_same, outcome_is_unknown, revoke
from ucm_postgres.checks import check_isolation_level, check_savepoint_level, role_error
from ucm_postgres.leftovers import Leftovers
from ucm_postgres.mark import Mark, Reported

logger = logging.getLogger(__name__)

GRACE: Final = 5.0
"""Seconds that a rollback, or the end of a transaction that nobody waits for any more, may take. Then the connection is
closed."""


class Connection(Protocol):
    """What is needed of every driver's connection."""

    def transaction(self) -> AbstractAsyncContextManager[Any]: ...


C = TypeVar("C", bound=Connection)


class UserTransaction(ABC, Generic[C]):
    """A connection is taken from the pool, and bound to the user, when it is first asked for.

    ``end`` and ``abandon`` run to their end whoever is cancelled meanwhile, and what is not known to be clean by then
    is closed, so that the pool makes a new one.
    """

    def __init__(
        self, context: UserExecutionContext, binding: Binding, database: str, isolation_level: IsolationLevel | None
    ) -> None:
        check_isolation_level(isolation_level)
        self.context = context
        self.isolation_level: IsolationLevel | None = isolation_level
        self.log = TransactionLog(context, database, isolation_level=isolation_level, **binding.about)
        self._binding = binding
        self._connection: C | None = None
        self._handle: C | None = None
        self._mark: Mark | None = None
        self._starting = asyncio.Lock()
        self._ending: asyncio.Task[None] | None = None
        self._is_over = False
        self._is_abandoned = False
        self._is_committing = False
        self.nesting = Nesting()

    # What the core asks for.

    @property
    def session(self) -> "Session[C]":
        return Session(self)

    async def execute(self, statement: object, parameters: object) -> StatementResult:
        return await self._run(await self._started(), statement, parameters)

    def end(self, error: BaseException | None) -> Awaitable[None] | None:
        """Commit, or with an error roll back, and give the connection back. The second time does nothing."""
        if self._is_abandoned and error is None:
            raise self._over_error()  # what was done is rolled back
        self._is_over = True  # what is about to begin is refused
        # No task yet: this may be called in a thread, and awaited on the loop.
        return None if self._connection is None else self._end_once(self._connection, error)

    # What applications work with.

    @property
    def is_open(self) -> bool:
        """Whether there is a connection, and it is not being given back."""
        return self._connection is not None and not self._is_over

    async def connection(self) -> C:
        """The connection, as an owned handle that is good until the end of the transaction."""
        connection = await self._started()
        if self._handle is None:
            self._handle = self.context.own(connection, name="transaction")
        return self._handle

    async def abandon(self) -> None:
        """Close the connection, whatever is under way on it, and give it back: the context is gone."""
        self._is_over = True
        connection = self._connection
        if connection is None:
            return
        self._is_abandoned = self._ending is None
        if self._ending is None:
            self._look(connection, None)
            self._cut(connection)
            self._ending = asyncio.ensure_future(self._throw_away(connection, None))
        else:
            self._cut_in_time(connection, self._ending)
        await asyncio.wait((self._ending,))

    # What each driver does in its own way.

    @abstractmethod
    async def _acquire(self) -> C: ...

    @abstractmethod
    async def _begin(self, connection: C, settings: tuple[tuple[str, str], ...]) -> None: ...

    @abstractmethod
    async def _run(self, connection: C, statement: object, parameters: object) -> StatementResult: ...

    @abstractmethod
    def _reports(self, connection: C) -> Reported: ...

    @abstractmethod
    async def _refusal(self, connection: C) -> Exception | None:
        """Why a COMMIT would not commit, though no error left the block; None when it would."""

    @abstractmethod
    def _has_ended(self, connection: C) -> bool:
        """Whether SQL has ended the transaction, as far as is known without asking."""

    @abstractmethod
    async def _commit(self, connection: C) -> None: ...

    @abstractmethod
    async def _roll_back(self, connection: C, error: BaseException) -> None:
        """Raise when the connection is not certainly outside of any transaction after it."""

    @abstractmethod
    async def _give_back(self, connection: C) -> None: ...

    @abstractmethod
    def _cut(self, connection: C) -> None:
        """Cut it off from the server, so that whatever waits for an answer on it fails. It may be closed already."""

    @abstractmethod
    async def _discard(self, connection: C) -> None:
        """Close it without a word to the server, and let the pool know. It may be closed already."""

    # Inside.

    async def _started(self) -> C:
        if self._connection is None:
            async with self._starting:
                if self._connection is None:
                    await self._start()
        if self._is_over or self._connection is None:
            raise self._over_error()
        return self._connection

    async def _start(self) -> None:
        self._require_usable()
        self.log.begin()
        try:
            connection = await self._acquire()
        except BaseException as error:
            self.log.rollback(error)
            raise
        try:
            # Now, and not before: a signed value ages while the pool lets wait.
            settings = self._binding.settings(self.context)
            self.context.bind_session(connection)
        except BaseException as error:
            self.log.rollback(error)
            await self._see_through(connection, asyncio.ensure_future(self._give_back(connection)))
            raise
        try:
            self._mark = mark = Mark(self._reports(connection))
            await self._begin(connection, (*settings, *mark.settings))
            mark.begun()
            self._require_usable()  # it may have closed meanwhile
        except BaseException as error:
            self.log.rollback(error)
            await self._see_through(connection, asyncio.ensure_future(self._discard(connection)))
            if (role_refused := role_error(self._binding, error)) is not None:
                raise role_refused from error
            raise
        self._connection = connection

    def _require_usable(self) -> None:
        self._binding.require_user(self.context)
        if self._is_over:
            raise self._over_error()

    def _look(self, connection: C, error: BaseException | None) -> None:
        """What SQL has ended is not rolled back here: perhaps it was committed."""
        if self._has_ended(connection):
            self.log.lost(error)

    def _over_error(self) -> HandleRevokedError:
        return HandleRevokedError(self.context.request_id, self.context.lifetime.where(), "transaction")

    async def _end(self, connection: C, error: BaseException | None) -> None:
        refusal: Exception | None = None
        try:
            if self._handle is not None:
                revoke(self._handle)
            if error is None:
                error = refusal = await self._refusal(connection)
            if error is None:
                self._is_committing = True
                await self._commit(connection)
                self.log.commit()
            else:
                timer = asyncio.get_running_loop().call_later(GRACE, self._cut, connection)
                try:
                    await self._roll_back(connection, error)
                finally:
                    timer.cancel()
                self.log.rollback(error)
        except BaseException as failed:
            await self._throw_away(connection, error or failed)
            if error is None or not isinstance(failed, Exception):
                raise
        else:
            await self._return(connection)
        if refusal is not None:  # else it is what the application raised that matters
            raise refusal

    async def _return(self, connection: C) -> None:
        try:
            await self._give_back(connection)
        except Exception:
            logger.warning("a connection could not be reset, and is closed", exc_info=True)
            await self._discard(connection)

    async def _throw_away(self, connection: C, error: BaseException | None) -> None:
        if self._is_committing and outcome_is_unknown(error):
            self.log.lost(error)
        else:
            self.log.rollback(error)
        try:
            if self._handle is not None:
                revoke(self._handle)
        finally:
            await self._discard(connection)

    async def _end_once(self, connection: C, error: BaseException | None) -> None:
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end(connection, error))
            await self._see_through(connection, self._ending)
        else:
            await asyncio.wait((self._ending,))

    async def _see_through(self, connection: C, ending: "asyncio.Future[None]") -> None:
        """Wait until it has ended. Who is cancelled waits no longer; it goes on, and has a little time more."""
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            if not ending.done():
                self._cut_in_time(connection, ending)
            raise

    def _cut_in_time(self, connection: C, ending: "asyncio.Future[None]") -> None:
        """Cut the connection off unless it has ended by then. Afterwards it may be somebody else's."""
        timer = asyncio.get_running_loop().call_later(GRACE, self._cut, connection)
        ending.add_done_callback(partial(_let_go, timer))


class Session(Generic[C]):
    """What a context from ``create_context_with_transaction`` has as its ``db_session``."""

    __slots__ = ("_transaction",)

    def __init__(self, transaction: UserTransaction[C]) -> None:
        self._transaction = transaction

    async def connection(self) -> C:
        """The driver's connection, inside of the transaction: begun now, if it was not."""
        return await self._transaction.connection()

    async def execute(self, statement: object, parameters: object = None) -> StatementResult:
        """Run one statement. ``parameters`` are those of the driver."""
        return await self._transaction.execute(statement, parameters)


class UserTransactions(ABC, Generic[C]):
    """What the pools of each driver have in common: transactions of the user that the code runs for."""

    UCM_HOOK_API = 1

    def __init__(self, binding: Binding | None) -> None:
        self._binding = binding or Binding()
        self._leftovers: Leftovers[UserTransaction[C]] = Leftovers(UserTransaction[C].abandon)
        # By the code that is inside of the block, and not by the context: tasks of one context may have one each. The
        # number is how many savepoints deep that code is.
        self._current: ContextVar[tuple[UserTransaction[C], int] | None] = ContextVar(
            "ucm_postgres_transaction", default=None
        )

    @abstractmethod
    def _open(self, context: UserExecutionContext, isolation_level: IsolationLevel | None) -> UserTransaction[C]: ...

    @hookimpl
    def ucm_open_transaction(
        self, context: UserExecutionContext, isolation_level: IsolationLevel | None
    ) -> UserTransaction[C]:
        return self._open(context, isolation_level)

    @asynccontextmanager
    async def transaction(self, *, isolation_level: IsolationLevel | None = None) -> AsyncGenerator[C]:
        """A transaction of the user that the calling code runs for: its connection, bound, as an owned handle.

        Committed at the end of the block, rolled back after an error. A block inside of the block is a savepoint on the
        same connection; where tasks work in one block, one of them at a time. When the context closes first, the
        connection is closed.

        Raises ContextNotFoundError outside of a context, UnauthenticatedError in an anonymous one, ContextClosedError,
        ConfigurationError for another isolation level, for one of a savepoint, and for a role that the login cannot
        take on; RuntimeError for savepoints of two tasks that overlap; and what the driver raises, also for a
        transaction in which the block has caught an error, since all of it is rolled back.
        """
        context = current_context()
        outer, depth = self._current.get() or (None, 0)
        if outer is not None and outer.is_open and is_same(self._binding, outer.context, context):
            check_savepoint_level(isolation_level, outer.isolation_level)
            connection = await outer.connection()
            with outer.nesting.savepoint(depth), inside(self._current, (outer, depth + 1)):
                async with connection.transaction():
                    yield connection
                    outer.nesting.require_innermost(depth + 1)
            return
        self._binding.require_user(context)  # before anything counts as a use of a context that may still get its user
        transaction = self._open(context, isolation_level)
        with self._leftovers.watch(context, transaction):
            try:
                connection = await transaction.connection()
                with inside(self._current, (transaction, 0)):
                    yield connection
                transaction.nesting.require_innermost(0)
                context.require_usable()  # its deadline may have come, though nothing has closed it yet
            except BaseException as error:
                await _ended(transaction, error)
                raise
            else:
                await _ended(transaction, None)


async def _ended(transaction: UserTransaction[Any], error: BaseException | None) -> None:
    if (ending := transaction.end(error)) is not None:
        await ending


def _let_go(timer: asyncio.TimerHandle, ended: "asyncio.Future[None]") -> None:
    timer.cancel()
    if not ended.cancelled():
        ended.exception()  # seen: nobody waits for it
