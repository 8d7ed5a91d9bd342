"""Records as what is chained: in the clear, or sealed with the keys of a vault."""

from collections.abc import Iterator, Sequence

from ucm_middleware.audit.encoding import encode_plain, encode_sealed, users_in
from ucm_middleware.audit.records import Row, UserMention
from ucm_middleware.audit.subjects import Vault


def entries_of(rows: Sequence[Row], vault: Vault | None) -> list[tuple[bytes, bytes]]:
    """Subject and body of each. Who needs a key and has none gets one. Raises LedgerFileError."""
    if vault is None:
        return [encode_plain(row) for row in rows]
    subjects = vault.of({user_id for row in rows for user_id in users_in(row)})
    if bound := dict(pair for row in rows if row[0] == "bound" for pair in _bound(row)):
        vault.bind(bound)
    return [encode_sealed(row, subjects) for row in rows]


def _bound(row: Row) -> Iterator[tuple[str, str]]:
    """The anonymous one and the user that it learned: what is on record of the one is erased with the other."""
    anonymous_id = row[2]
    for name, value in row[11]:
        if name == "user_id" and isinstance(value, UserMention) and anonymous_id is not None:
            yield anonymous_id, value
