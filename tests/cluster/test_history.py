"""The model that judges a store's history: right ones pass, and each kind of wrong one is found."""

from collections.abc import Callable

import pytest

from support.history import History, Model, replay
from support.monitor_lines import GapError, Line, read_lines

LEASE = 2.0
ACQUIRE, RENEW, RELEASE, RESTORE = "acquire-sha", "renew-sha", "release-sha", "restore-sha"
SCRIPTS = {ACQUIRE: "acquire", RESTORE: "restore"}
PREFIX = "ucm:app:"
USER = f"{PREFIX}{{7}}:u:alice"


class Writer:
    """Writes down what a server would have done."""

    def __init__(self, begins: float = 1000.0) -> None:
        self.lines: list[Line] = []
        self.calls = 0
        self.write(begins - 2 * LEASE, None, "set", f"{PREFIX}{{7}}:engine", self.engine(begins - 2 * LEASE))

    @staticmethod
    def engine(since: float) -> str:
        return f"run {since * 1000:.0f} 2000 2000 {(since + 2) * 1000:.0f}"

    def write(self, at: float, script: str | None, *words: str) -> None:
        self.lines.append(Line(len(self.lines), at, "lua" if script else "10.0.0.1:1", script, self.calls, words))

    def acquire(self, at: float, number: int, tenancy: str = "w-1", *, begins: bool = False, user: str = USER) -> None:
        if begins:
            self.write(at, ACQUIRE, "hset", f"{PREFIX}{{7}}:t:{tenancy}", "fence", "0")
            self.write(at, ACQUIRE, "pexpire", f"{PREFIX}{{7}}:t:{tenancy}", "2000")
        self.write(at, ACQUIRE, "hset", user, f"l:{tenancy}.{number}", "r")
        self.write(at, ACQUIRE, "pexpire", user, "3600000")

    def renew(self, at: float, tenancy: str = "w-1", *, says: str = "alive") -> None:
        self.calls += 1
        self.write(at, RENEW, "pexpire", f"{PREFIX}{{7}}:t:{tenancy}", "2000")
        if says == "alive":
            self.write(at, RENEW, "hgetall", f"{PREFIX}{{7}}:t:{tenancy}")

    def release(self, at: float, number: int, tenancy: str = "w-1", script: str = RELEASE) -> None:
        self.write(at, script, "hdel", USER, f"l:{tenancy}.{number}")

    def restore(self, at: float, number: int, tenancy: str = "w-2") -> None:
        self.write(at, RESTORE, "hset", f"{PREFIX}{{7}}:t:{tenancy}", "fence", "0")
        self.write(at, RESTORE, "pexpire", f"{PREFIX}{{7}}:t:{tenancy}", "2000")
        self.write(at, RESTORE, "hset", USER, f"l:{tenancy}.{number}", "r")

    def see(self, at: float) -> None:
        self.write(at, RENEW, "set", f"{PREFIX}{{7}}:engine", self.engine(at))


def judge(*servers: Writer, limit: int = 2, until: float = 0.0) -> History:
    return replay([server.lines for server in servers], prefix=PREFIX, limit=limit, scripts=SCRIPTS, until=until)


def rules(history: History) -> list[str]:
    return [violation.rule for violation in history.violations]


def again(at: float) -> Writer:
    """A server that is new at a time, and has been seen."""
    writer = Writer()
    writer.lines.clear()
    writer.see(at)
    return writer


def test_a_life_from_its_acquire_to_its_release() -> None:
    writer = Writer()
    writer.acquire(1000, 1, begins=True)
    writer.renew(1001)
    writer.acquire(1001.5, 2)
    writer.release(1002, 1)
    writer.acquire(1002.5, 3)
    history = judge(writer)
    history.check()
    assert history.most == {"alice": 2}
    assert (history.lives["w", 1].begin, history.lives["w", 1].end) == (1000, 1002)
    assert history.live == [("w", 2), ("w", 3)]
    kinds = [(event.kind, event.number) for event in history.events]
    assert kinds == [
        ("begun", 0),
        ("renewed", 0),
        ("acquired", 1),
        ("renewed", 0),
        ("acquired", 2),
        ("released", 1),
        ("acquired", 3),
    ]


