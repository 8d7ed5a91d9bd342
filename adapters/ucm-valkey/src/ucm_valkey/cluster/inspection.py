"""Whether a server can serve, found out before anything depends on it: by asking it to do what will be asked of it."""

from typing import Final

from ucm_middleware import ConfigurationError
from ucm_valkey.cluster import answers
from ucm_valkey.cluster.clients import Client, Node, Wire, fields_of
from ucm_valkey.cluster.faults import Fault, StoreError
from ucm_valkey.cluster.keys import Keys
from ucm_valkey.cluster.lines import Command, Line
from ucm_valkey.cluster.scripts import PROBE

OLDEST: Final = (7, 0)
"""Redis 7.0, as which Valkey 7.2 counts too: sharded channels, and scripts with flags."""


class Inspection:
    """One look at one node. ``bucket`` is one that stands there, or None for a node without any."""

    def __init__(self, client: Client, node: Node, keys: Keys, bucket: int | None) -> None:
        self._client = client
        self._where = f"{node[0]}:{node[1]}"
        self._keys = keys
        self._bucket = bucket
        # A connection of its own: it is subscribed for a moment.
        self._line = Line(client, *node)

    async def run(self) -> None:
        """Raise ConfigurationError for what can never work, ClusterUnavailableError for what may pass."""
        try:
            self._check_server(await self._line.wire())
            await self._check_state()
            if self._bucket is not None:
                await self._check_rights(self._bucket)
        except StoreError as error:
            raise error.at_start() from None
        finally:
            await self._line.aclose()

    def _check_server(self, wire: Wire) -> None:
        if wire.version < OLDEST or not wire.run:
            found = ".".join(map(str, wire.version)) or "unknown"
            raise self._unfit(f"its version is {found}: Valkey 7.2 or Redis 7.0 is the oldest that can serve")
        if wire.is_clustered and not self._client.target.is_cluster:
            raise self._unfit("it is a node of a cluster: add ?cluster=true to the url")

    async def _check_state(self) -> None:
        info = fields_of(await self._granted(("INFO", "memory", "replication")))
        if info.get("maxmemory", "0") != "0" and info.get("maxmemory_policy") != "noeviction":
            raise self._unfit(
                f"its maxmemory-policy is {info.get('maxmemory_policy')}: when its memory is full it throws leases "
                "away, and more would be granted than a limit allows; set it to noeviction"
            )
        if info.get("role") == "slave":
            raise Fault("READONLY").error()

    async def _check_rights(self, bucket: int) -> None:
        key, channel = self._keys.probe(bucket), self._keys.nudges(bucket)
        probed = await self._granted(("EVAL", PROBE.text, 1, key, channel))
        for refused in answers.texts(probed):
            command, _, about = refused.partition(" ")
            raise self._not_allowed(command, about)
        await self._granted(("EVALSHA", PROBE.sha, 1, key, channel))
        await self._granted(("XRANGE", self._keys.probe(bucket), "-", "+", "COUNT", 1))
        await self._granted(("SCAN", 0, "COUNT", 1))
        if self._client.target.is_cluster:
            await self._granted(("ASKING",))
        await self._granted(("SSUBSCRIBE", channel))
        # The others are what a connection that listens may use.
        await self._granted(("PING",))
        await self._granted(("SUNSUBSCRIBE", channel))

    async def _granted(self, command: Command) -> object:
        answer = await self._line.ask(command)
        if not isinstance(answer, Fault):
            return answer
        name = str(command[0]).lower()
        if answer.code == "NOPERM":
            raise self._not_allowed(name, answer.about or "command")
        if answer.code == "ERR" and name.startswith("eval"):
            raise self._unfit("it runs no scripts: EVAL and EVALSHA are switched off, or renamed")
        if answer.code == "ERR":
            raise self._unfit(f"it does not know the command {name.upper()}, or knows it differently")
        raise answer.error()

    def _not_allowed(self, command: str, about: str) -> ConfigurationError:
        if about == "command":
            lacks = f"may not use the command {command.upper()}: give it +{command}"
        elif about == "channel":
            lacks = f"may not use the application's channels ({command.upper()}): give it &{self._keys.prefix}*"
        else:
            lacks = f"may not use the application's keys ({command.upper()}): give it ~{self._keys.prefix}*"
        return self._unfit(f"the login {lacks}; the README of ucm-valkey has all that it needs")

    def _unfit(self, problem: str) -> ConfigurationError:
        return ConfigurationError(f"cluster: the server at {self._where} cannot serve, {problem}")
