"""Run the help desk with the middleware and without, drive both alike, and show whose data came back.

python -m examples.helpdesk.demo [--requests N] [--seed N] [--json]

The exit status is 0 when the middleware let nothing through and closed every context that it opened, and the same
application without it leaked: a drive that cannot see a leak proves nothing.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from examples.helpdesk.drive import Tally, drive, plan
from examples.helpdesk.errands import NOBODY, headers_of
from examples.helpdesk.server import ServerFailedError, uvicorn
from examples.helpdesk.store import USERS

SUMMARY = "Run the help desk with the middleware and without, drive both alike, and show whose data came back."
AUDITED = "alice"
NEWEST = 12
SETTLE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Run:
    """One drive: what it saw, how long it took, and what the supervisor's pages said after it, if the app has any."""

    isolation: bool
    tally: Tally
    seconds: float
    contexts: dict[str, int] | None = None
    trail: dict[str, Any] | None = None

    @property
    def passed(self) -> bool:
        """With the middleware: no leak, no failure, nothing left open. Without: the leak was seen."""
        if not self.isolation:
            return bool(self.tally.leaks)
        if self.contexts is None or self.tally.leaks or self.tally.failures:
            return False
        pairs = (("opened", "closed"), ("connections_opened", "connections_closed"))
        return all(0 < self.contexts[opened] == self.contexts[closed] for opened, closed in pairs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return {
            "requests": len(self.tally.outcomes),
            "seconds": round(self.seconds, 2),
            "leaks": len(self.tally.leaks),
            "failures": len(self.tally.failures),
            "shown": self.tally.shown(),
            "contexts": self.contexts,
            "trail": self.trail,
            "passed": self.passed,
        }


async def settled_contexts(client: httpx.AsyncClient) -> dict[str, int]:
    """The supervisor's count, once the contexts of those who hung up are closed too, or after ten seconds."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while True:
        response = await client.get("/supervisor/contexts")
        contexts: dict[str, int] = response.raise_for_status().json()
        if contexts["open"] == 0 or time.monotonic() > deadline:
            return contexts
        await asyncio.sleep(0.05)


async def run(isolation: bool, requests: int, seed: int, console: Console) -> Run:
    """Start a server with or without the middleware, drive it, and read the supervisor's pages."""
    name = "with the middleware" if isolation else "without"
    columns = (TextColumn(f"{name:<20}"), BarColumn(), MofNCompleteColumn(), TextColumn("errands"), TimeElapsedColumn())
    errands = plan(requests, seed)
    with tempfile.TemporaryDirectory(prefix="helpdesk-") as folder:
        environment = {
            "HELPDESK_DATABASE": str(Path(folder, "helpdesk.sqlite")),
            "HELPDESK_ISOLATION": "on" if isolation else "off",
        }
        server, progress = uvicorn("examples.helpdesk.app:app", environment), Progress(*columns, console=console)
        with server as (host, port), progress as bar:
            task = bar.add_task(name, total=len(errands))
            started = time.monotonic()
            tally = await drive(host, port, errands, lambda: bar.advance(task))
            seconds = time.monotonic() - started
            if not isolation:
                return Run(isolation, tally, seconds)
            base, headers = f"http://{host}:{port}", headers_of("supervisor")
            async with httpx.AsyncClient(base_url=base, headers=headers, trust_env=False) as client:
                contexts = await settled_contexts(client)
                trail = (await client.get(f"/supervisor/trail/{AUDITED}")).raise_for_status().json()
            return Run(isolation, tally, seconds, contexts, trail)


def matrix(done: Run) -> Table:
    """Who asked, and whose data came back: anything off the diagonal is a leak."""
    title = "With the middleware" if done.isolation else "The same application without it"
    table = Table(title=f"{title}: whose data came back", title_justify="left")
    table.add_column("who asked")
    for owner in USERS:
        table.add_column(f"{owner}'s", justify="right")
    for heading in ("no data", "leaks"):
        table.add_column(heading, justify="right")
    for asker, owners in done.tally.shown().items():
        cells = [_cell(owners[owner], owner == asker) for owner in USERS]
        leaks = sum(leak.asker == asker for leak in done.tally.leaks)
        table.add_row(asker, *cells, _cell(owners[NOBODY], True), _cell(leaks, False))
    return table


def _cell(count: int, rightful: bool) -> str:
    if not count:
        return "."
    return str(count) if rightful else f"[bold red]{count}[/]"


def trail_table(trail: dict[str, Any]) -> Table:
    """The end of one user's audit trail."""
    events = trail["events"]
    title = f"The audit trail of {AUDITED}: the newest {NEWEST} of {len(events)} records kept"
    table = Table(title=title, title_justify="left")
    for heading in ("at (UTC)", "event", "request", "reason"):
        table.add_column(heading)
    for event in events[-NEWEST:]:
        request = event.get("request_id", "")[-8:]  # enough to tell them apart
        table.add_row(event["at"][11:23], event["event"], request, event.get("reason", ""))
    return table


def show(done: Run, console: Console) -> None:
    """Print what one drive saw."""
    tally = done.tally
    dropped = sum(outcome.status is None for outcome in tally.outcomes)
    console.print()
    console.print(matrix(done))
    console.print(f"{len(tally.outcomes)} requests in {done.seconds:.1f} s; {dropped} of them hung up half-way")
    if tally.leaks:
        by_errand = Counter(leak.errand for leak in tally.leaks).most_common()
        console.print(f"leaks: {', '.join(f'{errand} {count}' for errand, count in by_errand)}", style="red")
    for failure in tally.failures if done.isolation else ():
        story = f"{failure.asker} asked ({failure.errand}) and was answered {failure.status}"
        console.print(f"failed: {story}", style="yellow")
    if done.contexts is not None:
        counts = done.contexts
        console.print(f"contexts: {counts['opened']} opened, {counts['closed']} closed")
        opened, closed = counts["connections_opened"], counts["connections_closed"]
        console.print(f"database connections: {opened} opened, {closed} closed")
    if done.trail is not None:
        console.print()
        console.print(trail_table(done.trail))


def main() -> int:
    """Run both drives; 0 when the proof holds, 1 when it does not, 2 when a server failed."""
    parser = argparse.ArgumentParser(prog="python -m examples.helpdesk.demo", description=SUMMARY)
    parser.add_argument("--requests", type=int, default=400, metavar="N", help="how many requests, about (400)")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="decides who asks for what, and when (1)")
    parser.add_argument("--json", action="store_true", help="print JSON; the tables go to standard error")
    options = parser.parse_args()
    console = Console(stderr=options.json)
    try:
        with_it, without = (asyncio.run(run(on, options.requests, options.seed, console)) for on in (True, False))
    except ServerFailedError as error:
        console.print(str(error), style="bold red", markup=False, highlight=False, soft_wrap=True)
        return 2
    show(with_it, console)
    show(without, console)
    passed = with_it.passed and without.passed
    verdict = "[bold green]passed[/]" if passed else "[bold red]failed[/]"
    leaks = f"{len(with_it.tally.leaks)} leaks with the middleware, {len(without.tally.leaks)} without it"
    console.print(f"\n{verdict}: {leaks}")
    if options.json:
        json.dump({"with": with_it.to_dict(), "without": without.to_dict(), "passed": passed}, sys.stdout, indent=2)
        sys.stdout.write("\n")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
