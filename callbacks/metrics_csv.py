"""metrics.csv: what a run measured, one row a logged step, exact across kills and resumes."""

from __future__ import annotations

import csv
import io
import os
import time
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

MACHINE_COLUMNS = frozenset(
    {
        "time",
        "memory/peak_gib",
        "memory/rss_gib",
        "throughput/flops_per_second",
        "throughput/mfu",
        "throughput/steps_per_second",
        "throughput/tokens_per_second",
    }
)
"""Columns that tell of the clock and the machine. All others are the same for the same config on the same machine."""

_FIRST_COLUMNS = ("step", "epoch", "time")


class MetricsCSV(Logger):
    """Appends each logged step to ``metrics.csv``; what is logged twice for a step (validation) goes into its row.

    ``step`` is the number of optimizer steps *before* the row's own (Lightning's count, as in TensorBoard); ``time`` is
    in seconds since 1970. New columns may come at any time. Rows are on disk when ``log_metrics`` returns. A row that a
    kill has torn is dropped, and a resumed run drops the rows after its checkpoint and keeps those before.

    Args:
        folder: the run's folder.
    """

    FILE_NAME = "metrics.csv"

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        super().__init__()
        self.folder = Path(folder)
        self._columns: list[str] | None = None
        self._last: dict[str, str] = {}

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return ""

    @property
    def save_dir(self) -> str:
        return str(self.folder)

    @property
    def path(self) -> Path:
        return self.folder / self.FILE_NAME

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run's config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Write the values into the row of ``step``.

        Raises:
            ValueError: the file cannot be written (disk full, ...); the rows so far stay.
        """
        try:
            self._log(metrics, step)
        except OSError as error:
            raise ValueError(f"{self.path}: cannot be written: {error.strerror}; the rows so far were kept") from error

    def _log(self, metrics: Mapping[str, float], step: int | None) -> None:
        self._open()
        if step is None:
            step = int(self._last.get("step", 0))
        row = {"step": str(step), **{name: _text(value) for name, value in metrics.items()}}
        same_step = self._last.get("step") == row["step"]
        if same_step and all(self._last.get(name) == value for name, value in row.items()):
            return
        row = {**self._last, **row} if same_step else {**row, "time": f"{time.time():.3f}"}
        assert self._columns is not None
        new_columns = [name for name in row if name not in self._columns]
        if same_step or new_columns:
            rows = read_rows(self.path)
            self._columns += new_columns
            self._write([*(rows[:-1] if same_step else rows), row])
        else:
            with self.path.open("ab") as file:  # one write a row: torn only if the process dies or the disk is full
                file.write(_line(row.get(name, "") for name in self._columns))
        self._last = row

    @rank_zero_only
    def resume(self, global_step: int) -> None:
        """Cut the rows of step ``global_step`` and later: the run goes on from a checkpoint made before them."""
        self._open()
        rows = read_rows(self.path)
        kept = [row for row in rows if int(row["step"]) < global_step]
        if len(kept) < len(rows):
            self._write(kept)
        self._last = kept[-1] if kept else {}

    @rank_zero_only
    def sync(self) -> None:
        """Force the rows onto the disk; called before a checkpoint, which must not outlive the rows that led to it."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def _open(self) -> None:
        """Read the columns and the last row of a file that is there, and drop a torn line at its end."""
        if self._columns is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._columns = list(_FIRST_COLUMNS)
        rows = read_rows(self.path) if self.path.exists() else []
        if rows:
            self._columns = list(rows[0])
            self._last = {name: value for name, value in rows[-1].items() if value != ""}
        self._write(rows)

    def _write(self, rows: list[dict[str, str]]) -> None:
        """Replace the file by one with these rows, at once."""
        assert self._columns is not None
        temporary = self.path.with_suffix(".csv-partial")
        with temporary.open("wb") as file:
            file.write(_line(self._columns))
            file.writelines(_line(row.get(name, "") for name in self._columns) for row in rows)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)


def read_rows(path: Path) -> list[dict[str, str]]:
    """The complete rows of a metrics.csv, values as text (empty: not measured at that step)."""
    complete = path.read_bytes().rpartition(b"\n")[0]
    return list(csv.DictReader(io.StringIO(complete.decode("utf-8"), newline="")))


def _line(values: Iterable[str]) -> bytes:
    line = io.StringIO(newline="")
    csv.writer(line, lineterminator="\n").writerow(values)
    return line.getvalue().encode("utf-8")


def _text(value: float | int | str) -> str:
    """Digits enough to read the same number back."""
    return repr(value) if isinstance(value, float) else str(value)
