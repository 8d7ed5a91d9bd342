"""What a member does while its store fails, under each policy, and how it comes back."""

import asyncio

import pytest

from support.members import LEASE, Cluster, Worker
from ucm_middleware.cluster.policy import WhenUnavailable
from ucm_middleware.cluster.store import Slot, UserKey
from ucm_middleware.errors import ClusterUnavailableError, ConfigurationError, ContextLimitError


def live_of(cluster: Cluster, worker: Worker, user_id: str = "alice") -> list[Slot]:
    return cluster.server.live_of(worker.member.key_of(user_id))


class TestUnknownOutcomes:
    """An order that is not answered may have been done, or be done later."""

    def test_what_was_taken_unseen_is_given_back(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        cluster.server.lose_answers = 1
        with pytest.raises(ClusterUnavailableError) as unknown:
            cluster.acquire(worker)
        assert unknown.value.is_unknown
        assert len(live_of(cluster, worker)) == 1

        cluster.turn(worker)

        assert live_of(cluster, worker) == []
        assert worker.state == "up"

    def test_an_order_that_comes_after_it_was_given_up_takes_nothing(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        kept = cluster.acquire(worker)
        cluster.server.lose_orders, cluster.server.are_late = 1, True
        with pytest.raises(ClusterUnavailableError):
            cluster.acquire(worker)
        cluster.turn(worker)

        cluster.server.deliver_late()

        assert live_of(cluster, worker) == [kept.slot()]

    def test_neither_does_the_first_order_of_a_tenancy(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        cluster.server.lose_orders, cluster.server.are_late = 1, True
        with pytest.raises(ClusterUnavailableError):
            cluster.acquire(worker)
        cluster.turn(worker)

        cluster.server.deliver_late()

        assert live_of(cluster, worker) == []

    def test_a_number_below_the_fence_is_tried_anew(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        cluster.acquire(worker)
        cluster.server.hold()

        async def overtake() -> None:
            """One order waits while a later one of the same tenancy is given up, and the fence comes first."""
            first = asyncio.ensure_future(worker.member.acquire("alice", is_connection=False, limits=cluster.limits))
            await cluster.server.someone_waits.wait()
            held, cluster.server._held = cluster.server._held, None
            cluster.server.lose_orders = 1
            with pytest.raises(ClusterUnavailableError):
                await worker.member.acquire("alice", is_connection=False, limits=cluster.limits)
            await worker.member.upkeep.turn()
            cluster.server._held = held
            cluster.server.let_go()
            assert (await first).is_held

        cluster.run(overtake())
        assert len(live_of(cluster, worker)) == 2

    def test_a_cancelled_open_leaves_no_slot_taken(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        cluster.server.hold()

        async def give_up() -> None:
            opening = asyncio.ensure_future(worker.member.acquire("alice", is_connection=False, limits=cluster.limits))
            await cluster.server.someone_waits.wait()
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening

        cluster.run(give_up())
        cluster.server.let_go()
        cluster.turn(worker)

        assert live_of(cluster, worker) == []
        assert worker.member.leases_of("alice") == []
        assert cluster.acquire(worker).is_held

    def test_an_answer_that_comes_when_the_lease_is_over_is_none_and_the_order_is_made_anew(
        self, cluster: Cluster
    ) -> None:
        worker = cluster.worker()
        cluster.server.hold()

        async def sleep_through() -> None:
            opening = asyncio.ensure_future(worker.member.acquire("alice", is_connection=False, limits=cluster.limits))
            await cluster.server.someone_waits.wait()
            cluster.server.let_go()
            cluster.clock.advance(2 * LEASE)  # stopped between the order and its answer
            lease = await opening
            assert lease.is_held
            assert lease.number == 2

        cluster.run(sleep_through())
        cluster.turn(worker)
        [slot] = live_of(cluster, worker)
        assert slot.number == 2


class TestDown:
    """Nobody is answered, under the policy "closed"."""

    def test_leases_end_with_their_time_and_then_only(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.wait(LEASE / 3, worker)
        cluster.server.is_down = True

        cluster.wait(LEASE / 2, worker)
        assert lease.is_held
        assert worker.lost == []
        cluster.wait(LEASE / 2, worker)

        assert not lease.is_held
        assert worker.lost == [lease]

    def test_a_short_outage_costs_nobody_anything(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.server.is_down = True
        cluster.wait(LEASE / 2, worker)
        assert worker.state == "down"

        cluster.server.is_down = False
        cluster.wait(LEASE / 2, worker)

        assert worker.state == "up"
        assert lease.is_held
        assert worker.lost == []

    def test_it_is_looked_at_less_and_less_often(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        cluster.server.is_down = True
        cluster.server.commands.clear()

        cluster.wait(100, worker, step=0.05)

        assert 100 / 5 <= cluster.server.commands.count("inspect") <= 100 / 2.5 + 5

    def test_what_was_released_meanwhile_is_told_when_it_can_be(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.acquire(worker, "bob")
        worker.store.is_cut = True
        cluster.wait(5, worker)
        worker.member.release(lease)
        cluster.turn(worker)
        assert len(live_of(cluster, worker)) == 1

        worker.store.is_cut = False
        cluster.wait(5, worker)

        assert live_of(cluster, worker) == []

    def test_one_failing_open_makes_the_member_look_for_itself(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        cluster.server.lose_orders = 1
        with pytest.raises(ClusterUnavailableError):
            cluster.acquire(worker)
        assert worker.member.upkeep._delay() == 0

        cluster.turn(worker)

        assert worker.state == "up"
        assert cluster.acquire(worker).is_held


class TestAnotherServer:
    """The store was restarted empty, or has failed over."""

    @pytest.mark.parametrize("is_empty", [True, False])
    def test_what_is_held_is_put_back_and_nothing_is_granted_for_a_lease(
        self, cluster: Cluster, is_empty: bool
    ) -> None:
        worker, other = cluster.worker(), cluster.worker()
        lease = cluster.acquire(worker)
        if is_empty:
            cluster.server.wipe()
        else:
            cluster.server.fail_over(lost_writes=0)

        cluster.turn(worker, other)
        assert worker.state == "recovering"
        for one in (worker, other):
            with pytest.raises(ClusterUnavailableError) as refused:
                cluster.acquire(one, "bob")
            assert refused.value.reason == "recovering"
            assert LEASE - 1 <= refused.value.retry_after <= LEASE
        cluster.wait(LEASE + 1, worker, other)

        assert worker.state == other.state == "up"
        assert lease.is_held
        assert worker.lost == []
        assert live_of(cluster, worker) == [lease.slot()]
        assert cluster.acquire(other).is_held
        with pytest.raises(ContextLimitError):
            cluster.acquire(other)

    def test_who_comes_too_late_has_lost(self, cluster: Cluster) -> None:
        away, other = cluster.worker(), cluster.worker()
        lease = cluster.acquire(away)
        cluster.server.wipe()
        cluster.wait(LEASE + 1, other)

        cluster.turn(away)

        assert away.lost == [lease]
        assert live_of(cluster, away) == []

    def test_a_lost_release_leaves_no_ghost(self, cluster: Cluster) -> None:
        cluster.server.remembers = True
        worker = cluster.worker()
        kept, gone = cluster.acquire(worker), cluster.acquire(worker)
        worker.member.release(gone)
        cluster.turn(worker)
        cluster.server.fail_over(lost_writes=1)
        assert len(live_of(cluster, worker)) == 2

        cluster.wait(LEASE + 1, worker)

        assert live_of(cluster, worker) == [kept.slot()]
        assert kept.is_held

    def test_a_lost_grant_is_put_back(self, cluster: Cluster) -> None:
        cluster.server.remembers = True
        worker = cluster.worker()
        leases = [cluster.acquire(worker), cluster.acquire(worker)]
        cluster.server.fail_over(lost_writes=1)

        cluster.wait(LEASE + 1, worker)

        assert all(lease.is_held for lease in leases)
        assert len(live_of(cluster, worker)) == 2

    def test_an_unanswered_restore_is_repeated_under_the_same_name(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.server.wipe()
        cluster.server.lose_answers, cluster.server.lose_only = 1, "restore"

        cluster.wait(LEASE / 2, worker)
        assert cluster.server.commands.count("restore") == 2
        assert len(live_of(cluster, worker)) == 1
        cluster.wait(LEASE, worker)

        assert lease.is_held
        assert live_of(cluster, worker) == [lease.slot()]

    def test_what_was_released_between_is_not_put_back(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.acquire(worker, "bob")
        cluster.server.wipe()
        worker.member.release(lease)

        cluster.wait(LEASE + 1, worker)

        assert live_of(cluster, worker) == []

    def test_the_listener_is_told_that_the_store_is_new(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        told: list[bool] = []

        async def reconnected(was_new: bool) -> None:
            told.append(was_new)

        worker.member.on_reconnected = reconnected
        cluster.server.is_down = True
        cluster.wait(LEASE / 2, worker)
        cluster.server.is_down = False
        cluster.wait(LEASE / 2, worker)
        cluster.server.wipe()
        cluster.wait(LEASE / 2, worker)

        assert told == [False, True]


class TestLocal:
    """The policy "local": this worker carries on by itself."""

    def test_contexts_are_opened_without_the_store(self, cluster: Cluster) -> None:
        worker = cluster.worker("local")
        before = cluster.acquire(worker)
        cluster.server.is_down = True

        first = cluster.acquire(worker)  # finds out by itself
        cluster.wait(3 * LEASE, worker)
        second = cluster.acquire(worker)

        assert worker.state == "local"
        assert all(lease.is_held for lease in (before, first, second))
        assert worker.lost == []

    def test_they_find_their_place_again_and_what_has_none_is_lost(self, cluster: Cluster) -> None:
        worker, other = cluster.worker("local"), cluster.worker("local")
        old = cluster.acquire(worker)
        worker.store.is_cut = True
        cluster.wait(2 * LEASE, worker, other)
        fresh = cluster.acquire(worker)
        elsewhere = cluster.acquire(other)
        assert len(live_of(cluster, worker)) == 1

        worker.store.is_cut = False
        cluster.wait(2 * LEASE, worker, other)

        assert worker.state == "up"
        assert elsewhere.is_held
        assert len(live_of(cluster, worker)) == 2
        assert sorted([old.is_held, fresh.is_held]) == [False, True]
        assert len(worker.lost) == 1

    def test_a_short_outage_moves_nothing(self, cluster: Cluster) -> None:
        worker = cluster.worker("local")
        lease = cluster.acquire(worker)
        cluster.server.is_down = True
        cluster.wait(LEASE / 2, worker)
        cluster.server.is_down = False
        cluster.wait(LEASE / 2, worker)

        assert worker.state == "up"
        assert lease.is_held
        assert live_of(cluster, worker) == [lease.slot()]
        cluster.clock.advance(LEASE)
        assert not lease.is_held  # it is the store again that says so

    def test_many_find_their_place_little_by_little(self, cluster: Cluster) -> None:
        worker = cluster.worker("local")
        cluster.server.is_down = True
        leases = [cluster.acquire(worker, f"user{number}") for number in range(100)]
        cluster.wait(LEASE, worker)
        cluster.server.is_down = False
        cluster.server.commands.clear()

        cluster.wait(LEASE / 3 + 6, worker, step=0.1)
        assert 0 < cluster.server.commands.count("acquire") < 100
        cluster.wait(2 * LEASE, worker, step=0.1)

        assert cluster.server.commands.count("acquire") == 100
        assert all(lease.is_held for lease in leases)
        assert worker.member.book.unplaced == {}

    def test_notices_are_applied_before_a_place_is_asked_for(self, cluster: Cluster) -> None:
        worker = cluster.worker("local")
        worker.store.is_cut = True
        with_notice = cluster.acquire(worker)

        async def noticed(key: UserKey) -> None:
            for lease in worker.member.leases_at(key):
                worker.member.release(lease)

        worker.member.on_noticed = noticed
        worker.store.is_cut = False
        cluster.server.commands.clear()
        cluster.wait(LEASE, worker)

        assert with_notice.is_over
        assert "acquire" not in cluster.server.commands
        assert cluster.server.live() == {}


class TestRefusing:
    """The store renews what is held, and takes no order."""

    def test_a_store_without_memory_is_said_to_be_full_once_and_keeps_what_it_has(
        self, cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.server.refuses_orders = "memory"
        for _ in range(3):
            with pytest.raises(ClusterUnavailableError):
                cluster.acquire(worker)
            cluster.turn(worker)
        assert worker.state == "full"
        assert [record.levelname for record in caplog.records if "memory" in record.message] == ["CRITICAL"]

        cluster.wait(3 * LEASE, worker)
        assert worker.state == "full"
        assert lease.is_held
        worker.member.release(lease)
        cluster.turn(worker)
        assert live_of(cluster, worker) == []

        cluster.server.refuses_orders = None
        cluster.wait(LEASE / 3, worker)
        assert worker.state == "up"

    def test_with_long_leases_too_it_is_soon_seen_that_it_has_memory_again(self, cluster: Cluster) -> None:
        worker = cluster.worker(lease=600.0)
        cluster.server.refuses_orders = "memory"
        with pytest.raises(ClusterUnavailableError):
            cluster.acquire(worker)
        cluster.turn(worker)
        cluster.server.refuses_orders = None
        assert worker.member.upkeep._delay() <= 5
        cluster.wait(5, worker)
        assert worker.state == "up"

    def test_who_is_refused_meanwhile_makes_no_more_renewals(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        cluster.acquire(worker)
        cluster.server.refuses_orders = "memory"
        for _ in range(2):
            with pytest.raises(ClusterUnavailableError):
                cluster.acquire(worker)
            cluster.turn(worker)
        cluster.server.commands.clear()
        for _ in range(20):
            with pytest.raises(ClusterUnavailableError):
                cluster.acquire(worker)
            cluster.turn(worker)
        assert set(cluster.server.commands) == {"acquire"}

    def test_who_carries_on_alone_asks_for_places_when_there_is_memory_again(self, cluster: Cluster) -> None:
        worker = cluster.worker("local")
        cluster.server.refuses_orders = "memory"
        lease = cluster.acquire(worker)
        cluster.turn(worker)
        assert worker.state == "full"
        cluster.server.commands.clear()

        cluster.wait(3 * LEASE, worker)
        assert lease.is_held
        assert "acquire" not in cluster.server.commands
        cluster.server.refuses_orders = None
        cluster.wait(2 * LEASE, worker)

        assert worker.state == "up"
        assert live_of(cluster, worker) == [lease.slot()]

    def test_a_right_that_was_taken_away_has_the_store_looked_at_anew_and_not_for_each(self, cluster: Cluster) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.wait(LEASE, worker)
        cluster.server.refuses_orders = "refused"
        cluster.server.commands.clear()
        for _ in range(20):
            with pytest.raises(ClusterUnavailableError):
                cluster.acquire(worker)
            cluster.turn(worker)
        assert cluster.server.commands.count("inspect") == 1
        cluster.wait(5, worker)
        assert cluster.server.commands.count("inspect") == 2  # those after the first together
        assert lease.is_held

    def test_what_can_never_work_is_said_once_and_what_is_held_goes_on_as_long_as_it_is_renewed(
        self, cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        worker = cluster.worker()
        lease = cluster.acquire(worker)
        cluster.server.data.seals = "another's"
        worker.member.upkeep._enroll_at = 0.0

        cluster.wait(3 * LEASE, worker)

        assert worker.state == "down"
        assert lease.is_held
        said = [record.message for record in caplog.records if record.levelname == "CRITICAL"]
        assert len(said) == 1
        assert "belong to an application with another secret" in said[0]

    def test_another_trouble_of_a_store_that_is_down_is_said_too_and_each_once(
        self, cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        worker = cluster.worker()
        cluster.server.is_down = True
        for reason in ("down", "loading", "read-only", "loading", "read-only"):
            cluster.server.reason = reason
            cluster.wait(LEASE, worker)
        said = [record.message for record in caplog.records if record.levelname == "CRITICAL"]
        assert [message.partition("(")[2].partition(")")[0] for message in said] == ["down", "loading", "read-only"]


class TestClockOfTheStore:
    """It was set, and not slewed."""

    def test_set_forward_by_more_than_a_lease_others_are_granted_what_is_held_until_the_next_renewal(
        self, cluster: Cluster
    ) -> None:
        worker, other = cluster.worker(), cluster.worker()
        held = [cluster.acquire(worker), cluster.acquire(worker)]
        cluster.server.clock = lambda: cluster.clock() + 10_800
        assert cluster.acquire(other).is_held
        assert all(lease.is_held for lease in held)

        cluster.wait(LEASE / 3, worker)

        assert worker.lost == held
        assert worker.state == "up"


class TestStarting:
    """The first look."""

    @pytest.mark.parametrize(("policy", "state"), [("closed", "down"), ("local", "local")])
    def test_an_unreachable_store_is_what_the_policy_is_for(
        self, cluster: Cluster, policy: WhenUnavailable, state: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        cluster.server.is_down = True

        worker = cluster.worker(policy)

        assert worker.state == state
        assert [record.levelname for record in caplog.records if "cannot be asked" in record.message] == ["CRITICAL"]

    def test_a_new_store_grants_nothing_at_first(self, cluster: Cluster) -> None:
        worker = cluster.worker(recovered=False)

        assert worker.state == "recovering"

    def test_another_applications_store_is_refused(self, cluster: Cluster) -> None:
        cluster.worker()

        stranger = cluster.worker("closed", bytes(range(9, 250, 5)))

        assert stranger.state == "down"
        assert isinstance(stranger.member.fault, ConfigurationError)
        with pytest.raises(ClusterUnavailableError):
            cluster.acquire(stranger)

    def test_workers_in_the_middle_of_a_rotation_have_one_limit(self, cluster: Cluster) -> None:
        old, new = bytes(range(9, 250, 5)), bytes(range(3, 250, 7))
        first = cluster.worker("closed", old)
        second = cluster.worker("closed", new, old)
        cluster.acquire(first)
        cluster.acquire(second)

        with pytest.raises(ContextLimitError):
            cluster.acquire(second)
