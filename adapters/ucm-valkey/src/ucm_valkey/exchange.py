"""One step on one connection: sent, answered, and the connection given back in step or thrown away.

A connection is in step when the next reply that comes is that of the next command. Whoever is cancelled between the two
leaves a reply behind, and the next borrower would take it for its own. Two things keep that from happening:

- a connection on which not every reply was read is disconnected before it is given back, whatever the reason;
- each step begins with an ECHO of a fresh random word. Unless exactly that word comes back in its place, nothing that
  was read is given out. So not even a connection that somebody else left out of step, or that an exception of a signal
  handler hit in between any two instructions, answers with another's reply.
"""

import asyncio
import secrets
from typing import Any, TypeVar

from ucm_middleware import ConfigurationError
from ucm_valkey.errors import CacheUnavailableError
from ucm_valkey.library import Fault, Library, Pool
from ucm_valkey.programs import Command, Commands, Login, Program, Replies, Step

T = TypeVar("T")


class Exchange:
    """What both kinds do: a step as commands, and replies as the answer to it."""

    def __init__(self, pool: Pool, library: Library) -> None:
        self.pool = pool
        self.library = library

    @property
    def database(self) -> object:
        """The number of the database that the pool's connections select."""
        return self.pool.connection_kwargs.get("db", 0)

    @property
    def own(self) -> Login:
        """The pool's own login. Raises ConfigurationError when it has none that could be taken again."""
        settings = self.pool.connection_kwargs
        if not settings.get("username") or not settings.get("password"):
            raise ConfigurationError(
                "in the mode of server users, the cache's own pool must have a username and a password, of a login "
                "that may do nothing but ECHO; the login with more rights is for the pool that is given as admin="
            )
        return Login(settings["username"], settings["password"])

    def _commands(self, step: Step, word: bytes) -> Commands:
        commands: tuple[Command, ...] = (("ECHO", word), *step.commands)
        if step.login is not None:
            # In the same round trip. Were the first refused, what follows would be done as the pool's own login, which
            # may do nothing; the last makes the connection that again.
            commands = (_auth(step.login), *commands, _auth(self.own))
        return Commands(commands)

    def _answer(self, step: Step, word: bytes, replies: list[object]) -> Replies:
        if step.login is not None:
            for login in (replies[0], replies[-1]):
                if isinstance(login, Fault):  # it may be somebody else's connection still
                    raise login.error()
            replies = replies[1:-1]
        echoed = replies[0]
        if isinstance(echoed, Fault):
            raise echoed.error()
        if echoed != word:
            raise CacheUnavailableError("out of step")
        return replies[1:]


def check_databases(data: Exchange, admin: Exchange) -> None:
    """Raise ConfigurationError unless the admin pool looks at the database that the entries are in."""
    if int(str(data.database)) != int(str(admin.database)):
        raise ConfigurationError(
            f"the pool selects database {data.database}, and admin database {admin.database}: scan() and clear() would "
            "look where no entries are; give both pools the same db"
        )


class AsyncExchange(Exchange):
    """Runs steps on the connections of an asynchronous pool."""

    def __init__(self, pool: Pool, library: Library) -> None:
        super().__init__(pool, library)
        self._returning: set[asyncio.Task[None]] = set()  # the loop itself keeps tasks only weakly

    async def run(self, step: Step) -> Replies | None:
        """Raises CacheUnavailableError; the answer is None for a login that was refused."""
        word = secrets.token_bytes(12)
        commands = self._commands(step, word)
        try:
            connection: Any = await self.pool.get_connection(*self.library.checkout)
        except (self.library.base, OSError) as error:
            raise self.library.unavailable(error) from None
        in_step = False
        replies: list[object] = []
        task = asyncio.current_task()
        cancelled_before = 0 if task is None else task.cancelling()
        try:
            if await self._is_stale(connection):
                await connection.disconnect(nowait=True)  # it is connected anew when it sends
            await connection.send_packed_command(connection.pack_commands(commands))
            if task is not None and task.cancelling() > cancelled_before:
                # Both clients send by asyncio.wait_for, which before Python 3.12 can swallow a cancellation.
                raise asyncio.CancelledError
            for _ in commands:
                try:
                    replies.append(await connection.read_response(disable_decoding=True))
                except self.library.response as error:
                    replies.append(self.library.fault(error))
            answer = self._answer(step, word, replies)
            in_step = True
            return answer
        except (self.library.base, OSError) as error:
            if isinstance(error, self.library.authentication) and step.login is not None and not replies:
                return None
            raise self.library.unavailable(error) from None
        finally:
            # In a task of its own: a second cancellation must not keep the connection from the pool for ever.
            task = asyncio.get_running_loop().create_task(self._give_back(connection, in_step))
            self._returning.add(task)
            task.add_done_callback(self._returning.discard)
            await asyncio.shield(task)

    async def _is_stale(self, connection: Any) -> bool:
        if self.library.checks_connections:
            return False
        try:
            return bool(await connection.can_read())
        except (self.library.base, OSError):
            return True

    async def _give_back(self, connection: Any, in_step: bool) -> None:
        try:
            if not in_step:
                await connection.disconnect(nowait=True)
        finally:
            await self.pool.release(connection)


class SyncExchange(Exchange):
    """The same on the connections of a blocking pool."""

    def run(self, step: Step) -> Replies | None:
        """Raises CacheUnavailableError; the answer is None for a login that was refused."""
        word = secrets.token_bytes(12)
        commands = self._commands(step, word)
        try:
            connection: Any = self.pool.get_connection(*self.library.checkout)
        except (self.library.base, OSError) as error:
            raise self.library.unavailable(error) from None
        in_step = False
        replies: list[object] = []
        try:
            if self._is_stale(connection):
                connection.disconnect()  # it is connected anew when it sends
            connection.send_packed_command(connection.pack_commands(commands))
            for _ in commands:
                try:
                    replies.append(connection.read_response(disable_decoding=True))
                except self.library.response as error:
                    replies.append(self.library.fault(error))
            answer = self._answer(step, word, replies)
            in_step = True
            return answer
        except (self.library.base, OSError) as error:
            if isinstance(error, self.library.authentication) and step.login is not None and not replies:
                return None
            raise self.library.unavailable(error) from None
        finally:
            try:
                if not in_step:
                    connection.disconnect()
            finally:
                self.pool.release(connection)

    def _is_stale(self, connection: Any) -> bool:
        if self.library.checks_connections:
            return False
        try:
            return bool(connection.can_read())
        except (self.library.base, OSError):
            return True


class AsyncRunner:
    """Runs programs on one or two asynchronous pools."""

    def __init__(self, data: AsyncExchange, admin: AsyncExchange) -> None:
        self._data = data
        self._admin = admin

    async def run(self, program: Program[T]) -> T:
        """Take the program to its end; what the server cannot do is raised, and ends the program."""
        try:
            step = next(program)
            while True:
                step = program.send(await (self._admin if step.by_admin else self._data).run(step))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            program.close()


class SyncRunner:
    """The same on blocking pools."""

    def __init__(self, data: SyncExchange, admin: SyncExchange) -> None:
        self._data = data
        self._admin = admin

    def run(self, program: Program[T]) -> T:
        """Take the program to its end; what the server cannot do is raised, and ends the program."""
        try:
            step = next(program)
            while True:
                step = program.send((self._admin if step.by_admin else self._data).run(step))
        except StopIteration as end:
            result: T = end.value
            return result
        finally:
            program.close()


def _auth(login: Login) -> Command:
    return ("AUTH", login.name, login.password)
