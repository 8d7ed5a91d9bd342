"""Asking whom it concerns: redirections of a cluster, scripts that a server does not know yet, and its errors."""

import asyncio
from collections.abc import Sequence
from typing import Final

from ucm_valkey.cluster.faults import Fault, StoreError
from ucm_valkey.cluster.lines import Command, Line, Word
from ucm_valkey.cluster.scripts import Script
from ucm_valkey.cluster.topology import Topology

MOST_TRIES: Final = 6
"""How often a command is sent at most, while servers say that it was not done."""

PAUSE: Final = 0.05
"""Seconds before it is sent again to a cluster that is moving keys."""

_NOT_DONE: Final = frozenset({"MOVED", "ASK", "TRYAGAIN", "CLUSTERDOWN", "NOSCRIPT", "NOPERM", "NOAUTH", "OOM"}) | {
    "LOADING",
    "MASTERDOWN",
    "READONLY",
    "NOREPLICAS",
    "MISCONF",
    "BUSY",
}
"""Errors that come before anything was done. Of all others one cannot know."""


class Asking:
    """Sends commands to the servers of a topology."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology

    async def line(self, tag: str) -> Line:
        """The line to the server that a tag's keys stand on."""
        return self.topology.line(tag) or await self.topology.find(tag)

    async def run(self, script: Script, tag: str, keys: Sequence[str], *arguments: Word) -> object:
        """Run a script on the server that a tag's keys stand on. Raises ClusterUnavailableError."""
        count = len(keys)
        answer = await self.send(tag, ("EVALSHA", script.sha, count, *keys, *arguments))
        if isinstance(answer, Fault) and answer.code == "NOSCRIPT":
            answer = await self.send(tag, ("EVAL", script.text, count, *keys, *arguments))
        return done(answer)

    async def send(self, tag: str, command: Command) -> object:
        """The answer to a command, which may be a Fault. Raises ClusterUnavailableError where there is none."""
        topology = self.topology
        tries = 0
        while True:
            line = await self.line(tag)
            try:
                answer = await line.ask(command)
                if isinstance(answer, Fault) and answer.code == "ASK" and answer.node is not None:
                    # The slot is on its way: this once, the other node is to answer.
                    answer = (await topology.line_to(answer.node).ask_all([("ASKING",), command]))[1]
            except StoreError:
                topology.look_again()
                raise
            tries += 1
            if not isinstance(answer, Fault) or tries == MOST_TRIES:
                return answer
            if answer.code == "MOVED":
                topology.moved(answer)
            elif answer.code in ("ASK", "TRYAGAIN", "CLUSTERDOWN"):
                topology.look_again()
                await asyncio.sleep(PAUSE)
            else:
                return answer


def done(answer: object) -> object:
    """An answer that is no error. Raises ClusterUnavailableError for one that is."""
    if isinstance(answer, Fault):
        raise answer.error(is_unknown=answer.code not in _NOT_DONE)
    return answer
