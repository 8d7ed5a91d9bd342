"""Stored events of streams that can be resumed: each session's own, whoever names their ids."""

from typing import Final

from mcp.server.streamable_http import EventCallback, EventId, EventMessage, EventStore, StreamId
from mcp_types import JSONRPCMessage

from ucm_middleware import ConfigurationError, current_context
from ucm_middleware_mcp.sessions import Session, serving

_SEPARATOR: Final = "."


class UserEventStore(EventStore):
    """Around any other event store: ``Last-Event-ID`` finds what was sent to that session, and nothing of others.

    Streams and events are kept under a random name of the session's. An id of another session's is answered as one
    that never was, before the store is asked; that is recorded.

    Raises ConfigurationError where it is used by a transport that ``MCP`` does not serve.
    """

    def __init__(self, store: EventStore) -> None:
        self._store = store

    async def store_event(self, stream_id: StreamId, message: JSONRPCMessage | None) -> EventId:
        """Keep an event of the session that is being served."""
        session = _session()
        event_id = await self._store.store_event(f"{session.name}{_SEPARATOR}{stream_id}", message)
        return f"{session.name}{_SEPARATOR}{event_id}"

    async def replay_events_after(self, last_event_id: EventId, send_callback: EventCallback) -> StreamId | None:
        """Send again what came after an event, if it is this session's own."""
        session = _session()
        name, _, event_id = last_event_id.partition(_SEPARATOR)
        if name != session.name:
            _record()
            return None
        found: list[EventMessage] = []

        async def keep(event: EventMessage) -> None:
            found.append(event)

        stream = await self._store.replay_events_after(event_id, keep)
        if stream is None:
            return None
        name, _, stream_id = stream.partition(_SEPARATOR)
        if name != session.name:  # the id behind our name was another session's
            _record()
            return None
        for event in found:
            named = None if event.event_id is None else f"{session.name}{_SEPARATOR}{event.event_id}"
            await send_callback(EventMessage(event.message, named))
        return stream_id


def _session() -> Session:
    session = serving.get()
    if session is None:
        raise ConfigurationError(
            "a UserEventStore keeps the events of sessions that are bound to users: serve the MCP server with "
            "MCP().app(server, event_store=...)"
        )
    return session


def _record() -> None:
    data = {"type": "mcp_replay"}
    current_context().record("event_sent", outcome="denied", reason="not of this session", data=data)
