"""A tap that runs in a thread of its own, so that clients which block can be tried too."""

import asyncio
import threading
from collections.abc import Generator, Mapping
from contextlib import contextmanager

from support.waiting import PATIENCE
from ucm_middleware.certify.postgres import Tap, Use, tap


class Tapped:
    """One that runs, and what it told: ``uses`` in order."""

    def __init__(self, made: Tap, uses: list[Use]) -> None:
        self.tap = made
        self.dsn = made.dsn
        self.uses = uses

    @property
    def seen(self) -> list[Mapping[str, str]]:
        """The settings of the uses."""
        return [use.settings for use in self.uses]


@contextmanager
def tapping(dsn: str) -> Generator[Tapped]:
    """Tap a DSN inside the block."""
    loop = asyncio.new_event_loop()
    is_up, is_over = threading.Event(), asyncio.Event()
    made: list[Tapped] = []
    wrong: list[BaseException] = []

    async def run() -> None:
        uses: list[Use] = []
        async with tap(dsn, uses.append) as running:
            made.append(Tapped(running, uses))
            is_up.set()
            await is_over.wait()

    def serve() -> None:
        try:
            loop.run_until_complete(run())
        except BaseException as error:  # noqa: BLE001 - raised in the test
            wrong.append(error)
        finally:
            loop.close()
            is_up.set()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        assert is_up.wait(PATIENCE)
        if made:
            yield made[0]
    finally:
        if made:
            loop.call_soon_threadsafe(is_over.set)
        thread.join(PATIENCE)
        assert not thread.is_alive()
        if wrong:
            raise wrong[0]
