"""What a run's folder tells of the run; read without torch or Lightning."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from callbacks.safety_table import FILE_NAME, Table, read_safety

MOST_POINTS = 1500
"""Rows of a curve that are kept: a screen has no more columns. Extremes and validations stay."""


@dataclass
class RunData:
    """One run.

    Attributes:
        name: what it is called in the report.
        status: finished, running, stopped, failed, or unfinished.
        columns: name -> a value (or None) for each logged step; ``step`` counts the row's own step, ``elapsed`` is in
            seconds of training without the time between a kill and the resume.
        histogram: (low, high, chosen, rejected) of each bin of the held-out answers' scores.
        samples, audit, safety, environment, config: contents of the run's files, empty where there is none.
        problems: files that could not be read, a line each.
    """

    name: str
    status: str
    columns: dict[str, list[float | None]] = field(default_factory=dict)
    histogram: list[tuple[float, ...]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    audit: dict[str, Any] = field(default_factory=dict)
    safety: Table = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    config: str = ""
    problems: list[str] = field(default_factory=list)

    def values(self, name: str) -> list[float]:
        """A column without its gaps."""
        return [value for value in self.columns.get(name, []) if value is not None]

    def last(self, name: str) -> float | None:
        return next(reversed(self.values(name)), None)


def read_run(folder: Path, name: str | None = None, status: str | None = None) -> RunData:
    """Read a run's folder. Only ``metrics.csv`` must be there; a file that cannot be read is named in the report.

    Raises:
        ValueError: there is no such folder, or no metrics in it.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; name a run's folder, such as runs/pretrain/quickstart/0")
    if not (folder / "metrics.csv").is_file():
        raise ValueError(f"{folder}: not a run's folder, or a run that has logged nothing yet (no metrics.csv in it)")
    environment, problems = _json(folder / "environment.json")
    recipe = environment.get("recipe")
    default = f"{recipe} #{folder.name}" if recipe else folder.resolve().name
    run = RunData(name or default, status or ("finished" if (folder / "finished").exists() else "unfinished"))
    run.environment, run.problems = environment, problems
    run.columns = read_columns((folder / "metrics.csv").read_bytes(), run.problems)
    run.audit, audit_problems = _json(folder / "audit.json")
    run.problems += audit_problems
    run.safety = read_safety(folder / FILE_NAME, run.problems)
    run.samples = _samples(folder / "samples.jsonl", run.problems)
    run.histogram = _histogram(folder / "score_histogram.csv", run.problems)
    config = folder / "config.yaml"
    run.config = config.read_text(encoding="utf-8", errors="replace") if config.exists() else ""
    return run


def read_columns(content: bytes, problems: list[str]) -> dict[str, list[float | None]]:
    """The columns of a metrics.csv as numbers, thinned out to what a screen can show."""
    complete = content.rpartition(b"\n")[0].decode("utf-8", errors="replace")
    rows = list(csv.DictReader(io.StringIO(complete, newline="")))
    names = list(rows[0]) if rows else []
    columns = {name: [_number(row.get(name)) for row in rows] for name in names if name}
    bad = sum(1 for row in rows if _number(row.get("step")) is None)
    if bad:
        problems.append(f"metrics.csv: {bad} rows without a step were left out")
    if not rows or "step" not in columns:
        return {}
    columns["step"] = [None if step is None else step + 1 for step in columns["step"]]
    if "time" in columns:
        columns["elapsed"] = _elapsed(columns["time"])
    kept = [index for index in _thin_out(columns) if columns["step"][index] is not None]
    return {name: [values[index] for index in kept] for name, values in columns.items()}


def _number(text: str | None) -> float | None:
    """A finite number, or None: an empty field, or what cannot be drawn."""
    try:
        value = float(text) if text else math.nan
    except (TypeError, ValueError):
        return None
    return value if math.isfinite(value) else None


def _elapsed(times: list[float | None]) -> list[float | None]:
    """Seconds since the first row. A gap far longer than usual is a pause between a kill and the resume."""
    known = [time for time in times if time is not None]
    steps = [after - before for before, after in itertools.pairwise(known)]
    usual = statistics.median(steps) if steps else 0.0
    total, before, result = 0.0, None, []
    for time in times:
        if time is not None and before is not None:
            gap = time - before
            total += gap if 0 <= gap <= max(60.0, 20 * usual) else usual
        before = before if time is None else time
        result.append(None if time is None else total)
    return result


def _thin_out(columns: dict[str, list[float | None]]) -> list[int]:
    """Places of the rows to keep: of each stretch the lowest and highest training loss, and every validation."""
    count = len(columns["step"])
    if count <= MOST_POINTS:
        return list(range(count))
    guide = columns.get("train/loss") or columns["step"]
    stretch = math.ceil(count / (MOST_POINTS // 2))
    kept = {0, count - 1}
    for start in range(0, count, stretch):
        places = [i for i in range(start, min(start + stretch, count)) if guide[i] is not None]
        if places:
            kept |= {min(places, key=lambda i: guide[i] or 0.0), max(places, key=lambda i: guide[i] or 0.0)}
    validations = [i for i in range(count) if any(v[i] is not None for n, v in columns.items() if n.startswith("val/"))]
    every = max(1, math.ceil(len(validations) / MOST_POINTS))
    return sorted(kept | set(validations[::every]))


def _json(path: Path) -> tuple[dict[str, Any], list[str]]:
    if not path.exists():
        return {}, []
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return {}, [f"{path.name}: cannot be read: {error}"]
    return (content, []) if isinstance(content, dict) else ({}, [f"{path.name}: not an object"])


def _histogram(path: Path, problems: list[str]) -> list[tuple[float, ...]]:
    if not path.exists():
        return []
    found = [tuple(map(_number, line.split(","))) for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    whole = [row for row in found if len(row) == 4 and None not in row]
    if len(whole) < len(found):
        problems.append(f"{path.name}: {len(found) - len(whole)} rows that are not four numbers were left out")
    return whole  # type: ignore[return-value]


def _samples(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    rows = []
    complete = path.read_bytes().rpartition(b"\n")[0].decode("utf-8", errors="replace")
    for number, line in enumerate(complete.split("\n"), 1):
        try:
            row = json.loads(line)
            rows.append({"step": int(row["step"]), "row": int(row["row"]), **{k: row[k] for k in ("prompt", "text")}})
        except (ValueError, KeyError, TypeError) as error:
            if line:
                problems.append(f"samples.jsonl, line {number}: cannot be read: {error}")
    return rows


def differing_settings(runs: list[RunData]) -> list[tuple[str, list[str]]]:
    """Config keys whose values differ between the runs: (dotted key, the value in each run)."""
    flat = [_flatten(yaml.safe_load(run.config) if run.config else {}) for run in runs]
    keys = sorted({key for settings in flat for key in settings})
    rows = [(key, [settings.get(key, "—") for settings in flat]) for key in keys]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _flatten(value: Any, key: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        flat: dict[str, str] = {}
        for name, item in value.items():
            flat |= _flatten(item, f"{key}.{name}" if key else str(name))
        return flat
    return {key: json.dumps(value, ensure_ascii=False, default=str)} if key else {}
