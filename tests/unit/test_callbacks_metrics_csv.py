"""metrics.csv: one row a logged step, growing columns, torn lines, resume."""

from __future__ import annotations

import csv
import math
import resource
from pathlib import Path

import pytest
from callback_runs import TinyModule, make_trainer

from callbacks import MetricsCSV, StepCheckpoint
from callbacks.metrics_csv import MACHINE_COLUMNS, read_rows


def rows(folder: Path) -> list[dict[str, str]]:
    """Without the clock, read by Python's own reader."""
    with (folder / "metrics.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in csv.DictReader(file)]


def test_one_row_a_step_and_columns_that_grow(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"train/loss": 0.1, "epoch": 0}, 0)
    assert rows(tmp_path) == [{"step": "0", "epoch": "0", "train/loss": "0.1"}]
    logger.log_metrics({"train/loss": 1 / 3, "epoch": 0}, 9)
    logger.log_metrics({"val/loss": math.inf, "epoch": 0}, 9)
    logger.log_metrics({"train/loss": float("nan"), "epoch": 1}, 19)
    assert rows(tmp_path) == [
        {"step": "0", "epoch": "0", "train/loss": "0.1", "val/loss": ""},
        {"step": "9", "epoch": "0", "train/loss": "0.3333333333333333", "val/loss": "inf"},
        {"step": "19", "epoch": "1", "train/loss": "nan", "val/loss": ""},
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_logging_the_same_values_again_changes_nothing(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1.0}, 3)
    before = (tmp_path / "metrics.csv").read_bytes()
    logger.log_metrics({"a": 1.0}, 3)
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_resume_cuts_later_rows_and_keeps_earlier_ones(tmp_path: Path) -> None:
    first = MetricsCSV(tmp_path)
    for step in range(6):
        first.log_metrics({"a": float(step)}, step)
    second = MetricsCSV(tmp_path)
    second.resume(4)
    second.log_metrics({"b": 0.5}, 3)  # the last kept row is still open: a validation of its step
    second.log_metrics({"a": 7.0}, 4)
    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [
        ("0", "0.0", ""),
        ("1", "1.0", ""),
        ("2", "2.0", ""),
        ("3", "3.0", "0.5"),
        ("4", "7.0", ""),
    ]


def test_a_torn_line_at_the_end_is_dropped_wherever_it_is_torn(tmp_path: Path) -> None:
    whole = MetricsCSV(tmp_path / "whole")
    whole.log_metrics({"a": 1.25, "name, quoted": 2.0}, 0)
    complete = whole.path.read_bytes()
    whole.log_metrics({"a": 1.5, "name, quoted": 3.0}, 1)
    line = whole.path.read_bytes()[len(complete) :]
    for length in range(len(line)):
        folder = tmp_path / str(length)
        folder.mkdir()
        (folder / "metrics.csv").write_bytes(complete + line[:length])
        MetricsCSV(folder).log_metrics({"a": 9.0}, 1)
        assert [(row["step"], row["a"]) for row in rows(folder)] == [("0", "1.25"), ("1", "9.0")]
    (tmp_path / "header").mkdir()
    (tmp_path / "header" / "metrics.csv").write_bytes(b"step,epo")
    MetricsCSV(tmp_path / "header").log_metrics({"a": 9.0}, 1)
    assert [(row["step"], row["a"]) for row in rows(tmp_path / "header")] == [("1", "9.0")]


def test_a_file_that_cannot_grow_is_one_line(tmp_path: Path) -> None:
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1.0}, 0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (logger.path.stat().st_size + 5, hard))
    try:
        with pytest.raises(ValueError, match=r"metrics.csv: cannot be written: File too large; the rows so far"):
            logger.log_metrics({"a": 2.0}, 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [row["a"] for row in read_rows(logger.path)] == ["1.0"]


def test_validation_goes_into_the_row_of_its_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=4, limit_val_batches=2, val_check_interval=2)
    trainer.fit(TinyModule(length=4))
    assert [(row["step"], row["train/loss"] != "", row["val/loss"] != "") for row in rows(tmp_path)] == [
        ("0", True, False),
        ("1", True, True),
        ("2", True, False),
        ("3", True, True),
    ]


def test_the_same_run_gives_the_same_file_clock_aside(tmp_path: Path) -> None:
    for name in ("first", "second"):
        make_trainer(tmp_path / name, max_steps=5, limit_val_batches=2, val_check_interval=2).fit(TinyModule())
    assert rows(tmp_path / "first") == rows(tmp_path / "second")


def test_rows_are_logged_at_the_interval_also_over_a_resume(tmp_path: Path) -> None:
    for name, ends in (("whole", [12]), ("resumed", [5, 8, 12])):
        for end in ends:
            checkpoint = StepCheckpoint(every_n_steps=100, keep_best=0)
            last = tmp_path / name / "checkpoints" / "last.ckpt"
            trainer = make_trainer(tmp_path / name, checkpoint=checkpoint, max_steps=end, log_every_n_steps=3)
            trainer.fit(TinyModule(length=7), ckpt_path=last if last.exists() else None)
    assert [row["step"] for row in rows(tmp_path / "whole")] == ["2", "5", "8", "11"]
    assert rows(tmp_path / "resumed") == rows(tmp_path / "whole")


def test_read_rows_of_a_file_of_a_header_only(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"step,epoch\n")
    assert read_rows(tmp_path / "metrics.csv") == []
