"""What the store says by itself: events of the users subscribed to, and nudges of all buckets.

One task sees to it that each channel that is wanted is heard on the node that it stands on now, with an ear for each
such node. Whatever is lost is asked for anew, and once all is heard again the hearer is told that it was deaf.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, ParamSpec

from ucm_middleware.cluster.store import Hearer, Place, UserKey
from ucm_middleware.cluster.tally import Tally
from ucm_valkey.cluster.asking import Asking
from ucm_valkey.cluster.clients import Client, Node
from ucm_valkey.cluster.ears import HEARTBEAT, Ear, open_ear
from ucm_valkey.cluster.faults import Failure, Fault, StoreError
from ucm_valkey.cluster.keys import Keys

P = ParamSpec("P")

logger = logging.getLogger(__name__)

FIRST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 2.0
"""Seconds between two attempts; each is drawn by lot from its upper half, so that workers do not come all at once."""


@dataclass(slots=True, eq=False)
class _Channel:
    """One that is wanted. ``about`` is a user, or a bucket; ``ear`` where it was asked for."""

    name: bytes
    tag: str
    about: UserKey | int
    ear: Ear | None = None
    is_heard: bool = False
    waiting: list[asyncio.Future[StoreError | None]] = field(default_factory=list[asyncio.Future[StoreError | None]])

    def settle(self, outcome: StoreError | None) -> None:
        """Tell those that wait for it."""
        for future in self.waiting:
            if not future.done():
                future.set_result(outcome)
        self.waiting.clear()


def _tell_strange(number: int) -> None:
    logger.warning("%d messages on channels of this application were not understood", number)


class Listener:
    """Hears for one session."""

    def __init__(self, client: Client, asking: Asking, keys: Keys, heartbeat: float = HEARTBEAT) -> None:
        self._client = client
        self._asking = asking
        self._keys = keys
        self._heartbeat = heartbeat
        self._hearer: Hearer | None = None
        self._channels: dict[bytes, _Channel] = {}
        self._ears: dict[Node, Ear] = {}
        self._unheard: set[_Channel] = set()
        self._unwanted: list[tuple[Ear, bytes]] = []
        self._was_deaf = False
        self._strange = Tally(_tell_strange)
        self._wanted = asyncio.Event()
        self._attending: asyncio.Task[None] | None = None
        asking.topology.on_change = self._rearrange

    async def listen(self, hearer: Hearer, buckets: int) -> None:
        """Hear nudges from now on. Goes on trying when it raises ClusterUnavailableError."""
        self._hearer = hearer
        if self._attending is None:
            self._attending = asyncio.get_running_loop().create_task(self._attend())
        nudges = [self._want(self._keys.nudges(bucket), self._keys.tag(bucket), bucket) for bucket in range(buckets)]
        await self._until_heard(nudges)

    async def subscribe(self, user: UserKey) -> None:
        """Hear a user's events. Raises ClusterUnavailableError, and is not subscribed then."""
        channel = self._want(self._keys.events(user), self._keys.tag(user.bucket), user)
        try:
            await self._until_heard([channel])
        except BaseException:
            if not channel.is_heard and not channel.waiting:
                self._forget(channel)
            raise

    async def unsubscribe(self, user: UserKey) -> None:
        """Hear them no longer."""
        channel = self._channels.get(self._keys.events(user).encode())
        if channel is not None:
            ear = channel.ear
            self._forget(channel)
            if ear is not None:
                await ear.change("sunsubscribe", [channel.name])

    async def aclose(self) -> None:
        """Stop hearing."""
        if self._attending is not None:
            self._attending.cancel()
            await asyncio.wait({self._attending})
        ears, self._ears = list(self._ears.values()), {}
        for ear in ears:
            await ear.aclose()
        for channel in self._channels.values():
            channel.settle(StoreError("down", "the session was closed"))
        self._channels.clear()

    def confirmed(self, ear: Ear, channel: bytes) -> None:
        """It is heard."""
        found = self._channels.get(channel)
        if found is None:  # whoever wanted it gave up meanwhile
            self._unwanted.append((ear, channel))
            self._wanted.set()
        if found is None or found.ear is not ear:
            return
        found.is_heard = True
        found.settle(None)
        self._unheard.discard(found)
        if self._was_deaf and not self._unheard and self._hearer is not None:
            self._was_deaf = False
            self._call(self._hearer.deaf)

    def refused(self, ear: Ear, channel: bytes, fault: Fault) -> None:
        """Another node has it now, or the login may not."""
        found = self._channels.get(channel)
        if found is None or found.ear is not ear:
            return
        found.ear = None
        if fault.code == "MOVED":
            self._asking.topology.moved(fault)
        else:
            found.settle(fault.error())
        self._wanted.set()

    def left(self, ear: Ear, channel: bytes) -> None:
        """Its slot went to another node."""
        found = self._channels.get(channel)
        if found is not None and found.ear is ear:
            self._unhear(found)
            self._asking.topology.look_again()

    def lost(self, ear: Ear, failure: Failure) -> None:
        """All that an ear heard must be asked for anew."""
        if self._ears.get(ear.node) is ear:
            del self._ears[ear.node]
            self._asking.topology.look_again()
        for channel in self._channels.values():
            if channel.ear is ear:
                self._unhear(channel)
                channel.settle(failure.error(is_unknown=False))

    def heard(self, channel: bytes, message: bytes) -> None:
        """Tell the hearer, if it is still wanted."""
        found = self._channels.get(channel)
        hearer = self._hearer
        if found is None or hearer is None:
            return
        try:
            if isinstance(found.about, int):
                self._call(hearer.nudged, found.about, message.decode().split())
            else:
                epoch, sequence, payload = message.split(b" ", 2)
                self._call(hearer.event, found.about, Place(epoch.decode(), int(sequence)), payload)
        except ValueError:
            self._strange.count()

    def _want(self, name: str, tag: str, about: UserKey | int) -> _Channel:
        channel = self._channels.get(name.encode())
        if channel is None:
            channel = self._channels[name.encode()] = _Channel(name.encode(), tag, about)
            self._unheard.add(channel)
            self._wanted.set()
        return channel

    async def _until_heard(self, channels: Sequence[_Channel]) -> None:
        if self._attending is None:
            raise RuntimeError("subscribe() comes after listen()")
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[StoreError | None]] = []
        for channel in channels:
            if not channel.is_heard:
                futures.append(loop.create_future())
                channel.waiting.append(futures[-1])
        try:
            async with asyncio.timeout(self._client.timeout):
                outcomes = await asyncio.gather(*futures)
        except TimeoutError:
            raise StoreError("timeout", "the server did not confirm a subscription in time") from None
        finally:
            for channel in channels:
                channel.waiting = [future for future in channel.waiting if not future.done()]
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    def _forget(self, channel: _Channel) -> None:
        self._channels.pop(channel.name, None)
        self._unheard.discard(channel)

    def _unhear(self, channel: _Channel) -> None:
        channel.ear = None
        if channel.is_heard:
            channel.is_heard = False
            self._was_deaf = True
        self._unheard.add(channel)
        self._wanted.set()

    def _rearrange(self) -> None:
        """Leave ears for channels that stand elsewhere now: a node that was demoted would tell of them still, but not
        be counted among those that listen.
        """
        for channel in self._channels.values():
            line = self._asking.topology.line(channel.tag)
            ear = channel.ear
            if line is not None and ear is not None and ear.node != (line.host, line.port):
                self._unhear(channel)
                self._unwanted.append((ear, channel.name))

    async def _attend(self) -> None:
        pause = FIRST_PAUSE
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                await self._ask_for_missing()
                failed = None
            except Exception as error:  # whatever it is, who ended here would be deaf for ever
                failed = error if isinstance(error, StoreError) else StoreError("down", "see the log")
                if failed is not error:
                    logger.error("the store's channels could not be asked for; it is tried again", exc_info=error)
                self._was_deaf = True
                for channel in list(self._unheard):
                    if channel.ear is None:
                        channel.settle(failed)
            if failed is None and not self._was_deaf:
                pause = FIRST_PAUSE
            elif any(channel.ear is None for channel in self._unheard):
                self._wanted.set()
                await asyncio.sleep(random.uniform(pause / 2, pause))
                pause = min(pause * 2, LONGEST_PAUSE)

    async def _ask_for_missing(self) -> None:
        """Ask for each channel that nobody was asked for. Raises ClusterUnavailableError where a node is not there."""
        unwanted, self._unwanted = self._unwanted, []
        for ear, name in unwanted:
            found = self._channels.get(name)
            if found is None or found.ear is not ear:
                await ear.change("sunsubscribe", [name])
        missing: dict[Node, list[_Channel]] = {}
        for channel in [each for each in self._unheard if each.ear is None]:
            line = await self._asking.line(channel.tag)
            missing.setdefault((line.host, line.port), []).append(channel)
        trouble: StoreError | None = None
        for node, channels in missing.items():
            try:
                if node not in self._ears:
                    self._ears[node] = await open_ear(self._client, node, self, self._heartbeat)
            except StoreError as error:
                trouble = error  # the other nodes are asked all the same
                self._asking.topology.look_again()
                continue
            ear = self._ears[node]
            wanted = [channel for channel in channels if self._channels.get(channel.name) is channel]
            for channel in wanted:
                channel.ear = ear
            await ear.change("ssubscribe", [channel.name for channel in wanted])
        if trouble is not None:
            raise trouble

    def _call(self, function: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> None:
        try:
            function(*arguments, **named)
        except Exception as error:  # noqa: BLE001 - the hearer's own mistake must not end the hearing
            asyncio.get_running_loop().call_exception_handler(
                {"message": "what the store said could not be taken", "exception": error}
            )
