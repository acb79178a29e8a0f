"""From a file of an evaluation set to its rows; what is wrong with it is one line that names the file."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import random
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

DATA_VARIABLE = "LITRECIPES_DATA"
"""As for the data of training: ``data:NAME`` is NAME below the folder that this environment variable names."""

Row = TypeVar("Row")

SUFFIXES = (".jsonl", ".json", ".csv")


def located(path: str) -> Path:
    """The file at ``path``, ``data:`` resolved.

    Raises:
        ValueError: there is none, or it is empty.
    """
    file = Path(path).expanduser()
    if path.startswith("data:"):
        folder = os.environ.get(DATA_VARIABLE)
        if not folder:
            raise ValueError(f"path: {path!r}: the environment variable {DATA_VARIABLE} is not set; set it to a folder")
        file = Path(folder) / path.removeprefix("data:").lstrip("/")
    if not file.is_file():
        beside = [other.name for other in file.parent.iterdir()] if file.parent.is_dir() else []
        raise ValueError(f"path: {path!r}: no such file{nearest(file.name, beside)}")
    if not file.stat().st_size:
        raise ValueError(f"{file}: the file is empty")
    return file


def read_text(file: Path) -> str:
    """What is in a file.

    Raises:
        ValueError: it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file}: not UTF-8: byte 0x{error.object[error.start]:02x} at offset {error.start}"
        ) from error


def read_json(file: Path) -> Any:
    """The value in a .json file.

    Raises:
        ValueError: it is no JSON.
    """
    text = read_text(file)
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{file}: no JSON: {error}") from error


def read_rows(path: str, columns: Collection[str]) -> list[dict[str, Any]]:
    """The rows of a .csv, .jsonl or .json file (a list of objects).

    Args:
        columns: that every row must have.

    Raises:
        ValueError: no file, not one of these, no rows, a row without one of the columns.
    """
    file = located(path)
    if file.suffix not in SUFFIXES:
        raise ValueError(
            f"{file}: format {file.suffix or 'without suffix'!r} is not known; allowed: {', '.join(SUFFIXES)}"
        )
    rows = _csv(file) if file.suffix == ".csv" else _jsonl(file) if file.suffix == ".jsonl" else read_json(file)
    if not isinstance(rows, list):
        raise ValueError(f"{file}: a list of objects is needed")
    if not rows:
        raise ValueError(f"{file}: the file has no rows")
    for number, row in enumerate(rows, 1):
        check_columns(f"{file}:{number}", row, columns)
    return rows


def check_columns(where: str, row: Any, columns: Iterable[str]) -> None:
    """Raise a ValueError for what is no row, and for the first column that a row lacks."""
    if not isinstance(row, dict):
        raise ValueError(f"{where}: an object is needed, not {type(row).__name__}")
    for name in columns:
        if row.get(name) is None:
            found = ", ".join(str(key) for key, value in row.items() if value is not None) or "none"
            raise ValueError(f"{where}: no column {name!r}; there are: {found}{nearest(name, row)}")


def texts(path: str, column: str, limit: int | None = None) -> list[str]:
    """A column of texts; one of objects with a ``text`` (as in RealToxicityPrompts) gives that.

    Raises:
        ValueError: as ``read_rows``; a value that is no text, or an empty one.
    """
    found = []
    for number, row in enumerate(read_rows(path, [column]), 1):
        value = row[column]
        value = value.get("text") if isinstance(value, dict) else value
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{path}:{number}: {column}: {value!r} is not allowed; a text that is not empty is")
        found.append(value)
    return spread(found, limit)


def spread(rows: list[Row], limit: int | None) -> list[Row]:
    """At most ``limit`` rows, the same ones each time: one of each of as many stretches of the file, since sets are
    often sorted by kind."""
    if limit is None or limit >= len(rows):
        return rows
    draw = random.Random(0)  # each at the same place in its stretch could all be of one kind, where kinds take turns
    ends = [number * len(rows) // limit for number in range(limit + 1)]
    return [rows[draw.randrange(start, end)] for start, end in itertools.pairwise(ends)]


def check_choice(key: str, value: str, allowed: Sequence[str]) -> None:
    """Raise a ValueError for a value that is not among those allowed."""
    if value not in allowed:
        raise ValueError(f"{key}: {value!r} is not allowed; allowed: {', '.join(allowed)}{nearest(value, allowed)}")


def check_least(**numbers: tuple[int, int]) -> None:
    """Raise a ValueError for a number (given with the least that is allowed) that is too small."""
    for key, (value, least) in numbers.items():
        if value < least:
            raise ValueError(f"{key}: {value} is not allowed; at least {least} is")


def nearest(word: str, choices: Iterable[str]) -> str:
    """What was perhaps meant, as the end of a message."""
    found = get_close_matches(word, [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def _csv(file: Path) -> list[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)
    text = read_text(file)
    try:
        return list(csv.DictReader(io.StringIO(text, newline=""), strict=True))
    except csv.Error as error:
        raise ValueError(f"{file}: broken CSV: {error}") from error


def _jsonl(file: Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(read_text(file).split("\n"), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"{file}:{number}: no JSON: {error}") from error
    return rows
