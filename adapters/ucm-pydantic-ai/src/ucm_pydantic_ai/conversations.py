"""UserConversations: any conversation store of Pydantic AI's, with nothing in it that another user could name.

What the inner store sees of a conversation is its owner-derived key and, after a line break, what the user calls it; of
an entry, the user's own tag and the entry's id. Neither a key nor a tag has a line break in it, nor has an id, so none
can be made to look like another. The tag is the record's scope as well, by which the user's conversations are listed.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from pydantic_ai.conversation_store import (
    ConversationConflict,
    ConversationEntry,
    ConversationRecord,
    ConversationStore,
)
from pydantic_ai.exceptions import UserError

from ucm_middleware import UserExecutionContext, current_context

KIND: Final = "pydantic_ai_conversation"
OWNER_KIND: Final = "pydantic_ai_user"
OWNER_ID: Final = "conversations"

_BREAK: Final = "\n"

_T = TypeVar("_T")


class UserConversations(ConversationStore):
    """The conversations of the user that the calling code runs for, in ``store``.

    Whose they are is never a parameter: every operation takes the current context's user, and raises
    ContextNotFoundError outside of one. Another user's conversation and none at all are the same: it is not there. What
    the store hands out is checked before it is given on; a record or an entry that is not the user's raises
    CrossUserAccessError, and is recorded. The owner takes the place of ``scope``, which is refused with UserError.

    A conversation that stands under a previous secret moves to the current one when it is read.

    A conversation's id is what the client says: 1 to 256 visible characters, InvalidContextError for others.
    """

    def __init__(self, store: ConversationStore) -> None:
        self.store = store

    # The operations of a store, on the user's own.

    async def read_record(self, conversation_id: str) -> ConversationRecord | None:
        owners = _owners(current_context())
        names = owners[0].names(conversation_id)
        record = await self._look_up(owners[0], names[0], conversation_id)
        for owner, name in zip(owners[1:], names[1:], strict=False):
            if record is None and (earlier := await self._look_up(owner, name, conversation_id)) is not None:
                await self._move(earlier, owner, name)
                record = await self._look_up(owners[0], names[0], conversation_id)
        return record

    async def read_records(self, *, scope: str | None = None, limit: int | None = None) -> Sequence[ConversationRecord]:
        _refuse_scope(scope)
        records: dict[str, ConversationRecord] = {}
        for owner in _owners(current_context()):
            for record in await self.store.read_records(scope=owner.tag, limit=limit):
                conversation_id = record.conversation_id.partition(_BREAK)[2]
                records.setdefault(conversation_id, owner.open_record(record, conversation_id))
        newest_first = sorted(records.values(), key=lambda record: record.updated_at, reverse=True)
        return newest_first[:limit]

    async def write_record(
        self,
        record: ConversationRecord,
        *,
        new_entries: Sequence[ConversationEntry] = (),
        expected_revision: str | None,
    ) -> None:
        _refuse_scope(record.scope)
        owner = _owners(current_context())[0]
        try:
            await self.store.write_record(
                owner.close_record(record),
                new_entries=[owner.close_entry(entry) for entry in new_entries],
                expected_revision=expected_revision,
            )
        except ConversationConflict:
            raise ConversationConflict(record.conversation_id) from None

    async def delete_record(self, conversation_id: str, *, expected_revision: str) -> None:
        owners = _owners(current_context())
        names = owners[0].names(conversation_id)
        try:
            await self.store.delete_record(names[0], expected_revision=expected_revision)
            for name in names[1:]:  # what a move that was broken off left would come back
                if (left := await self.store.read_record(name)) is not None:
                    await self.store.delete_record(name, expected_revision=left.revision)
        except ConversationConflict:
            raise ConversationConflict(conversation_id) from None

    async def read_entry(self, entry_id: str) -> ConversationEntry:
        owner = _owners(current_context())[0]
        try:
            return owner.open_entry(await self.store.read_entry(owner.close_id(entry_id)))
        except LookupError:
            raise KeyError(entry_id) from None

    async def read_history(self, head_id: str | None, *, limit: int | None = None) -> list[ConversationEntry]:
        if head_id is None:
            return []
        owner = _owners(current_context())[0]
        return await self._history(owner, head_id, limit)

    async def _look_up(self, owner: "_Owner", name: str, conversation_id: str) -> ConversationRecord | None:
        record = await self.store.read_record(name)
        return None if record is None else owner.open_record(record, conversation_id)

    async def _history(self, owner: "_Owner", head_id: str, limit: int | None = None) -> list[ConversationEntry]:
        try:
            history = await self.store.read_history(owner.close_id(head_id), limit=limit)
            return [owner.open_entry(entry) for entry in history]
        except LookupError:
            raise KeyError(head_id) from None

    async def _move(self, record: ConversationRecord, owner: "_Owner", name: str) -> None:
        """Store under the current secret what stands under an earlier one, its messages too, and delete it there."""
        entries: dict[str, ConversationEntry] = {}
        for tip in (*record.branches, record.head_id):
            if tip is not None:
                entries.update((entry.id, entry) for entry in await self._history(owner, tip))
        with suppress(ConversationConflict):  # another process did it at the same time, and what it left is what counts
            await self.write_record(record, new_entries=list(entries.values()), expected_revision=None)
            await self.store.delete_record(name, expected_revision=record.revision)


@dataclass(frozen=True, slots=True)
class _Owner:
    """What becomes of names on the way to the inner store and back, for one user and one secret."""

    context: UserExecutionContext
    tag: str

    def names(self, conversation_id: str) -> list[str]:
        """What a conversation is called inside, under each secret."""
        return [key + _BREAK + conversation_id for key in self.context.candidate_keys(KIND, conversation_id)]

    def close_id(self, entry_id: str) -> str:
        return self.tag + _BREAK + entry_id

    def open_id(self, closed: str) -> str:
        found, _, entry_id = closed.partition(_BREAK)
        if found != self.tag:  # looked at first: to check costs as much as a hash, and a history may be long
            self.context.check_key(OWNER_KIND, OWNER_ID, found)
        return entry_id

    def close_entry(self, entry: ConversationEntry) -> ConversationEntry:
        return replace(entry, id=self.close_id(entry.id), parent_id=_where(self.close_id, entry.parent_id))

    def open_entry(self, entry: ConversationEntry) -> ConversationEntry:
        return replace(entry, id=self.open_id(entry.id), parent_id=_where(self.open_id, entry.parent_id))

    def close_record(self, record: ConversationRecord) -> ConversationRecord:
        return replace(
            record,
            conversation_id=self.names(record.conversation_id)[0],
            scope=self.tag,
            head_id=_where(self.close_id, record.head_id),
            forked_from=_where(lambda forked_from: self.names(forked_from)[0], record.forked_from),
            forked_at=_where(self.close_id, record.forked_at),
            branches=[self.close_id(tip) for tip in record.branches],
        )

    def open_record(self, record: ConversationRecord, conversation_id: str) -> ConversationRecord:
        """Raises CrossUserAccessError for a record that is not this user's, or not this conversation's."""
        self.context.check_key(KIND, conversation_id, record.conversation_id.partition(_BREAK)[0])
        return replace(
            record,
            conversation_id=conversation_id,
            scope=None,
            head_id=_where(self.open_id, record.head_id),
            forked_from=_where(lambda forked_from: forked_from.partition(_BREAK)[2], record.forked_from),
            forked_at=_where(self.open_id, record.forked_at),
            branches=[self.open_id(tip) for tip in record.branches],
        )


def _owners(context: UserExecutionContext) -> list[_Owner]:
    """The user under each secret, the current one first."""
    return [_Owner(context, tag) for tag in context.candidate_keys(OWNER_KIND, OWNER_ID)]


def _where(function: Callable[[str], _T], value: str | None) -> _T | None:
    return None if value is None else function(value)


def _refuse_scope(scope: str | None) -> None:
    if scope is not None:
        raise UserError("scope= has no place here: a user's conversations have their owner for a scope; leave it out")
