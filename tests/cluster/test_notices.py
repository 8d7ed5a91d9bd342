"""Notices of one user to several workers, through a store in memory."""

import asyncio
import logging
from typing import Any

import pytest

from support.cluster import SECRET, Site, StubLease, joined, quiet, recover, seasoned, site
from support.events import open_connection
from support.memory_store import MemoryServer
from ucm_middleware.cluster.notices import Notice
from ucm_middleware.cluster.sealing import Seals
from ucm_middleware.cluster.store import Keep, UserKey
from ucm_middleware.errors import ClusterUnavailableError
from ucm_middleware.secret import Secret

ALICE = "alice"
REVOKED = Notice("revoked", ALICE, reason="stolen", actor="admin", at=1.5)


@pytest.fixture
def server() -> MemoryServer:
    return seasoned()


async def leave(one: Site, notice: Notice = REVOKED) -> int:
    return (await asyncio.wrap_future(one.notices.leave(notice))).leases


async def catch_up(one: Site, user_id: str = ALICE) -> None:
    await one.notices.catch_up(one.worker.key_of(user_id))


def hit(one: Site) -> list[tuple[str, list[StubLease]]]:
    found: list[tuple[str, list[StubLease]]] = [(notice.kind, list(leases)) for notice, _, leases in one.applied]  # type: ignore[arg-type]
    return found


