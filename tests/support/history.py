"""A small model of what a store does for workers, to which its history is replayed: who held what when, and what was
wrong.

It knows the keys (`<prefix>{<bucket>}:t:<tenancy>`, `…:u:<user>`, `…:engine`) and what commands do to them, and nothing
of the scripts but which of them acquires and which restores. A lease *counts* from its acquire until it is released or
its tenancy's last renewal has run out, also while the server that it stood in is gone: its worker goes by that.
"""

import heapq
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from .monitor_lines import Line

SLACK = 0.005
"""Seconds. The server judges by its clock as it was when it began with a command, MONITOR tells it a little later: what
happens so near to an expiry may come out either way, and neither is held against it.
"""

Kind = Literal["new server", "begun", "acquired", "renewed", "restored", "released", "expired"]
LeaseId = tuple[str, int]
"""Its tenancy, and its number there."""

READS = frozenset(
    [
        *("dump", "exists", "expiretime", "hexists", "hget", "hgetall", "hkeys", "hlen", "hmget", "hscan", "hstrlen"),
        *("hvals", "memory", "object", "pexpiretime", "pttl", "scan", "ttl", "type"),
    ]
)


@dataclass(frozen=True, slots=True)
class Event:
    """What happened to a tenancy, or to one of its leases: then ``user`` and ``number`` say which."""

    kind: Kind
    at: float
    tenancy: str = ""
    user: str = ""
    number: int = 0


@dataclass(frozen=True, slots=True)
class Violation:
    """What must never be, with the lines that show it."""

    rule: str
    text: str
    lines: tuple[Line, ...]

    def __str__(self) -> str:
        return "\n  ".join([f"{self.rule}: {self.text}", *map(str, self.lines)])


@dataclass(slots=True)
class Life:
    """From when to when a lease counted; ``end`` is infinite for one that still does."""

    user: str
    begin: float
    end: float = math.inf
    how: str = ""


@dataclass(slots=True)
class History:
    """``most`` is how many leases each user had at once at most; ``unseen`` are leases that a restore told of first."""

    events: list[Event] = field(default_factory=list)
    violations: list[Violation] = field(default_factory=list)
    lives: dict[LeaseId, Life] = field(default_factory=dict)
    most: dict[str, int] = field(default_factory=dict)
    unseen: int = 0

    @property
    def live(self) -> list[LeaseId]:
        """Leases that had not ended when the history did."""
        return [lease for lease, life in self.lives.items() if life.end == math.inf]

    def check(self) -> None:
        """Raises AssertionError with what was wrong."""
        if self.violations:
            shown = "\n".join(str(violation) for violation in self.violations[:5])
            raise AssertionError(f"{len(self.violations)} violations:\n{shown}")


@dataclass(slots=True)
class _Tenancy:
    bucket: str
    until: float
    begun: Line
    renewed: Line
    stands: bool = True  # in the server that runs
    ended: bool = False
    leases: dict[int, "_Lease"] = field(default_factory=dict)


@dataclass(slots=True)
class _Lease:
    user: str
    acquired: Line
    stands: bool = True


