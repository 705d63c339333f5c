"""What commands print: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

_PIPED_COLUMNS = 160  # a file or pipe has no edge that tables must be cut at

console = Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else _PIPED_COLUMNS)
messages = Console(stderr=True, highlight=False)


def emit(row: Mapping[str, Any]) -> None:
    """Print one JSON line on stdout, at once, so that a reader of the pipe sees it."""
    print(json.dumps(row, allow_nan=False), flush=True)


def say(text: str) -> None:
    """Print a remark on stderr."""
    messages.print(text, markup=False, soft_wrap=True)


def token_progress() -> Progress:
    """A progress bar of tokens, on stderr, gone when done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=messages, transient=True)


def byte_progress() -> Progress:
    """A progress bar of bytes, on stderr, gone when done."""
    return Progress(TextColumn("{task.description}"), BarColumn(), DownloadColumn(), console=messages, transient=True)


def table(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(header_style="bold")
    made.add_column(columns[0])
    for name in columns[1:]:
        made.add_column(name, justify="right")
    return made


def in_bytes(count: float) -> str:
    """Bytes for a reader: 1.5 GiB."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
