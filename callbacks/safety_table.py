"""safety.csv: a row for each step and number, exact over kills and resumes; read without torch or Lightning."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from callbacks.run_files import write_whole
from llm_modules.evaluation.measurement import Measurement

FILE_NAME = "safety.csv"
COLUMNS = ("step", *Measurement._fields)


def as_row(step: int, measurement: Measurement) -> dict[str, str]:
    return dict(zip(COLUMNS, map(str, (step, *measurement)), strict=True))


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a safety.csv; none where there is no file."""
    return list(csv.DictReader(io.StringIO(path.read_text(encoding="utf-8")))) if path.exists() else []


def write_table(path: Path, rows: Sequence[dict[str, str]]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue())


Table = dict[str, dict[int, tuple[float, float, float, int]]]
"""name -> step -> (value, low, high, count)."""


def read_safety(path: Path, problems: list[str]) -> Table:
    """The table of a run; empty where there is none."""
    table: Table = {}
    if not path.exists():
        return table
    complete = path.read_bytes().rpartition(b"\n")[0].decode("utf-8", errors="replace")
    for number, row in enumerate(csv.DictReader(io.StringIO(complete)), 2):
        try:
            value, low, high = (float(row[key]) for key in ("value", "low", "high"))
            table.setdefault(row["name"], {})[int(row["step"])] = (value, low, high, int(row["count"]))
        except (KeyError, TypeError, ValueError):
            problems.append(f"{path.name}, line {number}: cannot be read")
    return table
