"""ServerUsers: each user of the application is a user of the server, which then tells their keys apart itself.

The server's users are made when they are first needed: a derived name, a derived password that the server is given as
its hash, the user's own keys, no channels, and exactly the commands that a cache sends. They expire: next to each is an
entry with a time to live, and users without one are removed.
"""

import time
from collections.abc import Callable
from hashlib import sha256
from typing import Final, cast
from weakref import WeakKeyDictionary

from ucm_middleware import ConfigurationError, UserExecutionContext, hookimpl
from ucm_valkey.keys import UserKeys
from ucm_valkey.library import LONGEST, Fault
from ucm_valkey.programs import Command, Login, Program, Step, checked

COMMANDS: Final = (
    "+echo", "+get", "+mget", "+set", "+unlink", "+del", "+incrby", "+pexpire", "+pttl", "+eval", "+multi", "+exec",
)  # fmt: skip
"""What a server user may do, on its own keys."""

_MOST_REMEMBERED: Final = 10_000


class ServerUsers:
    """The users of one cache on the server. ``keep`` is how long, in seconds, one stays that nobody uses.

    Of one process; others that use the same cache make and keep the same users.
    """

    def __init__(self, group: str, keep: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not 1 <= keep <= LONGEST:
            raise ConfigurationError(f"keep_users must be a number of seconds from 1 to {LONGEST:g}, not {keep!r}")
        self._prefix = f"ucm_{group}_"
        self._keep = keep
        self._clock = clock
        self._fresh_until: dict[str, float] = {}
        self._sweep_at = clock() + keep
        self._is_checked = False
        self.revoked: set[str] = set()
        """The names of those who are to be removed at the next occasion."""

    def prepare(self, login: Login, keys: UserKeys) -> Program[None]:
        """See to it that the user is there and stays for now. Mostly there is nothing to do."""
        if self.revoked:
            yield from self.remove(sorted(self.revoked))
        if self._fresh_until.get(login.name, 0.0) <= self._clock():
            yield from self.make(login, keys)

    def make(self, login: Login, keys: UserKeys) -> Program[None]:
        """Make the user, or make it as it should be."""
        if not self._is_checked:
            yield from self.check(keys)
        now = self._clock()
        hashed = sha256(login.password.encode()).hexdigest()
        made: Command = (
            *("ACL", "SETUSER", login.name, "reset", "on", f"#{hashed}", "resetchannels", "-@all"),
            *(b"~" + keys.prefix + b"*", *COMMANDS),
        )
        replies = yield Step((made, ("SET", _marker(login.name), "1", "EX", round(self._keep))), by_admin=True)
        for reply in replies or ():
            checked(reply)
        if len(self._fresh_until) >= _MOST_REMEMBERED:
            self._fresh_until.clear()
        self._fresh_until[login.name] = now + self._keep / 2
        if now >= self._sweep_at:
            yield from self.sweep()

    def check(self, keys: UserKeys) -> Program[None]:
        """Raise ConfigurationError unless the pool's own login may do nothing: it is what a refused login falls
        back to."""
        key = keys.prefix  # no entry's: names are not empty. Nor would any of these change one.
        probes: tuple[Command, ...] = (
            *(("GET", key), ("MGET", key), ("SET", key, "", "XX", "PX", 1), ("INCRBY", key, "none")),
            *(("PEXPIRE", key, 1), ("PTTL", key), ("UNLINK", key), ("DEL", key), ("EVAL", "return 1", 0)),
        )
        replies = yield Step(probes)
        if replies is None or any(reply != Fault("NOPERM") for reply in replies):
            raise ConfigurationError(
                "the login of the cache's own pool may do more than ECHO, and in the mode of server users it must be "
                "able to do nothing else: make one with ACL SETUSER ucm_gate on '>...' -@all +echo, and give the login "
                "with more rights as admin="
            )
        self._is_checked = True

    def sweep(self) -> Program[int]:
        """Remove the users that nobody has used for long. Returns how many."""
        self._sweep_at = self._clock() + self._keep
        reply = checked(((yield Step((("ACL", "USERS"),), by_admin=True)) or [[]])[0])
        names = [name.decode() for name in cast("list[bytes]", reply) if name.startswith(self._prefix.encode())]
        if not names:
            return 0
        marked = (yield Step(tuple(("EXISTS", _marker(name)) for name in names), by_admin=True)) or ()
        idle = [name for name, mark in zip(names, marked, strict=True) if checked(mark) == 0]
        return (yield from self.remove(idle)) if idle else 0

    def remove(self, names: list[str]) -> Program[int]:
        """Remove these users; the server closes their connections. Returns how many there were."""
        commands: tuple[Command, ...] = (("ACL", "DELUSER", *names), ("UNLINK", *map(_marker, names)))
        revoked = self.revoked.intersection(names)
        self.revoked -= revoked
        for name in names:
            self._fresh_until.pop(name, None)
        try:
            removed, _ = map(checked, (yield Step(commands, by_admin=True)) or (0, 0))
        except BaseException:
            self.revoked |= revoked  # they are there still
            raise
        return cast(int, removed)


class Revocations:
    """Notes who is revoked. ``logins`` are the names that contexts which asked for a cache have on the server."""

    def __init__(self, users: ServerUsers) -> None:
        self._users = users
        self.logins: WeakKeyDictionary[UserExecutionContext, str] = WeakKeyDictionary()

    @hookimpl
    def ucm_context_closed(self, context: UserExecutionContext, reason: str) -> None:
        # Nothing may be asked of the server in here: it is done at the next occasion.
        if (name := self.logins.pop(context, None)) is not None and reason == "revoked":
            self._users.revoked.add(name)


def _marker(name: str) -> str:
    """The entry that says that a user is in use."""
    return f"ucm:users:{name}"
