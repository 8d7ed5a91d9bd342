"""What policies really let through, asked of PostgreSQL: each condition is worked out for rows that do not exist."""

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import psycopg
from psycopg import sql

from ucm_postgres.doctor.catalog import Catalog, Policy, Table
from ucm_postgres.doctor.findings import Finding
from ucm_postgres.doctor.mending import fenced, guarded, literal, rewritten
from ucm_postgres.doctor.strangers import ALIKE, STRANGERS, TEXTS, Stranger, strangers

Bound = Literal["unset", "empty", "unsigned"] | Stranger
"""Who is bound: nobody yet on this connection, nobody any more, somebody whose rows these are not, or, in the hardened
mode, somebody who says that they are theirs and cannot prove it."""

Row = Literal["owned", "empty", "null"]
"""Whose row it is: somebody's, or what an empty setting and an absent one would match."""

_BOUND: Final[tuple[Bound, ...]] = ("unset", "empty", *STRANGERS, "unsigned")
_UNBOUND: Final[tuple[Bound, ...]] = ("unset", "empty")
_COMMANDS: Final = {"r": "select", "a": "insert", "w": "update", "W": "update", "d": "delete"}
"""What may be done with a row. An update is asked about twice: for the row that is there, and what it becomes."""

_WRITING: Final = {"a", "W"}


# It took too long, or a function wrote, and did not come to its answer.
_UNTOLD: Final = (
    psycopg.errors.QueryCanceled,
    psycopg.errors.LockNotAvailable,
    psycopg.errors.ReadOnlySqlTransaction,
)

# The connection, prepared statements, the server's means, its operators, its files and its faults.
_NOT_ITS_OWN: Final = ("08", "26", "42P05", "53", "57", "58", "XX")


@dataclass(slots=True)
class _Judged:
    """A policy, with the rows that its conditions are true for: those that are there, and those that are written."""

    policy: Policy
    seen: dict[Bound, set[Row]] = field(default_factory=dict[Bound, set[Row]])
    written: dict[Bound, set[Row]] = field(default_factory=dict[Bound, set[Row]])

    def lets(self, command: str, bound: Bound) -> set[Row]:
        """The rows that it lets this command reach."""
        return (self.written if command in _WRITING else self.seen).get(bound, set())


def examine_policies(catalog: Catalog) -> Iterator[Finding]:
    """Policies that hold nobody back, and rows that are visible to nobody in particular.

    Changes the setting in the transaction that the caller rolls back.
    """
    tables = [table for table in catalog.tables if table.enabled and _is_bound(catalog, table)]
    judged = {table.oid: [_Judged(policy) for policy in catalog.policies[table.oid]] for table in tables}
    visible: set[int] = set()
    shared: set[int] = set()
    users = {table.oid: _users(table) for table in tables}
    unknown = {table.oid for table in tables if not _can_be_judged(catalog, table, users[table.oid]["another"][0])}
    for bound in _BOUND:
        for table in tables:
            if bound not in users[table.oid]:
                continue
            mine, user = users[table.oid][bound]
            if not _bind(catalog, bound, user):
                continue
            for each in judged[table.oid]:
                if not _judge(catalog, table, each, bound, mine):
                    unknown.add(table.oid)
            if bound in _UNBOUND and "select" in table.privileges:
                _look(catalog, table, "true", visible, unknown)
            elif bound == "another" and "select" in table.privileges and table.user_column is not None:
                _look(catalog, table, f"{table.user_column} is not null", shared, unknown)
    for table in tables:
        found = list(_verdicts(catalog, table, judged[table.oid]))
        yield from found
        if table.oid in visible and not found:
            problem = "rows are visible where no user is bound"
            yield Finding("visible", "serious", table.name, problem, fenced(catalog, table))
        elif table.oid in shared and not found:
            problem = (
                "rows of users are visible to a user whom the application has never had; see that no others are than "
                "those that are meant for all"
            )
            yield Finding("shared", "info", table.name, problem)
        if table.oid in unknown:
            problem = (
                "what its policies let through could not be told: it took too long, a function writes, or a type of a "
                "column takes no values that were made up; judge them yourself, and accept this"
            )
            yield Finding("not-judged", "warning", table.name, problem)


