"""What a server's answers mean, in the words of the port."""

from collections.abc import Callable
from functools import wraps
from typing import Final, ParamSpec, TypeVar, cast

from ucm_middleware.cluster.store import (
    Alive,
    Gone,
    Granted,
    History,
    Late,
    Notified,
    Place,
    Published,
    Recovering,
    Refused,
    Slot,
    UserKey,
)
from ucm_valkey.cluster.faults import StoreError
from ucm_valkey.cluster.keys import slot_of

P = ParamSpec("P")
T = TypeVar("T")

_NOT_OURS: Final = (ValueError, TypeError, AttributeError, IndexError)
"""What an answer of another shape than the script's leads to."""


def _understood(read: Callable[P, T]) -> Callable[P, T]:
    """Raise ClusterUnavailableError for an answer that is not one of our script's: what was done cannot be known."""

    @wraps(read)
    def reading(*args: P.args, **named: P.kwargs) -> T:
        try:
            return read(*args, **named)
        except _NOT_OURS:
            raise _strange() from None

    return reading


def _strange() -> StoreError:
    return StoreError("down", "a script's answer was not understood", is_unknown=True)


@_understood
def texts(answer: object) -> list[str]:
    """An answer of texts that are none of a client's."""
    return [word.decode() for word in words(answer)]


def words(answer: object) -> list[bytes]:
    """An answer of texts."""
    return cast(list[bytes], listed(answer))


def listed(answer: object) -> list[object]:
    """An answer of several things. Raises ClusterUnavailableError for any other: the script is not ours."""
    if not isinstance(answer, list):
        raise _strange()
    return cast(list[object], answer)


def number(answer: object) -> int:
    """An answer that is a number."""
    if not isinstance(answer, int):
        raise _strange()
    return answer


@_understood
def acquired(answer: object) -> Granted | Refused | Gone | Late | Recovering:
    """The answer to an acquire; 1 is what it mostly is, a user without notices and events who is granted it."""
    if answer == 1:
        return Granted("", None)
    kind, *rest = listed(answer)
    if kind == b"granted":
        position, epoch, sequence = cast(list[bytes], rest)
        place = Place(epoch.decode(), int(sequence)) if sequence else None
        return Granted(position.decode(), place)
    if kind == b"refused":
        return Refused(cast(bytes, rest[0]).decode())
    if kind == b"late":
        return Late()
    return _void(kind, rest)


@_understood
def renewed(answer: object, number: int) -> list[Alive | Gone | Recovering]:
    """The answers for so many tenancies."""
    answers = listed(answer)
    if len(answers) != number:
        raise ValueError
    return [_renewed(each) for each in answers]


def _renewed(answer: object) -> Alive | Gone | Recovering:
    kind, *rest = listed(answer)
    if kind == b"alive":
        told = [each.decode() for each in cast(list[bytes], rest)]
        return Alive(tuple(zip(told[::2], told[1::2], strict=True)))
    return _void(kind, rest)


def _void(kind: object, rest: list[object]) -> Gone | Recovering:
    if kind == b"recovering":
        return Recovering(number(rest[0]) / 1000)
    if kind != b"gone":
        raise ValueError
    return Gone()


@_understood
def published(answer: object) -> Published:
    """The answer to an event."""
    epoch, sequence, workers, connections = listed(answer)
    return Published(Place(cast(bytes, epoch).decode(), number(sequence)), number(workers), number(connections))


@_understood
def history(answer: object) -> History:
    """A user's events."""
    found = listed(answer)
    if not found:
        return History(None, ())
    epoch, newest, entries = found
    events = tuple((int(position.partition("-")[0]), payload) for position, payload in entries_of(entries))
    return History(Place(cast(bytes, epoch).decode(), int(cast(bytes, newest))), events)


@_understood
def notified(answer: object) -> Notified:
    """The answer to a notice."""
    position, leases = listed(answer)
    return Notified(cast(bytes, position).decode(), number(leases))


@_understood
def scanned(answer: object) -> tuple[bytes, list[str]]:
    """One part of a walk: where it goes on, b"0" for nowhere, and names of keys."""
    cursor, found = listed(answer)
    return words([cursor])[0], texts(found)


@_understood
def entries_of(answer: object) -> list[tuple[str, bytes]]:
    """What is in a stream, each with its id."""
    entries = cast(list[tuple[bytes, list[bytes]]], listed(answer))
    return [(position.decode(), fields[1]) for position, fields in entries]


@_understood
def slots(user: UserKey, answer: object) -> list[Slot]:
    """A user's leases."""
    found = [each.decode() for each in words(answer)]
    return [slot_of(user, field, kind) for field, kind in zip(found[::2], found[1::2], strict=True)]
