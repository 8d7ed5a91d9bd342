"""What a server's answers mean, in the words of the port."""

from typing import cast

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


def words(answer: object) -> list[bytes]:
    """An answer of texts."""
    return cast(list[bytes], listed(answer))


def listed(answer: object) -> list[object]:
    """An answer of several things. Raises ClusterUnavailableError for any other: the script is not ours."""
    if not isinstance(answer, list):
        raise StoreError("down", "a script's answer was not understood", is_unknown=True)
    return cast(list[object], answer)


def number(answer: object) -> int:
    """An answer that is a number."""
    if not isinstance(answer, int):
        raise StoreError("down", "a script's answer was not understood", is_unknown=True)
    return answer


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


def renewed(answer: object) -> Alive | Gone | Recovering:
    """The answer for one tenancy."""
    kind, *rest = listed(answer)
    if kind == b"alive":
        told = [each.decode() for each in cast(list[bytes], rest)]
        return Alive(tuple(zip(told[::2], told[1::2], strict=True)))
    return _void(kind, rest)


def _void(kind: object, rest: list[object]) -> Gone | Recovering:
    return Recovering(number(rest[0]) / 1000) if kind == b"recovering" else Gone()


def published(answer: object) -> Published:
    """The answer to an event."""
    epoch, sequence, workers, connections = listed(answer)
    return Published(Place(cast(bytes, epoch).decode(), number(sequence)), number(workers), number(connections))


def history(answer: object) -> History:
    """A user's events."""
    found = listed(answer)
    if not found:
        return History(None, ())
    epoch, newest, entries = found
    events = tuple((int(position.partition("-")[0]), payload) for position, payload in entries_of(entries))
    return History(Place(cast(bytes, epoch).decode(), int(cast(bytes, newest))), events)


def notified(answer: object) -> Notified:
    """The answer to a notice."""
    position, leases = listed(answer)
    return Notified(cast(bytes, position).decode(), number(leases))


def entries_of(answer: object) -> list[tuple[str, bytes]]:
    """What is in a stream, each with its id."""
    entries = cast(list[tuple[bytes, list[bytes]]], listed(answer))
    return [(position.decode(), fields[1]) for position, fields in entries]


def slots(user: UserKey, answer: object) -> list[Slot]:
    """A user's leases."""
    found = [each.decode() for each in words(answer)]
    return [slot_of(user, field, kind) for field, kind in zip(found[::2], found[1::2], strict=True)]