def _is_bound(catalog: Catalog, table: Table) -> bool:
    return table.user_column is not None or any(policy.mentions for policy in catalog.policies[table.oid])


def _users(table: Table) -> dict[Bound, tuple[str, str]]:
    # Whose the row is, and who is bound.
    pairs = strangers(table.user_type)
    mine = pairs["another"][0]
    found: dict[Bound, tuple[str, str]] = {"unset": (mine, ""), "empty": (mine, ""), "unsigned": (mine, mine)}
    found.update(pairs.items())
    return found


def _bind(catalog: Catalog, bound: Bound, user: str) -> bool:
    setting = catalog.binding.setting
    if bound == "unset":
        # Once it was set it never is null again, on this connection.
        return catalog.value("select current_setting(%s, true) is null", setting) is True
    if bound == "unsigned" and not catalog.binding.signed:
        return False
    catalog.connection.execute("select set_config(%s, %s, true)", [setting, user])
    return True


def _judge(catalog: Catalog, table: Table, judged: _Judged, bound: Bound, user: str) -> bool:
    # False is for what could not be told in time.
    policy = judged.policy
    seen = set[Row]() if policy.using is None else _true_for(catalog, table, policy.using, user)
    written = (
        seen if policy.check is None or policy.check == policy.using else _true_for(catalog, table, policy.check, user)
    )
    judged.seen[bound], judged.written[bound] = seen or set(), written or set()
    return seen is not None and written is not None


def _true_for(catalog: Catalog, table: Table, condition: str, user: str) -> set[Row] | None:
    rows = _rows(catalog, table, user)
    asked = [f"(select ({condition}) is true from {source})" for source in rows.values()]
    answers = _ask(catalog, f"select {', '.join(asked)}")
    if answers == ():  # one of them is an error, which lets nothing through: the statement fails
        each = [_ask(catalog, f"select {question}") for question in asked]
        answers = None if None in each else [bool(answer and answer[0]) for answer in each]
    if answers is None:
        return None
    return {row for row, answer in zip(rows, answers, strict=True) if answer}


def _rows(catalog: Catalog, table: Table, user: str) -> dict[Row, str]:
    # Each as what FROM takes, by the table's own name, as a condition may say it.
    rows: dict[Row, dict[str, str | None]] = {"null": {}}
    if table.user_column is not None:
        rows["owned"] = {catalog.user_column: user}
        if table.user_type in TEXTS:
            rows["empty"] = {catalog.user_column: ""}
    relation = sql.Identifier(table.schema, table.bare_name).as_string(catalog.connection)
    alias = sql.Identifier(table.bare_name).as_string(catalog.connection)
    return {
        row: f"(select (jsonb_populate_record(null::{relation}, {literal(catalog, json.dumps(values))}::jsonb)).*) as "
        f"{alias}"
        for row, values in rows.items()
    }


def _can_be_judged(catalog: Catalog, table: Table, user: str) -> bool:
    # Types may refuse such values: a domain that is not null, an enumeration.
    row = sql.Identifier(table.bare_name).as_string(catalog.connection)
    asked = ", ".join(f"(select ({row}.*)::text from {source})" for source in _rows(catalog, table, user).values())
    return bool(_ask(catalog, f"select {asked}"))


def _ask(catalog: Catalog, query: str) -> Sequence[object] | None:
    # The row; an empty one for an error of the statement's own, and None for what could not be told.
    try:
        with catalog.connection.transaction(), psycopg.RawCursor(catalog.connection) as cursor:
            return cursor.execute(query.encode()).fetchone() or ()
    except _UNTOLD:
        return None
    except psycopg.DatabaseError as error:
        if catalog.connection.broken or (error.sqlstate or "").startswith(_NOT_ITS_OWN):
            raise
        return ()


