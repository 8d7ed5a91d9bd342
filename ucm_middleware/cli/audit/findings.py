"""What a verification found, in words and as JSON."""

from base64 import b64encode
from collections import Counter

from ucm_middleware.audit.records import iso
from ucm_middleware.audit.verification import Examined, Together, Verification
from ucm_middleware.cli.terminal import say
from ucm_middleware.errors import LedgerFileError


def tell(ledger: str, found: Verification) -> None:
    """Say what was found of one ledger."""
    if not found.is_verified:
        say(f"NOT VERIFIED: {ledger}", style="bold red")
        for problem in found.problems:
            say(f"  {problem}")
        return
    say(f"verified: {ledger}", style="bold green")
    say(f"  {counted(found.records, 'record')} of {found.stream}, {_kind(found)}")
    say(f"  root {b64encode(found.root).decode()}")
    say(f"  {_evidence(found)}")


def tell_together(together: Together) -> None:
    """Say what was found of several, and of all together."""
    for each in together.ledgers:
        if isinstance(each.found, LedgerFileError):
            say(f"COULD NOT BE VERIFIED: {each.found}", style="bold red")
            continue
        tell(each.name, each.found)
        if each.times is not None:
            say(f"  from {iso(each.times[0])} to {iso(each.times[1])}")
    good = together.verified
    kinds = Counter(map(_kind, good))
    of_what = f" ({', '.join(f'{number} {kind}' for kind, number in sorted(kinds.items()))})" if good else ""
    says = "verified together" if together.is_verified else "NOT VERIFIED TOGETHER"
    records = counted(sum(found.records for found in good), "record")
    say(
        f"{says}: {len(good)} of {counted(len(together.ledgers), 'ledger')}{of_what}, {records}",
        style="bold green" if together.is_verified else "bold red",
    )
    for problem in together.problems:
        say(f"  {problem}")
    covered = sum(found.covered for found in good)
    say(f"  {covered} of the {records} are as checkpoints said")
    if kinds["sealed"]:
        say("  of sealed records, ids and contexts cannot be compared: only whether the same one is in two ledgers")


def plain(ledger: str, found: Verification) -> dict[str, object]:
    """What was found of one ledger, for a program."""
    return {
        "ledger": ledger,
        "verified": found.is_verified,
        "stream": found.stream,
        "sealed": found.sealed,
        "records": found.records,
        "root": b64encode(found.root).decode(),
        "checkpoints": found.checkpoints,
        "covered": found.covered,
        "problems": [{"record": problem.record, "message": problem.message} for problem in found.problems],
    }


def plain_together(together: Together) -> dict[str, object]:
    """The same of several."""
    return {
        "verified": together.is_verified,
        "records": sum(found.records for found in together.verified),
        "covered": sum(found.covered for found in together.verified),
        "problems": list(together.problems),
        "ledgers": [_plain_of(each) for each in together.ledgers],
    }


def counted(number: int, what: str) -> str:
    """A number with its noun."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def _plain_of(each: Examined) -> dict[str, object]:
    if isinstance(each.found, LedgerFileError):
        return {"ledger": each.name, "verified": False, "error": str(each.found)}
    first, last = (None, None) if each.times is None else map(iso, each.times)
    return {**plain(each.name, each.found), "first": first, "last": last}


def _kind(found: Verification) -> str:
    return "sealed" if found.sealed else "plain"


def _evidence(found: Verification) -> str:
    cannot = "that records were cut off at the end, or that the whole was written anew, cannot be seen"
    if not found.checkpoints:
        return f"no checkpoint was given: {cannot} without one"
    count = counted(found.checkpoints, "checkpoint")
    if found.covered == found.records:
        return f"as {count} said, up to the last record"
    return (
        f"as {count} said, up to record {found.covered}; the {found.records - found.covered} after it are behind no "
        f"checkpoint: {cannot} there"
    )