def test_what_is_not_renewed_expires_with_its_tenancy_and_counts_no_more() -> None:
    writer = Writer()
    writer.acquire(1000, 1, begins=True)
    writer.acquire(1000, 2)
    writer.acquire(1002.1, 3, "w-2", begins=True)
    history = judge(writer, until=1010)
    history.check()
    assert history.most == {"alice": 2}
    assert history.lives["w", 1].end == 1002
    assert history.lives["w", 1].how == "expired"
    assert history.live == []


def test_what_an_acquire_sweeps_away_at_the_moment_of_its_expiry_has_expired() -> None:
    writer = Writer()
    writer.acquire(1000, 1, begins=True)
    writer.release(1002.001, 1, script=ACQUIRE)
    history = judge(writer)
    history.check()
    assert (history.lives["w", 1].end, history.lives["w", 1].how) == (1002, "expired")


def test_a_server_that_comes_back_empty_is_told_what_is_held() -> None:
    first = Writer()
    first.acquire(1000, 1, begins=True)
    first.acquire(1000, 2)
    second = again(1001)
    second.release(1001.4, 1)  # under its old name, which is not there
    second.restore(1001.5, 1)
    second.release(1001.6, 1, "w-2")
    second.renew(1003.1, "w-1", says="gone")
    second.acquire(1003.1, 3, "w-2")
    history = judge(first, second)
    history.check()
    assert history.lives["w", 1].end == 1001.6
    # Never restored: its worker went by the last renewal of the tenancy that it stood under.
    assert history.lives["w", 2].end == 1002


def test_what_is_put_back_under_another_tenancy_once_more_goes_on() -> None:
    first = Writer()
    first.acquire(1000, 1, begins=True)
    second = again(1001)
    second.restore(1001.5, 1)
    second.release(1001.6, 1, "w-2")
    second.restore(1001.6, 1, "w-3")
    history = judge(first, second)
    history.check()
    assert history.live == [("w", 1)]
    second.release(1001.7, 1, "w-3")
    second.acquire(1003.1, 1, "w-3")
    assert rules(judge(first, second)) == ["a lease that had ended is there again"]


def test_a_renewal_that_came_too_late_and_was_refused_is_no_wrong() -> None:
    writer = Writer()
    writer.acquire(1000, 1, begins=True)
    writer.renew(1002.1, says="gone")
    history = judge(writer)
    history.check()
    assert history.lives["w", 1].end == 1002


def test_a_restore_of_what_was_taken_in_the_servers_last_moment() -> None:
    second = again(1001)
    second.restore(1001.5, 1)
    history = judge(Writer(), second)
    history.check()
    assert history.unseen == 1


def test_another_applications_keys_are_passed_over() -> None:
    writer = Writer()
    writer.write(1000, None, "hset", "ucm:other:{7}:u:alice", "l:w-1.1", "r")
    writer.write(1000, None, "zadd", f"{PREFIX}app", "1", "x")
    assert judge(writer).events == []


def test_an_eleventh_lease() -> None:
    writer = Writer()
    writer.acquire(1000, 1, begins=True)
    for number in range(2, 12):
        writer.acquire(1000 + number / 100, number)
    history = judge(writer, limit=10)
    assert rules(history) == ["11 leases at once"]
    assert len(history.violations[0].lines) == 11
    assert history.most == {"alice": 11}
    with pytest.raises(AssertionError, match="11 leases at once"):
        history.check()


def test_a_claim_of_before_a_restart_counts() -> None:
    first = Writer()
    first.acquire(1000, 1, begins=True)
    first.acquire(1000, 2)
    second = again(1000.5)
    second.acquire(1001, 1, "v-1", begins=True)
    assert rules(judge(first, second)) == ["a grant in a bucket that recovers", "3 leases at once"]


def wrong_renewal(writer: Writer) -> None:
    writer.acquire(1000, 1, begins=True)
    writer.renew(1002.1)


def wrong_begin(writer: Writer) -> None:
    writer.acquire(1000, 1, begins=True)
    writer.acquire(1002.1, 2, begins=True)


def no_tenancy(writer: Writer) -> None:
    writer.acquire(1000, 1)


def lost_tenancy(writer: Writer) -> None:
    writer.acquire(1000, 1, begins=True)
    writer.acquire(1002.1, 2)


