"""What is FastMCP's own: its applications, and the store of its sessions' state."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, SupportsFloat, TypeVar

import fastmcp
from fastmcp.prompts import Prompt
from fastmcp.resources import Resource, ResourceTemplate
from fastmcp.server.transforms import (
    GetPromptNext,
    GetResourceNext,
    GetResourceTemplateNext,
    GetToolNext,
    Transform,
)
from fastmcp.tools import Tool
from fastmcp.utilities.versions import VersionSpec
from key_value.aio.protocols import AsyncKeyValue

from ucm_middleware import ConfigurationError, current_context
from ucm_middleware_mcp.library import FASTMCP_FLOOR, require
from ucm_middleware_mcp.serving import Served, Transport
from ucm_middleware_mcp.threads import watch

require("fastmcp", FASTMCP_FLOOR)

Found = dict[str, Any] | None
Component = TypeVar("Component")


def served_by_fastmcp(server: Any, transport: Transport, options: dict[str, Any]) -> Served:
    """The application as FastMCP makes it."""
    if not isinstance(server, fastmcp.FastMCP):
        raise ConfigurationError(f"a {type(server).__name__} is no FastMCP")
    app = server.http_app(transport=transport, **options)
    if transport == "sse":
        return Served(app, (app.state.path, fastmcp.settings.message_path))
    is_stateless = options.get("stateless_http")
    return Served(app, (app.state.path,), fastmcp.settings.stateless_http if is_stateless is None else is_stateless)


class UserStateStore:
    """Around any other store, for ``FastMCP(session_state_store=...)``: each user's state is that user's alone.

    FastMCP goes by session ids, which on some protocols a header of the client's says, and by its own tokens, which it
    may not have. Here each key is derived by the owner, from the key that FastMCP asks for and the collection: whoever
    names another's finds nothing. It serves FastMCP's caches of answers too. ``ttl`` and collections are the store's.

    Raises ContextNotFoundError in code that runs for nobody, ConfigurationError in production without a secret.
    """

    def __init__(self, store: AsyncKeyValue) -> None:
        self._store = store

    async def get(self, key: str, *, collection: str | None = None) -> Found:
        """The value, None when this user has none."""
        return (await self.ttl(key, collection=collection))[0]

    async def ttl(self, key: str, *, collection: str | None = None) -> tuple[Found, float | None]:
        """The value and how many seconds it has left."""
        for derived in _derived(key, collection):
            found = await self._store.ttl(derived, collection=collection)
            if found[0] is not None:
                return found
        return None, None

    async def put(
        self, key: str, value: Mapping[str, Any], *, collection: str | None = None, ttl: SupportsFloat | None = None
    ) -> None:
        """Keep a value."""
        await self._store.put(_derived(key, collection)[0], value, collection=collection, ttl=ttl)

    async def delete(self, key: str, *, collection: str | None = None) -> bool:
        """Forget a value, also one that was kept under a previous secret."""
        return await self._store.delete_many(_derived(key, collection), collection=collection) > 0

    async def get_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[Found]:
        """The values, in the order of the keys."""
        return [await self.get(key, collection=collection) for key in keys]

    async def ttl_many(self, keys: Sequence[str], *, collection: str | None = None) -> list[tuple[Found, float | None]]:
        """The values and how many seconds each has left."""
        return [await self.ttl(key, collection=collection) for key in keys]

    async def put_many(
        self,
        keys: Sequence[str],
        values: Sequence[Mapping[str, Any]],
        *,
        collection: str | None = None,
        ttl: SupportsFloat | None = None,
    ) -> None:
        """Keep several."""
        await self._store.put_many(
            [_derived(key, collection)[0] for key in keys], values, collection=collection, ttl=ttl
        )

    async def delete_many(self, keys: Sequence[str], *, collection: str | None = None) -> int:
        """Forget several. Returns how many there were."""
        return sum([await self.delete(key, collection=collection) for key in keys])


def _derived(key: str, collection: str | None) -> tuple[str, ...]:
    """The keys under which this user's value may stand, the one to keep it under first."""
    # FastMCP's keys are longer than ids may be, and hold what clients wrote.
    name = hashlib.sha256(f"{collection or ''}\0{key}".encode(errors="surrogatepass")).hexdigest()
    return current_context().candidate_keys("mcp_state", name)


class _Watching(Transform):
    """Sees what FastMCP is about to run, of a server and of those that are mounted in it, and changes nothing but that
    its threads are watched.
    """

    def put_into(self, server: object) -> None:
        """Once, also into servers that are mounted later."""
        if isinstance(server, fastmcp.FastMCP) and self not in server.transforms:
            server.add_transform(self)

    def _seen(self, component: Component) -> Component:
        self.put_into(getattr(component, "_server", None))  # a mounted one's, which looks it up in its own server
        watch(component)
        return component

    async def get_tool(self, name: str, call_next: GetToolNext, *, version: VersionSpec | None = None) -> Tool | None:
        return self._seen(await call_next(name, version=version))

    async def get_resource(
        self, uri: str, call_next: GetResourceNext, *, version: VersionSpec | None = None
    ) -> Resource | None:
        return self._seen(await call_next(uri, version=version))

    async def get_resource_template(
        self, uri: str, call_next: GetResourceTemplateNext, *, version: VersionSpec | None = None
    ) -> ResourceTemplate | None:
        return self._seen(await call_next(uri, version=version))

    async def get_prompt(
        self, name: str, call_next: GetPromptNext, *, version: VersionSpec | None = None
    ) -> Prompt | None:
        return self._seen(await call_next(name, version=version))


def watch_threads(server: "fastmcp.FastMCP[Any]") -> None:
    """Have what the server runs in threads listed where it outlives its call."""
    _Watching().put_into(server)