def _look(catalog: Catalog, table: Table, which: str, visible: set[int], unknown: set[int]) -> None:
    query = f"select row_security_active({table.oid}::oid) and exists (select from {table.name} where {which})"
    found = _ask(catalog, query)
    if found is None:
        unknown.add(table.oid)
    elif found and found[0]:
        visible.add(table.oid)


def _verdicts(catalog: Catalog, table: Table, judged: Sequence[_Judged]) -> Iterator[Finding]:
    guilty: dict[str, set[str]] = {}  # a policy's name, and what it lets somebody do
    open_to_all: dict[str, set[Bound]] = {}
    unsigned: set[str] = set()
    for command in _COMMANDS:
        for bound in _BOUND:
            rows = _leaking(table, judged, command, bound)
            for each in judged:
                if each.policy.permissive and each.policy.covers(command.lower()) and rows & each.lets(command, bound):
                    guilty.setdefault(each.policy.name, set()).add(_COMMANDS[command])
                    if bound == "unsigned":
                        unsigned.add(each.policy.name)
                    elif bound not in _UNBOUND:
                        open_to_all.setdefault(each.policy.name, set()).add(bound)
    for each in judged:
        commands = guilty.get(each.policy.name)
        if commands is None:
            continue
        doing = ", ".join(name for name in dict.fromkeys(_COMMANDS.values()) if name in commands)
        subject = f"{table.name}.{each.policy.name}"
        if each.policy.name in open_to_all:
            problem = f"the policy holds for rows of other users ({doing}), and another policy cannot take that back"
            problem += _alike(open_to_all[each.policy.name])
            mending = _closed(catalog, table, each, judged, open_to_all)
            yield Finding("policy-open", "serious", subject, problem, mending)
        elif each.policy.name in unsigned and table.user_column is not None:
            problem = f"the policy takes a user id that nobody has signed ({doing})"
            yield Finding("unsigned", "serious", subject, problem, rewritten(catalog, table, each.policy))
        else:
            problem = f"the policy takes an unset or empty {catalog.binding.setting} for a match ({doing})"
            yield Finding("unset-matches", "serious", subject, problem, guarded(catalog, table, each.policy))


def _alike(bounds: set[Bound]) -> str:
    if any(bound not in ALIKE for bound in bounds):
        return ""
    return "; it takes for the same: " + ", ".join(dict.fromkeys(ALIKE[bound] for bound in _BOUND if bound in bounds))


def _leaking(table: Table, judged: Sequence[_Judged], command: str, bound: Bound) -> set[Row]:
    let = _allowed(judged, command, bound)
    if bound not in _UNBOUND:
        if table.user_column is not None:
            return let & {"owned"}
        # Without a column of the user, only a policy that asks for no user beside one that does is a mistake.
        careless = [each for each in judged if not each.policy.mentions]
        return let & _allowed([*careless, *(each for each in judged if not each.policy.permissive)], command, bound)
    # A row of nobody's that a bound user sees as well is meant for all.
    return let - (_allowed(judged, command, "another") - {"owned"})


def _allowed(judged: Sequence[_Judged], command: str, bound: Bound) -> set[Row]:
    let: set[Row] = set()
    for each in judged:
        if each.policy.permissive and each.policy.covers(command.lower()):
            let |= each.lets(command, bound)
    for each in judged:
        if not each.policy.permissive and each.policy.covers(command.lower()):
            let &= each.lets(command, bound)
    return let


def _closed(
    catalog: Catalog, table: Table, guilty: _Judged, judged: Sequence[_Judged], open_to_all: Collection[str]
) -> str:
    policy = guilty.policy
    others = [each.policy for each in judged if each.policy.permissive and each.policy.name not in open_to_all]
    if table.user_column is None or any(other.command in {"*", policy.command} for other in others):
        return f"drop policy {policy.name} on {table.name};"
    return rewritten(catalog, table, policy)
