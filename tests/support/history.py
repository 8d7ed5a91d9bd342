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
"""The worker, and the number: it stays the same when a restore puts the lease under another tenancy of the worker."""

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
    leases: dict[LeaseId, "_Lease"] = field(default_factory=dict)


@dataclass(slots=True)
class _Lease:
    user: str
    tenancy: str
    acquired: Line
    stands: bool = True


class Model:
    """``scripts`` says of scripts that acquire or restore, by their hash or name, "acquire" or "restore"."""

    def __init__(self, prefix: str, *, limit: int, scripts: Mapping[str, str]) -> None:
        self.history = History()
        self._prefix = prefix
        self._limit = limit
        self._scripts = scripts
        self._tenancies: dict[str, _Tenancy] = {}
        self._users: dict[str, dict[LeaseId, _Lease]] = defaultdict(dict)
        self._users_until: dict[str, float] = {}
        self._recovers: dict[str, float] = {}
        self._due: list[tuple[float, str]] = []
        self._users_due: list[tuple[float, str]] = []
        self._given_up: set[LeaseId] = set()  # in a bucket that recovers: perhaps only to be put back elsewhere
        self._refused: tuple[int, str] = (-1, "")  # the call and the key of a renewal that came too late
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
        if not key.startswith(self._prefix + "{"):
            return
        if self._refused == (line.call, key):
            self._violate("a renewal after the expiry was taken for one", key, line)
        if line.command in READS:
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
            _, since, rest, *_ = line.words[2].split()
            self._recovers[bucket] = (float(since) + float(rest)) / 1000

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
                        self._give_up(line, user, name)
            case "pexpire" | "expire":
                unit = 1000 if line.command == "pexpire" else 1
                self._users_until[user] = line.at + float(line.words[2]) / unit
                heapq.heappush(self._users_due, (self._users_until[user], user))
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
        elif known.ended or not known.stands:
            self._violate("a lost tenancy stands again", name, known.begun, known.renewed, line)

    def _renew(self, line: Line, name: str, until: float) -> None:
        known = self._tenancies.get(name)
        if known is None or known.ended or not known.stands:
            self._refused = (line.call, line.words[1])  # it has no effect, and a script sees that
            return
        known.until, known.renewed = until, line
        heapq.heappush(self._due, (until, name))
        self._note("renewed", line.at, name)

    def _take(self, line: Line, user: str, name: str) -> None:
        tenancy, lease = _ids(name)
        held = self._tenancies.get(tenancy)
        restores = self._restores(line)
        if held is None or held.ended or not held.stands:
            self._violate("a lease under no tenancy", name, *(() if held is None else (held.renewed,)), line)
            return
        recovers = self._recovers.get(held.bucket, math.inf)
        if restores != (line.at < recovers) and abs(line.at - recovers) > SLACK:
            what = "a restore in a bucket that does not recover" if restores else "a grant in a bucket that recovers"
            self._violate(what, name, line)
        known = self._users[user].get(lease)
        if known is None:
            self._begin(line, user, lease, tenancy)
        elif restores:
            del self._tenancies[known.tenancy].leases[lease]
            held.leases[lease] = known
            known.tenancy, known.stands = tenancy, True
            self._note("restored", line.at, tenancy, user, lease[1])
        elif known.tenancy != tenancy:
            self._violate("a number that was used", name, known.acquired, line)
        # else it is the same order once more

    def _begin(self, line: Line, user: str, lease: LeaseId, tenancy: str) -> None:
        restores = self._restores(line)
        life = self.history.lives.get(lease)
        if life is not None and restores and lease in self._given_up:
            self._given_up.discard(lease)
            life.end, life.how = math.inf, ""
        elif life is not None:
            self._violate("a lease that had ended is there again", f"{lease}, {life.how} at {life.end:.6f}", line)
        elif restores:
            self.history.unseen += 1
            if not self._servers:
                self._violate("a restore of what was not held", f"{lease}", line)
        made = self._users[user][lease] = _Lease(user, tenancy, line)
        self._tenancies[tenancy].leases[lease] = made
        if life is None:
            self.history.lives[lease] = Life(user, line.at)
        self._note("restored" if restores else "acquired", line.at, tenancy, user, lease[1])
        self._count(line, user)

    def _count(self, line: Line, user: str) -> None:
        counted = [each for each in self._users[user].values() if self._counts(each, line.at)]
        self.history.most[user] = max(self.history.most.get(user, 0), len(counted))
        if len(counted) > self._limit:
            self._violate(f"{len(counted)} leases at once", user, *(each.acquired for each in counted))

    def _counts(self, lease: _Lease, at: float) -> bool:
        return self._tenancies[lease.tenancy].until > at + SLACK

    def _give_up(self, line: Line, user: str, name: str) -> None:
        tenancy, lease = _ids(name)
        known = self._users[user].get(lease)
        if known is None or known.tenancy != tenancy or not known.stands:
            return  # it had ended, or stands elsewhere, or is on its way from a server that is gone to another place
        held = self._tenancies[tenancy]
        if self._scripts.get(line.script or "") == "acquire" and held.stands and self._counts(known, line.at):
            self._violate("an acquire swept away a lease that counts", name, held.renewed, line)
        if line.at < self._recovers.get(held.bucket, 0.0):
            self._given_up.add(lease)
        del held.leases[lease]
        del self._users[user][lease]
        how: Kind
        how, at = ("released", line.at) if self._counts(known, line.at) else ("expired", held.until)
        self._end_life(lease, at, how)
        self._note(how, at, tenancy, user, lease[1])

    def _forget_user(self, line: Line, user: str) -> None:
        for held in self._users[user].values():
            if held.stands and self._counts(held, line.at):
                self._violate("a user was forgotten who has leases", user, held.acquired, line)
        self._users_until.pop(user, None)

    def _pass_time(self, now: float) -> None:
        while self._due and self._due[0][0] <= now - SLACK:
            until, name = heapq.heappop(self._due)
            tenancy = self._tenancies[name]
            if tenancy.until == until and not tenancy.ended:
                self._end_tenancy(name, until, "expired")
        while self._users_due and self._users_due[0][0] <= now - SLACK:
            until, user = heapq.heappop(self._users_due)
            if self._users_until.get(user) != until:
                continue
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
        for lease, held in tenancy.leases.items():
            del self._users[held.user][lease]
            self._end_life(lease, at, how)
            self._note(how, at, name, held.user, lease[1])
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


def _ids(field_name: str) -> tuple[str, LeaseId]:
    """The tenancy and the lease of such a field of a user's hash."""
    tenancy, _, number = field_name.removeprefix("l:").rpartition(".")
    return tenancy, (tenancy.rpartition("-")[0], int(number))


def life_of(history: History, lease: str) -> Life | None:
    """The life of a lease that a worker calls `<tenancy>.<number>`."""
    return history.lives.get(_ids(lease)[1])


def replay(
    servers: Sequence[Sequence[Line]],
    *,
    prefix: str,
    limit: int,
    scripts: Mapping[str, str],
    until: float = 0.0,
) -> History:
    """The history of servers that followed one another at one address, each new and empty, up to a time."""
    model = Model(prefix, limit=limit, scripts=scripts)
    last = until
    for place, lines in enumerate(servers):
        if place and lines:
            model.new_server(lines[0].at)
        model.play(lines)
        last = max(last, lines[-1].at if lines else last)
    return model.end(last)
