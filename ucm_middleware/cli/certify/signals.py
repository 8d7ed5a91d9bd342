"""What is told to end leaves nothing behind: by SIGTERM and SIGHUP as by Ctrl+C."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

import typer

_ENDING: Final = (signal.SIGTERM, signal.SIGHUP)
"""Those that would end the process at once. SIGINT asyncio sees to."""

Result = TypeVar("Result")


def ended_by_signals(main: Coroutine[Any, Any, Result]) -> Result:
    """Run it, and cancel it where such a signal comes, unless that is ignored, as under nohup.

    Raises typer.Exit then, with the exit status of a process that a signal has ended.
    """
    came: list[int] = []

    async def run() -> Result:
        task = asyncio.current_task()
        assert task is not None

        def end(number: int) -> None:
            if not came:  # the clean-up has its own limits, and is not to be cut off
                task.cancel()
            came.append(number)

        for number in _ENDING:
            if signal.getsignal(number) is signal.SIG_DFL:
                asyncio.get_running_loop().add_signal_handler(number, end, number)
        return await main

    try:
        return asyncio.run(run())
    except asyncio.CancelledError:
        if not came:
            raise
        raise typer.Exit(128 + came[0]) from None