def grant_in_recovery(writer: Writer) -> None:
    writer.see(1000)
    writer.acquire(1001, 1, begins=True)


def late_restore(writer: Writer) -> None:
    writer.acquire(1000, 1, begins=True)
    writer.restore(1000.1, 1)


def restore_of_nothing(writer: Writer) -> None:
    writer.see(1000)
    writer.restore(1000.5, 1)


def used_number(writer: Writer) -> None:
    writer.acquire(1000, 1, begins=True)
    writer.release(1000.1, 1)
    writer.acquire(1000.2, 1)


def same_number(writer: Writer) -> None:
    writer.acquire(1000, 1, begins=True)
    writer.acquire(1000.2, 1, "w-2", begins=True)


def swept(writer: Writer) -> None:
    writer.acquire(1000, 1, begins=True)
    writer.release(1001, 1, script=ACQUIRE)


def forgotten(writer: Writer) -> None:
    writer.acquire(1000, 1, begins=True)
    writer.write(1000.5, RELEASE, "del", USER)


def untouched(writer: Writer) -> None:
    writer.acquire(1000, 1, begins=True)
    writer.write(1000.5, ACQUIRE, "pexpire", USER, "1000")
    writer.renew(1001)
    writer.renew(1002)


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (wrong_renewal, ["a renewal after the expiry was taken for one"]),
        (wrong_begin, ["a lost tenancy stands again", "a lease under no tenancy"]),
        (no_tenancy, ["a lease under no tenancy"]),
        (lost_tenancy, ["a lease under no tenancy"]),
        (grant_in_recovery, ["a grant in a bucket that recovers"]),
        (late_restore, ["a restore in a bucket that does not recover"]),
        (restore_of_nothing, ["a restore of what was not held"]),
        (used_number, ["a lease that had ended is there again"]),
        (same_number, ["a number that was used"]),
        (swept, ["an acquire swept away a lease that counts"]),
        (forgotten, ["a user was forgotten who has leases"]),
        (untouched, ["a user's hash expired over leases that count"]),
    ],
)
def test_what_must_never_be_is_found(wrong: Callable[[Writer], None], expected: list[str]) -> None:
    writer = Writer()
    wrong(writer)
    assert rules(judge(writer)) == expected


def test_a_restore_of_what_had_expired_is_found() -> None:
    first = Writer()
    first.acquire(1000, 1, begins=True)
    second = again(1001.5)
    second.restore(1002.5, 1)
    assert rules(judge(first, second)) == ["a lease that had ended is there again"]


def test_a_command_that_the_model_does_not_know_is_no_reason_to_go_on() -> None:
    writer = Writer()
    writer.write(1000, RELEASE, "rename", USER, "elsewhere")
    with pytest.raises(AssertionError, match="knows no such command"):
        judge(writer)


def test_lines_of_monitor() -> None:
    raw = [
        b'1796034313.736079 [0 127.0.0.1:54220] "EVALSHA" "7a37" "1" "ucm:x:{3}:u:\\"a\\n\\xc3"',
        b'1796034313.936118 [0 lua] "hset" "k\\\\" "l:a.1"',
        b'1796034314.000000 [0 127.0.0.1:54220] "PING"',
        b'1796034314.100000 [0 127.0.0.1:54220] "EVAL" "return 1" "0"',
        b'1796034314.100001 [0 lua] "get" "k"',
    ]
    first, second, third, _, fifth = read_lines(raw)
    assert first.words[3] == 'ucm:x:{3}:u:"a\n\xc3'
    assert (second.script, second.at, second.call, second.words[1]) == ("7a37", first.at, 0, "k\\")
    assert (third.script, third.call) == (None, 2)
    assert fifth.script == "e0e1f9fabfc9d4800c877a703b823ac0578ff8db"  # of the text
    with pytest.raises(GapError):
        list(read_lines([b"1796034313.73"]))


def test_the_model_forgets_nothing_that_it_was_not_told_of() -> None:
    model = Model(PREFIX, limit=1, scripts=SCRIPTS)
    writer = Writer()
    writer.acquire(1000, 1, begins=True)
    model.play(writer.lines)
    assert model.end(1001).live == [("w", 1)]
    assert model.end(1003).live == []
