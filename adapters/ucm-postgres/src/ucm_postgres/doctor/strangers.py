"""Made-up users: whose a row is, and who is bound, where the row is not theirs."""

import secrets
import uuid
from typing import Final, Literal

Stranger = Literal["another", "uuid", "number", "case", "longer", "shorter", "cut", "pattern", "expression", "list"]
"""How the two are alike; *another* is for not at all."""

STRANGERS: Final[tuple[Stranger, ...]] = (
    *("another", "uuid", "number", "case", "longer", "shorter", "cut", "pattern", "expression", "list"),
)

ALIKE: Final[dict[str, str]] = {
    "case": "ids that differ in upper and lower case only",
    "longer": "ids of which one begins with the other",
    "shorter": "ids of which one begins with the other",
    "cut": "ids that begin alike",
    "pattern": "the id % as a pattern",
    "expression": "the id .* as an expression",
    "list": "an id with a comma as a list",
}
"""What conditions take for the same that is not. Ids that only have a form in common, as two uuids, are not alike."""

TEXTS: Final = {"text", "character varying", "character", "citext"}
_NUMBERS: Final = {"smallint": 32_000, "integer": 2_000_000_000, "bigint": 9_000_000_000_000_000_000, "numeric": 10**30}


def strangers(kind: str | None) -> dict[Stranger, tuple[str, str]]:
    """Whose the row is and who is bound, as a column of this type takes them. Nobody has these ids."""
    if kind == "uuid":
        return {"another": (str(uuid.uuid4()), str(uuid.uuid4()))}
    if kind in _NUMBERS:
        return {"another": (str(_NUMBERS[kind]), str(_NUMBERS[kind] - 1))}
    stem = f"d-{secrets.token_hex(8)}"
    found: dict[Stranger, tuple[str, str]] = {"another": (f"d-{secrets.token_hex(4)}", f"d-{secrets.token_hex(4)}")}
    if kind is not None and kind not in TEXTS:
        return found
    # A condition that casts the id is an error for one of another form, and would not be seen to hold.
    found |= {
        "uuid": (str(uuid.uuid4()), str(uuid.uuid4())),
        "number": (str(1_900_000_000 + secrets.randbelow(10**8)), str(1_100_000_000 + secrets.randbelow(10**8))),
        "longer": (f"{stem}1", stem),
        "shorter": (stem, f"{stem}1"),
        "cut": (f"{stem}1", f"{stem}2"),
        "pattern": (stem, "%"),
        "expression": (stem, ".*"),
        "list": (stem, f"d-{secrets.token_hex(4)},{stem}"),
    }
    if kind != "citext":  # where they are the same
        found["case"] = (stem.upper(), stem)
    return found
