"""What tests of a cluster's store say to it, and a cluster of three Valkeys."""

import asyncio
import itertools
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

from ucm_middleware.cluster.store import Order, Place, Release, Session, Slot, UserKey
from ucm_valkey.cluster import open_store

from .processes import HOST, held_port
from .valkey import ADMIN, LibraryName, ValkeyServer, start_valkey
from .waiting import PATIENCE, wait_until

PREFIX: Final = "ucm:shop:"
SEAL: Final = "seal-of-the-shop"
LEASE: Final = 15.0
SLOTS: Final = 16384


def url_of(library: LibraryName, port: int, *, login: str = f":{ADMIN}", rest: str = "") -> str:
    """A URL that the library of its scheme serves."""
    return f"{library}://{login}@{HOST}:{port}{rest}"


def session_at(url: str, *, prefix: str = PREFIX, seals: Sequence[str] = (SEAL,), timeout: float = PATIENCE) -> Session:
    """A session for the running loop, which has time for its answers."""
    return open_store(url, prefix=prefix, seals=seals, timeout=timeout).session()


def user(number: int = 0, bucket: int | None = None) -> UserKey:
    """One of many."""
    return UserKey(number % 64 if bucket is None else bucket, f"{number:032x}")


def slot(of: UserKey, number: int, tenancy: str = "w1-1", *, is_connection: bool = False) -> Slot:
    """A lease."""
    return Slot(of, tenancy, number, is_connection)


def order(
    wanted: Slot, *, begins: bool = True, per_user: int = 10, connections: int = 10, lease: float = LEASE
) -> Order:
    """An order for it."""
    return Order(wanted, begins, per_user, connections, lease)


async def serving(session: Session, lease: float = 0.05) -> None:
    """Wait until no bucket recovers, by the server's own word."""
    await asyncio.sleep(await session.enroll(lease) + 0.01)
    assert await session.enroll(lease) == 0


class Heard:
    """A hearer that remembers, in order."""

    def __init__(self) -> None:
        self.said: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    def event(self, user: UserKey, place: Place, payload: bytes) -> None:
        self.said.put_nowait(("event", user, place.sequence, payload))

    def nudged(self, bucket: int, tenancies: Sequence[str]) -> None:
        self.said.put_nowait(("nudged", bucket, tuple(tenancies)))

    def deaf(self) -> None:
        self.said.put_nowait(("deaf",))

    async def next(self) -> tuple[Any, ...]:
        """What comes next. Raises TimeoutError when nothing does."""
        async with asyncio.timeout(PATIENCE):
            return await self.said.get()

    async def next_but_deaf(self) -> tuple[Any, ...]:
        """The same, passing over that it was deaf once more: channels move to another node one by one."""
        while (said := await self.next()) == ("deaf",):
            continue
        return said


async def release(session: Session, *slots: Slot, fence: bool = False) -> None:
    """Give up leases."""
    await session.release([Release(each, fence) for each in slots])


@contextmanager
def start_cluster(*options: str, nodes: int = 3) -> Generator[list[ValkeyServer]]:
    """Nodes that share all slots evenly. `options` are of each."""
    with ExitStack() as stack:
        servers = [_start_node(stack, *options) for _ in range(nodes)]
        bounds = [SLOTS * node // nodes for node in range(nodes + 1)]
        for server, (first, end) in zip(servers, itertools.pairwise(bounds), strict=True):
            server.admin.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
        join(servers)
        yield servers


@contextmanager
def start_replica(of: ValkeyServer, *options: str) -> Generator[ValkeyServer]:
    """A node that follows another one of a cluster, and has all that it has."""
    with ExitStack() as stack:
        replica = _start_node(stack, *options)
        join([of, replica])
        replica.admin.execute_command("CLUSTER REPLICATE", node_id(of))
        wait_until(lambda: _info(replica, "replication")["master_link_status"] == "up", "the replica follows")
        wait_until_known(of)
        yield replica


def wait_until_known(primary: ValkeyServer) -> None:
    """Until a primary knows of its replica, Redis does not hear that this wants to take over."""
    wait_until(lambda: primary.admin.execute_command("CLUSTER REPLICAS", node_id(primary)), "its replica is known")


def join(servers: Sequence[ValkeyServer]) -> None:
    """Make nodes know each other, and wait until all say that the cluster is well."""
    first = servers[0]
    bus = first.admin.config_get("cluster-port")["cluster-port"]
    for server in servers[1:]:
        server.admin.execute_command("CLUSTER MEET", HOST, first.port, bus)

    def is_well() -> bool:
        states = [server.admin.execute_command("CLUSTER INFO") for server in servers]
        known = {state["cluster_known_nodes"] for state in states}
        return len(known) == 1 and all(state["cluster_state"] == "ok" for state in states)

    wait_until(is_well, "the nodes are a cluster")


def node_id(server: ValkeyServer) -> str:
    """A node's name in its cluster."""
    name: bytes = server.admin.execute_command("CLUSTER MYID")
    return name.decode() if isinstance(name, bytes) else name


def forget_gone(servers: Sequence[ValkeyServer]) -> None:
    """Make nodes forget those that were stopped."""
    mine = {node_id(server) for server in servers}
    for server in servers:
        for about in server.admin.execute_command("CLUSTER NODES").values():
            if about["node_id"] not in mine:
                server.admin.execute_command("CLUSTER FORGET", about["node_id"])


def owner_of(servers: Sequence[ValkeyServer], bucket: int) -> ValkeyServer:
    """The node that says that it serves a bucket."""
    at: int = servers[0].admin.execute_command("CLUSTER KEYSLOT", str(bucket))
    found = [server for server in servers if _serves(server, at)]
    assert len(found) == 1
    return found[0]


def _serves(server: ValkeyServer, at: int) -> bool:
    mine = node_id(server).encode()
    entries = server.admin.execute_command("CLUSTER SHARDS")
    for entry in entries:
        shard = dict(zip(entry[::2], entry[1::2], strict=True)) if isinstance(entry, list) else entry
        shard = {str(key if not isinstance(key, bytes) else key.decode()): value for key, value in shard.items()}
        ranges = shard["slots"]
        owns = any(first <= at <= last for first, last in zip(ranges[::2], ranges[1::2], strict=True))
        if owns:
            node = shard["nodes"][0]
            about = dict(zip(node[::2], node[1::2], strict=True)) if isinstance(node, list) else node
            return bool(about.get(b"id", about.get("id")) in (mine, mine.decode()))
    return False


def _start_node(stack: ExitStack, *options: str) -> ValkeyServer:
    bus = stack.enter_context(held_port())
    return stack.enter_context(
        start_valkey(
            *("--cluster-enabled", "yes", "--cluster-port", str(bus), "--cluster-node-timeout", "1000"),
            *("--masterauth", ADMIN, "--repl-diskless-sync-delay", "0", "--cluster-allow-replica-migration", "no"),
            *options,
        )
    )


def _info(server: ValkeyServer, section: str) -> dict[str, Any]:
    info: dict[str, Any] = server.admin.info(section)
    return info
