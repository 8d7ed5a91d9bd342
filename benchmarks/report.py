"""What every benchmark prints and writes: a table, a JSON file, and the limits that were not held."""

import argparse
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def parser(description: str | None) -> argparse.ArgumentParser:
    """An argument parser with the options that all benchmarks have."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    made.add_argument("--gate", action="store_true", help="exit with 1 when a figure misses its limit")
    return made


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; the first column is the name of the row."""
    table = Table(title=title, title_justify="left")
    for at, column in enumerate(columns):
        table.add_column(column, justify="left" if at == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = 140  # a log has no width of its own, and a cut table says nothing
    console.print(table)


def finish(options: argparse.Namespace, figures: Mapping[str, Any], missed: Sequence[str]) -> None:
    """Write the JSON, say which limits are missed, and with ``--gate`` exit with 1 for it."""
    if options.json is not None:
        document = {"python": platform.python_version(), "machine": platform.machine(), **figures}
        options.json.write_text(json.dumps(document, indent=1) + "\n")
    for line in missed:
        print(f"misses its limit: {line}")
    if options.gate and missed:
        sys.exit(1)
