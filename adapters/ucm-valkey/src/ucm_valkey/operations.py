"""The operations of a cache, as programs over one user's keys."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, cast

from ucm_middleware import ConfigurationError, InvalidContextError
from ucm_valkey.keys import UserKeys
from ucm_valkey.library import LONGEST, Fault
from ucm_valkey.programs import Command, Login, Program, Replies, Step, checked
from ucm_valkey.server_users import ServerUsers

# Atomic: between a look and a deletion, the entry could become another's.
_DELETE_IF: Final = b"if redis.call('get', KEYS[1]) == ARGV[1] then return redis.call('del', KEYS[1]) else return 0 end"
_PAGE: Final = 1000


@dataclass(frozen=True, slots=True)
class Limits:
    """What an entry may be. Times are in seconds, sizes in bytes."""

    default_ttl: float
    longest_ttl: float
    largest_value: int

    def __post_init__(self) -> None:
        if not 0 < self.default_ttl <= self.longest_ttl <= LONGEST:
            raise ConfigurationError(
                f"default_ttl and longest_ttl must be seconds above 0 and at most {LONGEST:g}, the first not above the "
                f"second, and not {self.default_ttl!r} and {self.longest_ttl!r}"
            )
        if self.largest_value < 1:
            raise ConfigurationError(f"largest_value must be a number of bytes above 0, not {self.largest_value!r}")

    def milliseconds(self, ttl: object) -> int:
        """How long an entry is to live. Raises InvalidContextError for what is no such time."""
        seconds = self.default_ttl if ttl is None else ttl
        if not isinstance(seconds, int | float) or not 0 < seconds <= self.longest_ttl:
            raise InvalidContextError(
                "ttl",
                f"is no number of seconds above 0 and at most {self.longest_ttl:g}",
                "give such a time, or longest_ttl",
            )
        return max(1, round(seconds * 1000))

    def value(self, value: object) -> bytes:
        """A value as bytes. Raises InvalidContextError for another kind, and one that is too large."""
        if isinstance(value, str):
            value = value.encode(errors="surrogatepass")
        if not isinstance(value, bytes):
            raise InvalidContextError(
                "value", f"is neither bytes nor text but {type(value).__name__}", "serialise it, as JSON for example"
            )
        if len(value) > self.largest_value:
            raise InvalidContextError(
                "value", f"is larger than {self.largest_value} bytes", "keep less, or raise largest_value"
            )
        return value


@dataclass(frozen=True, slots=True)
class Operations:
    """One user's. ``login`` and ``users`` are there where the server itself tells users apart."""

    keys: UserKeys
    limits: Limits
    login: Login | None = None
    users: ServerUsers | None = None

    def get(self, name: str) -> Program[bytes | None]:
        (reply,) = yield from self._ask(("GET", self.keys.key(name)))
        return cast("bytes | None", reply)

    def get_many(self, names: Sequence[str]) -> Program[dict[str, bytes]]:
        if not names:
            return {}
        (reply,) = yield from self._ask(("MGET", *map(self.keys.key, names)))
        values = cast("Sequence[bytes | None]", reply)
        return {name: value for name, value in zip(names, values, strict=True) if value is not None}

    def set(self, name: str, value: bytes | str, ttl: float | None, only_if_missing: bool) -> Program[bool]:
        command = (*self._set(name, value, ttl), *(("NX",) if only_if_missing else ()))
        (reply,) = yield from self._ask(command)
        return reply is not None

    def set_many(self, values: Mapping[str, bytes | str], ttl: float | None) -> Program[None]:
        if values:
            yield from self._ask(*(self._set(name, value, ttl) for name, value in values.items()))

    def delete(self, names: Sequence[str]) -> Program[int]:
        if not names:
            return 0
        (reply,) = yield from self._ask(("UNLINK", *map(self.keys.key, names)))
        return cast(int, reply)

    def delete_if(self, name: str, value: bytes | str) -> Program[bool]:
        (reply,) = yield from self._ask(("EVAL", _DELETE_IF, 1, self.keys.key(name), self.limits.value(value)))
        return reply == 1

    def incr(self, name: str, by: int, ttl: float | None) -> Program[int]:
        key = self.keys.key(name)
        if type(by) is not int or abs(by) >= 2**63:
            raise InvalidContextError("by", "is not a whole number of 64 bits", "give an int")
        increase: Command = ("INCRBY", key, by)
        # Together: an entry that was made without a time to live would stay for ever.
        expiry: Command = ("PEXPIRE", key, self.limits.milliseconds(ttl), "NX")
        *_, reply = yield from self._ask(("MULTI",), increase, expiry, ("EXEC",))
        total, _ = cast("Sequence[object]", reply)
        if isinstance(total, Exception | Fault):
            raise InvalidContextError("name", "is an entry that holds no whole number of 64 bits", "use another name")
        return cast(int, total)

    def expire(self, name: str, ttl: float | None) -> Program[bool]:
        (reply,) = yield from self._ask(("PEXPIRE", self.keys.key(name), self.limits.milliseconds(ttl)))
        return reply == 1

    def ttl(self, name: str) -> Program[float | None]:
        (reply,) = yield from self._ask(("PTTL", self.keys.key(name)))
        left = cast(int, reply)
        return left / 1000 if left >= 0 else None

    def page(self, beginning: str, cursor: int) -> Program[tuple[int, list[str]]]:
        """Some of the names, and where to go on; 0 when that was all. A name may come twice."""
        # SCAN names no key, so that a server user that may scan would see everybody's: the application's login does.
        command: Command = ("SCAN", cursor, "MATCH", self.keys.pattern(beginning), "COUNT", _PAGE)
        reply = _answered((yield Step((command,), by_admin=True)))[0]
        after, found = cast("tuple[bytes, Sequence[bytes]]", reply)
        return int(after), [name for key in found if (name := self.keys.name(key)) is not None]

    def clear(self) -> Program[int]:
        removed = cursor = 0
        while True:
            cursor, names = yield from self.page("", cursor)
            removed += yield from self.delete(names)
            if cursor == 0:
                return removed

    def _set(self, name: str, value: bytes | str, ttl: float | None) -> Command:
        return ("SET", self.keys.key(name), self.limits.value(value), "PX", self.limits.milliseconds(ttl))

    def _ask(self, *commands: Command) -> Program[Replies]:
        """The replies, none of them an error."""
        if self.login is None or self.users is None:
            return _answered((yield Step(commands)))
        yield from self.users.prepare(self.login, self.keys)
        replies = yield Step(commands, self.login)
        if replies is None:  # the server was restarted, or another process has removed the user
            yield from self.users.make(self.login, self.keys)
            replies = yield Step(commands, self.login)
        return _answered(replies)


def _answered(replies: Replies | None) -> Replies:
    if replies is None:
        raise Fault("WRONGPASS").error()
    return [checked(reply) for reply in replies]