async def test_it_is_meant_for_every_lease_that_is_older_on_every_worker(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        first, second = await one.worker.acquire(ALICE), await two.worker.acquire(ALICE)
        stranger = await two.worker.acquire("bob")
        assert await leave(one) == 2
        later = await two.worker.acquire(ALICE)
        for each in (one, two):
            await catch_up(each)
            await catch_up(each, "bob")

        assert hit(one) == [("revoked", [first])]
        assert hit(two) == [("revoked", [second])]
        assert two.applied[0][0] == REVOKED
        assert stranger.position == ""
        assert later.position == second.position == two.applied[0][1]


async def test_it_is_applied_once_to_each(server: MemoryServer) -> None:
    async with site(server) as one:
        await one.worker.acquire(ALICE)
        await leave(one)
        await catch_up(one)
        await catch_up(one)

        assert len(one.applied) == 1


async def test_one_that_was_away_applies_all_that_it_missed_in_order(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        old = await two.worker.acquire(ALICE)
        await leave(one, Notice("cleared", ALICE, key=(ALICE, "r-1")))
        young = await two.worker.acquire(ALICE)
        await leave(one)
        await catch_up(two)

        assert hit(two) == [("cleared", [old]), ("revoked", [old, young])]
        assert two.applied[0][0].key == (ALICE, "r-1")


async def test_a_revocation_forgets_the_events_and_a_clear_does_not(server: MemoryServer) -> None:
    async with site(server) as one:
        key = one.worker.key_of(ALICE)
        await one.worker.session.publish(key, b"sealed", Keep(9, 999, 9.0))
        await leave(one, Notice("cleared", ALICE, key=ALICE))
        assert (await one.worker.session.history(key, 0)).newest is not None
        await leave(one)
        assert (await one.worker.session.history(key, 0)).newest is None


async def test_what_could_not_be_left_is_kept_and_left_later(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        lease = await two.worker.acquire(ALICE)
        one.worker.store.is_cut = True
        for _ in range(2):  # the same again is one
            with pytest.raises(ClusterUnavailableError):
                await leave(one)
        one.worker.state = "down"
        with pytest.raises(ClusterUnavailableError):
            await leave(one, Notice("cleared", ALICE, key="k"))
        assert one.notices.unsent == 2
        one.worker.store.is_cut = False
        one.worker.state = "up"
        one.notices.store_is_back()
        await quiet()
        await catch_up(two)

        assert one.notices.unsent == 0
        assert hit(two) == [("revoked", [lease]), ("cleared", [lease])]


async def test_an_answer_that_was_lost_is_no_reason_not_to_leave_it(server: MemoryServer) -> None:
    async with site(server) as one:
        server.lose_answers = 1
        with pytest.raises(ClusterUnavailableError) as lost:
            await leave(one)
        assert lost.value.is_unknown
        assert one.notices.unsent == 1


async def test_what_may_be_there_is_left_again_only_if_it_is_not(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        old = await two.worker.acquire(ALICE)
        server.lose_answers = 1
        with pytest.raises(ClusterUnavailableError):
            await asyncio.wrap_future(one.notices.leave(Notice("revoked", ALICE, reason="stolen")))
        back = await two.worker.acquire(ALICE)
        one.notices.store_is_back()
        await quiet()
        await two.notices.catch_up(two.worker.key_of(ALICE))
        hit = [lease for _, _, leases in two.applied for lease in leases]
        assert old in hit
        assert back not in hit
        assert one.notices.unsent == 0


async def test_it_waits_for_what_is_about_to_live_under_a_lease(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        lease = await two.worker.acquire(ALICE)
        lease.is_awaited = True
        await asyncio.wrap_future(one.notices.leave(Notice("revoked", ALICE, reason="stolen")))
        await two.notices.catch_up(two.worker.key_of(ALICE))
        context, _ = open_connection(two.manager, ALICE)
        lease.context = context
        lease.is_awaited = False
        await two.notices.catch_up(two.worker.key_of(ALICE))
        await quiet()
        assert not context.is_open


async def test_a_user_is_read_by_one_at_a_time(server: MemoryServer, monkeypatch: pytest.MonkeyPatch) -> None:
    async with site(server) as one:
        await one.worker.acquire(ALICE)
        key = one.worker.key_of(ALICE)
        inside = 0
        most = 0
        good = one.worker.session.notices

        async def slow(*args: Any) -> Any:
            nonlocal inside, most
            inside += 1
            most = max(most, inside)
            for _ in range(10):
                await asyncio.sleep(0)
            inside -= 1
            return await good(*args)

        monkeypatch.setattr(one.worker.session, "notices", slow)
        first = asyncio.ensure_future(one.notices.catch_up(key))
        second = asyncio.ensure_future(one.notices.catch_up(key))
        await first
        third = asyncio.ensure_future(one.notices.catch_up(key))
        await asyncio.gather(second, third)
        assert most == 1


async def test_a_store_that_is_new_is_told_what_is_young(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        await leave(one)
        server.wipe()
        recover(server)
        one.notices.store_is_new()
        await quiet()
        lease = await two.worker.acquire(ALICE)
        lease.position = ""  # as that of a lease that was restored
        await catch_up(two)

        assert hit(two) == [("revoked", [lease])]


async def test_nobody_is_interrupted_by_the_own_notice(server: MemoryServer) -> None:
    async with site(server) as one:
        lease = await one.worker.acquire(ALICE)
        with one.notices.holding(ALICE):
            await leave(one)
            catching = asyncio.ensure_future(catch_up(one))
            await quiet()
            assert one.applied == []
        await catching

        assert hit(one) == [("revoked", [lease])]


async def test_a_position_stays_where_the_store_cannot_be_asked(server: MemoryServer) -> None:
    async with site(server) as one, site(server) as two:
        lease = await two.worker.acquire(ALICE)
        await leave(one)
        two.worker.store.is_cut = True
        with pytest.raises(ClusterUnavailableError):
            await catch_up(two)
        assert lease.position == ""
        two.worker.store.is_cut = False
        await catch_up(two)
        assert len(two.applied) == 1


class TestSeals:
    """What is in the store is bound to its kind and its user."""

    alice, bob = UserKey(1, "digest-of-alice"), UserKey(2, "digest-of-bob")

    def make(self, *secrets: Secret) -> tuple[Seals, list[int]]:
        told: list[int] = []
        return Seals(secrets or (SECRET,), "ucm", lambda: 0, told.append, clock=lambda: self.now), told

    now = 0.0

    def test_what_was_sealed_opens(self) -> None:
        seals, told = self.make()
        assert seals.unseal("event", self.alice, seals.seal("event", self.alice, b"said")) == b"said"
        assert told == []

    @pytest.mark.parametrize("how", ["kind", "user", "altered", "short", "empty"])
    def test_what_was_moved_or_altered_does_not(self, how: str, caplog: pytest.LogCaptureFixture) -> None:
        seals, told = self.make()
        sealed = seals.seal("event", self.alice, b"said by alice")
        kind, user = ("notice" if how == "kind" else "event"), (self.bob if how == "user" else self.alice)
        sealed = {"altered": sealed[:-1] + bytes([sealed[-1] ^ 1]), "short": sealed[:5], "empty": b""}.get(how, sealed)
        with caplog.at_level(logging.ERROR):
            assert seals.unseal(kind, user, sealed) is None  # type: ignore[arg-type]
        assert told == [1]
        assert "1 payloads" in caplog.text
        assert "alice" not in caplog.text

    def test_what_is_anothers_application_does_not_open(self) -> None:
        ours, theirs = (Seals((SECRET,), name, lambda: 0, lambda _: None) for name in ("ours", "theirs"))
        assert ours.unseal("event", self.alice, theirs.seal("event", self.alice, b"said there")) is None

    def test_a_flood_is_told_once_a_minute(self) -> None:
        seals, told = self.make()
        for _ in range(5):
            seals.unseal("event", self.alice, b"x" * 40)
        self.now = 61.0
        seals.unseal("event", self.alice, b"x" * 40)

        assert told == [1, 5]
        assert seals.unopened == 6

    def test_workers_in_the_middle_of_a_rotation_open_each_others(self) -> None:
        new, old = Secret(bytes(range(32, 64))), SECRET
        rotated = Seals((new, old), "ucm", lambda: 1, print)  # the old one's seal stands in the store
        before = Seals((old,), "ucm", lambda: 0, print)
        after = Seals((new, old), "ucm", lambda: 0, print)

        assert before.unseal("event", self.alice, rotated.seal("event", self.alice, b"1")) == b"1"
        assert rotated.unseal("event", self.alice, after.seal("event", self.alice, b"2")) == b"2"
        assert after.unseal("event", self.alice, before.seal("event", self.alice, b"3")) == b"3"


async def test_a_notice_that_does_not_open_is_not_applied(server: MemoryServer) -> None:
    async with site(server) as one:
        lease = await one.worker.acquire(ALICE)
        key = one.worker.key_of(ALICE)
        await one.worker.session.notify(key, b"forged" * 9, forget_events=False)
        await leave(one)
        await catch_up(one)

        assert hit(one) == [("revoked", [lease])]
        assert one.unopened == [1]


async def test_an_event_that_does_not_open_is_not_delivered_and_clients_are_told(server: MemoryServer) -> None:
    async with site(server) as one:
        _, _, client = await joined(one, ALICE)
        await quiet()
        await one.manager.send_event(ALICE, "message", 1)
        await one.worker.session.publish(one.worker.key_of(ALICE), b"forged" * 9, Keep(9, 999, 9.0))
        await one.manager.send_event(ALICE, "message", 2)
        await quiet()

        assert [(one["type"], one["sequence"]) for one in client.envelopes] == [
            ("message", 1),
            ("events_missed", 2),
            ("message", 3),
        ]
        assert one.unopened == [1]
