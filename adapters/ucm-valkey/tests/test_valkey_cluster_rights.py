"""What a login of the server needs: the rights that the README names, no more and no less."""

import re
from pathlib import Path
from typing import Final

import pytest

from support.valkey import ADMIN, LibraryName, ValkeyServer
from support.valkey_cluster import LEASE, Heard, order, release, serving, session_at, slot, start_cluster, url_of, user
from ucm_middleware.cluster.store import Alive, Granted, Keep, Refused, Renewal, Session
from ucm_middleware.errors import ClusterUnavailableError, ConfigurationError

PASSWORD: Final = "secret-of-the-login"
README: Final = Path(__file__).parents[1] / "README.md"
KEEP: Final = Keep(2, 1000, 60)


def rights(application: str, *, is_cluster: bool = False) -> list[str]:
    """The README's line for an application, as words."""
    line = re.search(r"^ACL SETUSER shop (on .*)$", README.read_text(), re.MULTILINE)
    assert line is not None
    words = line[1].replace("PASSWORD", PASSWORD).replace("ucm:shop:", f"ucm:{application}:").split()
    return [*words, *(["+asking", "+cluster|slots"] if is_cluster else [])]


def let_in(server: ValkeyServer, name: str, words: list[str]) -> None:
    server.admin.execute_command("ACL", "SETUSER", name, "reset", *words)


def session_of(library: LibraryName, port: int, application: str, *, login: str = "", rest: str = "") -> Session:
    url = url_of(library, port, login=f"{login or application}:{PASSWORD}", rest=rest)
    return session_at(url, prefix=f"ucm:{application}:")


async def use_all(session: Session) -> None:
    """Every operation once, on the way that a worker goes."""
    anna, heard = user(1), Heard()
    assert await session.inspect() == 0
    await serving(session)
    await session.listen(heard)
    await session.subscribe(anna)
    assert await session.acquire(order(slot(anna, 1, is_connection=True), connections=1)) == Granted("", None)
    assert await session.acquire(order(slot(anna, 2, is_connection=True), connections=1)) == Refused("connections")
    for number in range(4):
        assert (await session.publish(anna, b"%d" % number, KEEP)).connections == 1
        assert (await heard.next())[3] == b"%d" % number
    assert len((await session.history(anna, 0)).events) == 2
    notified = await session.notify(anna, b"notice", forget_events=True)
    assert await heard.next() == ("nudged", 1, ("w1-1",))
    told = ((anna.digest, notified.position),)
    assert await session.renew([Renewal(1, "w1-1", LEASE, touch=(anna,))]) == [Alive(told)]
    assert await session.renew([Renewal(1, "w1-1", LEASE, told=told)]) == [Alive()]
    assert await session.notices(anna, "") == [(notified.position, b"notice")]
    assert await session.leases_of(anna) == [slot(anna, 1, is_connection=True)]
    assert await session.count() == (1, 1)
    assert not await session.restore(1, "w1-1", LEASE, [slot(anna, 1)])
    await session.unsubscribe(anna)
    await release(session, slot(anna, 1), fence=True)
    await release(session, slot(anna, 7, "w2-1"), fence=True)


async def test_the_rights_that_the_readme_names_are_enough(valkey_server: ValkeyServer, library: LibraryName) -> None:
    let_in(valkey_server, "shop", rights("shop"))
    session = session_of(library, valkey_server.port, "shop")
    await use_all(session)
    valkey_server.admin.set("ucm:shop:{1}:engine", "x")  # as another run's
    await session.acquire(order(slot(user(1), 9)))
    assert await session.restore(1, "w1-1", LEASE, [slot(user(1), 9)])
    assert valkey_server.admin.acl_log() == []
    await session.aclose()


@pytest.fixture(autouse=True)
def no_log(valkey_server: ValkeyServer) -> None:
    valkey_server.admin.acl_log_reset()


async def test_with_one_right_less_it_is_named_before_anything_is_served(
    valkey_server: ValkeyServer, library: LibraryName
) -> None:
    words = rights("shop")
    commands = [word[1:] for word in words if word.startswith("+")]
    assert len(commands) > 20
    for command in commands:
        let_in(valkey_server, "shop", [*words, f"-{command}"])
        session = session_of(library, valkey_server.port, "shop")
        with pytest.raises(ConfigurationError) as caught:
            await session.inspect()
        assert re.search(rf"\b{command.upper()}\b", str(caught.value)), (command, str(caught.value))
        assert PASSWORD not in str(caught.value)
        await session.aclose()