class Model:
    """``scripts`` says of scripts that acquire or restore, by their hash or name, "acquire" or "restore"."""

    def __init__(self, prefix: str, *, limit: int, lease: float, scripts: Mapping[str, str]) -> None:
        self.history = History()
        self._prefix = prefix
        self._limit = limit
        self._lease = lease
        self._scripts = scripts
        self._tenancies: dict[str, _Tenancy] = {}
        self._users: dict[str, dict[LeaseId, _Lease]] = defaultdict(dict)
        self._users_until: dict[str, float] = {}
        self._recovers: dict[str, float] = {}
        self._due: list[tuple[float, str]] = []
        self._servers = 0

    def new_server(self, at: float) -> None:
        """Nothing stands any more; what was held is still claimed."""
        self._servers += 1
        self._note("new server", at)
        self._recovers.clear()
        self._users_until.clear()
        for tenancy in self._tenancies.values():
            tenancy.stands = False
            for lease in tenancy.leases.values():
                lease.stands = False

    def play(self, lines: Iterable[Line]) -> None:
        """What one server did. Raises AssertionError for a command on a key of ours that the model does not know."""
        for line in lines:
            self._pass_time(line.at)
            if line.command in ("flushall", "flushdb"):
                self.new_server(line.at)
            elif line.command in ("del", "unlink"):
                for key in line.words[1:]:
                    self._on_key(line, key)
            elif len(line.words) > 1:
                self._on_key(line, line.words[1])

    def end(self, at: float) -> History:
        """The history up to a time."""
        self._pass_time(at)
        return self.history

    def _on_key(self, line: Line, key: str) -> None:
        if not key.startswith(self._prefix + "{") or line.command in READS:
            return
        bucket, _, rest = key[len(self._prefix) + 1 :].partition("}:")
        kind, _, name = rest.partition(":")
        if rest == "engine":
            self._on_engine(line, bucket)
        elif kind == "t":
            self._on_tenancy(line, bucket, name)
        elif kind == "u":
            self._on_user(line, name)

    def _on_engine(self, line: Line, bucket: str) -> None:
        if line.command == "set":
            since = float(line.words[2].split()[1]) / 1000
            self._recovers[bucket] = since + self._lease

    def _on_tenancy(self, line: Line, bucket: str, name: str) -> None:
        match line.command:
            case "hset" | "hsetnx" | "hincrby" | "hmset":
                self._stand(line, bucket, name)
            case "pexpire":
                self._renew(line, name, line.at + float(line.words[2]) / 1000)
            case "hdel":
                pass
            case "del" | "unlink":
                self._end_tenancy(name, line.at, "released")
            case _:
                raise AssertionError(f"the model knows no such command on a tenancy: {line}")

    def _on_user(self, line: Line, user: str) -> None:
        match line.command:
            case "hset" | "hsetnx" | "hmset":
                for name in line.words[2::2]:
                    if name.startswith("l:"):
                        self._take(line, user, name)
            case "hdel":
                for name in line.words[2:]:
                    if name.startswith("l:"):
                        self._give_up(line, user, _lease_id(name))
            case "pexpire" | "expire":
                unit = 1000 if line.command == "pexpire" else 1
                self._users_until[user] = line.at + float(line.words[2]) / unit
            case "persist":
                self._users_until.pop(user, None)
            case "del" | "unlink":
                self._forget_user(line, user)
            case "hincrby":
                pass
            case _:
                raise AssertionError(f"the model knows no such command on a user: {line}")

    def _stand(self, line: Line, bucket: str, name: str) -> None:
        """A tenancy is there from here on."""
        known = self._tenancies.get(name)
        if known is None:
            self._tenancies[name] = _Tenancy(bucket, math.inf, line, line)
            self._note("begun", line.at, name)
        elif known.stands and not known.ended:
            return
        elif self._restores(line) and not known.ended:
            known.stands = True
        else:
            self._violate("a lost tenancy stands again", name, known.begun, known.renewed, line)

    def _renew(self, line: Line, name: str, until: float) -> None:
        known = self._tenancies.get(name)
        if known is not None and known.ended:
            self._violate("a renewal after the expiry", name, known.renewed, line)
        elif known is None or not known.stands:
            self._violate("a renewal of what is not there", name, line)
        else:
            known.until, known.renewed = until, line
            heapq.heappush(self._due, (until, name))
            self._note("renewed", line.at, name)

    def _take(self, line: Line, user: str, name: str) -> None:
        lease = _lease_id(name)
        tenancy, number = lease
        held = self._tenancies.get(tenancy)
        restores = self._restores(line)
        if held is None or held.ended or not held.stands:
            self._violate("a lease under no tenancy", name, *(() if held is None else (held.renewed,)), line)
            return
        recovers = self._recovers.get(held.bucket, math.inf)
        if restores != (line.at < recovers) and abs(line.at - recovers) > SLACK:
            what = "a restore in a bucket that does not recover" if restores else "a grant in a bucket that recovers"
            self._violate(what, name, line)
        known = held.leases.get(number)
        if known is not None and restores:
            known.stands = True
            self._note("restored", line.at, tenancy, user, number)
            return
        if restores:
            if not self._servers or number in held.leases or lease in self.history.lives:
                self._violate("a restore of what was not held", name, line)
            self.history.unseen += 1
        elif known is not None or lease in self.history.lives:
            self._violate("a number that was used", name, line)
        held.leases[number] = self._users[user][lease] = _Lease(user, line)
        self.history.lives[lease] = Life(user, line.at)
        self._note("restored" if restores else "acquired", line.at, tenancy, user, number)
        self._count(line, user)

    def _count(self, line: Line, user: str) -> None:
        counted = [lease for key, lease in self._users[user].items() if self._tenancies[key[0]].until > line.at + SLACK]
        self.history.most[user] = max(self.history.most.get(user, 0), len(counted))
        if len(counted) > self._limit:
            lines = [lease.acquired for lease in counted]
            self._violate(f"{len(counted)} leases at once", user, *lines)

    def _give_up(self, line: Line, user: str, lease: LeaseId) -> None:
        tenancy, number = lease
        held = self._tenancies.get(tenancy)
        if held is None or number not in held.leases:
            return  # ended before
        if self._scripts.get(line.script or "") == "acquire" and held.until > line.at + SLACK:
            self._violate("an acquire swept away a lease that counts", f"{tenancy}.{number}", held.renewed, line)
        del held.leases[number]
        del self._users[user][lease]
        self._end_life(lease, line.at, "released")
        self._note("released", line.at, tenancy, user, number)

    def _forget_user(self, line: Line, user: str) -> None:
        for lease, held in list(self._users[user].items()):
            if held.stands and self._tenancies[lease[0]].until > line.at + SLACK:
                self._violate("a user was forgotten who has leases", user, held.acquired, line)
        self._users_until.pop(user, None)

    def _pass_time(self, now: float) -> None:
        while self._due and self._due[0][0] <= now - SLACK:
            until, name = heapq.heappop(self._due)
            tenancy = self._tenancies[name]
            if tenancy.until == until and not tenancy.ended:
                self._end_tenancy(name, until, "expired")
        for user in [user for user, until in self._users_until.items() if until <= now - SLACK]:
            del self._users_until[user]
            for lease, held in self._users[user].items():
                if held.stands:
                    self._violate("a user's hash expired over leases that count", f"{user} {lease}", held.acquired)

    def _end_tenancy(self, name: str, at: float, how: Literal["expired", "released"]) -> None:
        tenancy = self._tenancies.get(name)
        if tenancy is None or tenancy.ended:
            return
        tenancy.ended, tenancy.stands = True, False
        self._note(how, at, name)
        for number, lease in tenancy.leases.items():
            del self._users[lease.user][name, number]
            self._end_life((name, number), at, how)
            self._note(how, at, name, lease.user, number)
        tenancy.leases.clear()

    def _end_life(self, lease: LeaseId, at: float, how: str) -> None:
        life = self.history.lives[lease]
        life.end, life.how = at, how

    def _restores(self, line: Line) -> bool:
        return self._scripts.get(line.script or "") == "restore"

    def _note(self, kind: Kind, at: float, tenancy: str = "", user: str = "", number: int = 0) -> None:
        self.history.events.append(Event(kind, at, tenancy, user, number))

    def _violate(self, rule: str, text: str, *lines: Line) -> None:
        self.history.violations.append(Violation(rule, text, lines))


def _lease_id(name: str) -> LeaseId:
    tenancy, _, number = name.removeprefix("l:").rpartition(".")
    return tenancy, int(number)


def replay(
    servers: Sequence[Sequence[Line]],
    *,
    prefix: str,
    limit: int,
    lease: float,
    scripts: Mapping[str, str],
    until: float = 0.0,
) -> History:
    """The history of servers that followed one another at one address, each new and empty, up to a time."""
    model = Model(prefix, limit=limit, lease=lease, scripts=scripts)
    last = until
    for place, lines in enumerate(servers):
        if place and lines:
            model.new_server(lines[0].at)
        model.play(lines)
        last = max(last, lines[-1].at if lines else last)
    return model.end(last)
