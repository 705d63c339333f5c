"""A folder of results: settings and JSON rows, written as they come, so that a killed run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

SETTINGS, ROWS = "settings.json", "rows.jsonl"

Row = Mapping[str, Any]


class Results:
    """Rows so far. Those of a folder are in its `rows.jsonl`, a JSON object a line; without a folder, in memory."""

    def __init__(self, folder: Path | None = None) -> None:
        """Read the rows that a folder holds. ValueError, with the line, for what is no JSON object."""
        self.folder = folder
        self.rows: list[Row] = [] if folder is None else _read_rows(folder / ROWS)

    def append(self, row: Row) -> Row:
        """Keep a row, at once; returns it as it will be read again."""
        line = json.dumps(row, allow_nan=False)
        if self.folder is not None:
            with (self.folder / ROWS).open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        self.rows.append(json.loads(line))
        return self.rows[-1]


@contextmanager
def open_results(folder: Path | None, settings: Mapping[str, Any]) -> Iterator[Results]:
    """The results of a run with these settings, made or resumed; one process at a time may hold them.

    A last line that a killed run left unfinished is dropped. ValueError if the folder holds something else, rows of
    other settings (both are named), or is in use.
    """
    if folder is None:
        yield Results()
        return
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; name a folder for the results")
    kept = folder / SETTINGS
    if not kept.exists() and folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise ValueError(f"{folder} exists and holds no results of hga eval; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(f"{folder} is in use by another run; wait for it, or name another folder") from error
    try:
        _drop_unfinished_line(folder / ROWS)
        if _read_rows(folder / ROWS):
            _check_settings(folder, settings)
        else:
            beside = folder / f".{SETTINGS}"  # with a dot: a run killed here leaves nothing that looks like results
            beside.write_text(json.dumps(settings, indent=1, sort_keys=True), encoding="utf-8")
            os.replace(beside, kept)
        yield Results(folder)
    finally:
        lock.release()


def read_folder(folder: Path) -> list[Row]:
    """The rows of every `.jsonl` file in a folder. ValueError if it holds none, or another file's line is no row."""
    paths = sorted(folder.glob("*.jsonl"))
    if not paths:
        raise ValueError(f"{folder} holds no rows (.jsonl) of hga eval; is it the --out of a run?")
    return [row for path in paths for row in _read_rows(path)]


def _check_settings(folder: Path, settings: Mapping[str, Any]) -> None:
    try:
        before = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{folder / SETTINGS} is not JSON ({error}); name another folder") from error
    if not isinstance(before, dict):
        raise ValueError(f"{folder / SETTINGS} holds {type(before).__name__} instead of an object; name another folder")
    now = json.loads(json.dumps(settings))
    other = [name for name in sorted(set(before) | set(now)) if before.get(name) != now.get(name)]
    if other:
        told = "; ".join(f"{name}: {before.get(name)!r} there, {now.get(name)!r} now" for name in other)
        raise ValueError(f"{folder} holds results of a run with other settings ({told}); name another folder")


def _drop_unfinished_line(path: Path) -> None:
    if path.exists():
        with path.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    rows: list[Row] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number}: not JSON ({error}); delete the line, and it is made again"
            ) from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: {type(row).__name__} instead of an object; delete the line")
        rows.append(row)
    return rows