async def test_a_right_that_is_taken_away_later_is_no_server_that_is_down(
    valkey_server: ValkeyServer, library: LibraryName
) -> None:
    let_in(valkey_server, "shop", rights("shop"))
    session = session_of(library, valkey_server.port, "shop")
    await serving(session)
    let_in(valkey_server, "shop", [*rights("shop"), "-hset"])
    with pytest.raises(ClusterUnavailableError, match="README of ucm-valkey") as caught:
        await session.acquire(order(slot(user(1), 1)))
    # Its script had begun: what came before may have been done.
    assert (caught.value.reason, caught.value.is_unknown) == ("refused", True)
    await session.aclose()


async def test_without_its_keys_or_channels_that_is_said(valkey_server: ValkeyServer, library: LibraryName) -> None:
    for taken, word in (("resetkeys", "~ucm:shop:*"), ("resetchannels", "&ucm:shop:*")):
        let_in(valkey_server, "shop", [*rights("shop"), taken])
        session = session_of(library, valkey_server.port, "shop")
        with pytest.raises(ConfigurationError) as caught:
            await session.inspect()
        assert word in str(caught.value)
        await session.aclose()


async def test_one_application_cannot_read_or_change_another(valkey_server: ValkeyServer, library: LibraryName) -> None:
    for application in ("shop", "bank"):
        let_in(valkey_server, application, rights(application))
    bank = session_of(library, valkey_server.port, "bank")
    anna = user(1)
    await serving(bank)
    await bank.acquire(order(slot(anna, 1, is_connection=True)))
    await bank.publish(anna, b"of the bank", KEEP)
    before = {key: valkey_server.admin.dump(key) for key in valkey_server.admin.scan_iter("ucm:bank:*")}
    shop = session_of(library, valkey_server.port, "bank", login="shop")  # the bank's keys, with the shop's login
    for attempt in (
        shop.acquire(order(slot(anna, 2))),
        release(shop, slot(anna, 1)),
        shop.renew([Renewal(1, "w1-1", LEASE)]),
        shop.restore(1, "w1-1", LEASE, [slot(anna, 1)]),
        shop.publish(anna, b"of the shop", KEEP),
        shop.history(anna, 0),
        shop.notify(anna, b"notice", forget_events=True),
        shop.notices(anna, ""),
        shop.leases_of(anna),
        shop.count(),
        shop.enroll(LEASE),
        shop.listen(Heard()),
    ):
        with pytest.raises(ClusterUnavailableError) as caught:
            await attempt
        assert caught.value.reason == "refused"
    with pytest.raises(ConfigurationError, match="keys"):
        await shop.inspect()
    assert {key: valkey_server.admin.dump(key) for key in valkey_server.admin.scan_iter("ucm:bank:*")} == before
    for session in (bank, shop):
        await session.aclose()


async def test_in_a_cluster_two_rights_more(library: LibraryName) -> None:
    with start_cluster(nodes=2) as servers:
        for server in servers:
            let_in(server, "shop", rights("shop", is_cluster=True))
        session = session_of(library, servers[0].port, "shop", rest="?cluster=true")
        await use_all(session)
        await session.aclose()
        for right in ("asking", "cluster|slots"):
            for server in servers:
                let_in(server, "shop", [*rights("shop", is_cluster=True), f"-{right}"])
            session = session_of(library, servers[0].port, "shop", rest="?cluster=true")
            with pytest.raises(ConfigurationError) as caught:
                await session.inspect()
            assert right.upper().replace("|", " ") in str(caught.value)
            await session.aclose()


async def test_only_digests_and_short_lives_are_in_the_store(valkey_server: ValkeyServer, library: LibraryName) -> None:
    session = session_at(url_of(library, valkey_server.port))
    await use_all(session)
    forms = r"app|\{\d+\}:(engine|t:[\w-]+|f:[\w-]+|[uen]:[0-9a-f]{32}|probe)"
    for key in valkey_server.admin.scan_iter("*"):
        assert re.fullmatch(rf"ucm:shop:({forms})", key.decode())
        assert key.endswith(b":engine") or 0 < valkey_server.admin.ttl(key) <= 86_400
    assert ADMIN not in repr(session)
    await session.aclose()
