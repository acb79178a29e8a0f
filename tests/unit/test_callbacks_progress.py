"""RecipeProgress: lines in a log file, a bar in a (pseudo) terminal."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest
from callback_runs import TinyModule, make_trainer

from callbacks import RecipeProgress, Throughput
from callbacks.progress import total_steps


def lines(error: str) -> list[str]:
    return [line for line in error.splitlines() if line.startswith(("train ", "validate ", "test "))]


def test_lines_in_a_log_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(
        tmp_path,
        Throughput(peak_flops=1e9),
        RecipeProgress(seconds=1e-6),
        max_steps=6,
        accumulate_grad_batches=2,
        limit_val_batches=2,
        val_check_interval=6,
        enable_progress_bar=True,
    )
    trainer.fit(TinyModule(length=12))
    found = lines(capsys.readouterr().err)
    steps = [line for line in found if line.startswith("train")]
    assert [line.split()[1] for line in steps] == ["1/6", "2/6", "3/6", "3/6", "4/6", "5/6", "6/6", "6/6"]
    number = r"[\d.,e+-]+"
    pattern = (
        rf"train 6/6 \(100%\)  loss {number}  val {number}  {number} tokens/s  MFU {number}%  "
        r"elapsed 0:00:\d\d  ETA 0:00:00"
    )
    assert re.fullmatch(pattern, steps[-1])
    assert sum(line.startswith("validate") for line in found) == 4


def test_a_line_only_now_and_then(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, RecipeProgress(seconds=3600), max_steps=50, enable_progress_bar=True).fit(TinyModule())
    assert [line.split()[1] for line in lines(capsys.readouterr().err)] == ["50/50"]


def test_evaluation_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trainer = make_trainer(tmp_path, RecipeProgress(seconds=1e-6), enable_progress_bar=True, limit_val_batches=3)
    trainer.validate(TinyModule(), verbose=False)
    assert [line.split()[1] for line in lines(capsys.readouterr().err)] == ["1/3", "2/3", "3/3"]


def test_a_bar_in_a_terminal(tmp_path: Path) -> None:
    script = (
        "from callback_runs import *; from callbacks import RecipeProgress; import sys\n"
        f"t = make_trainer({str(tmp_path)!r}, RecipeProgress(), max_steps=30, enable_progress_bar=True)\n"
        "t.fit(TinyModule(length=8))\n"
    )
    main, other = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "COLUMNS": "120"},
        stdin=other,
        stdout=other,
        stderr=other,
    )
    os.close(other)
    shown = b""
    while True:
        try:
            part = os.read(main, 4096)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        shown += part
    assert process.wait(timeout=60) == 0
    text = re.sub(rb"\x1b\[[0-9;?]*[a-zA-Z]", b"", shown).decode()
    assert "━" in text
    assert "30/30" in text
    assert "loss" in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"max_steps": 7}, 7),
        ({"max_epochs": 2}, 6),
        ({"max_epochs": 2, "max_steps": 4}, 4),
        ({"max_epochs": 2, "max_steps": 9}, 6),
    ],
)
def test_the_length_of_a_run(tmp_path: Path, arguments: dict[str, int], expected: int) -> None:
    trainer = make_trainer(tmp_path, accumulate_grad_batches=3, **arguments)
    trainer.fit(TinyModule(length=8))
    assert total_steps(trainer) == expected == trainer.global_step


def test_refuses_no_time_between_lines() -> None:
    with pytest.raises(ValueError, match=r"RecipeProgress.seconds: 0 is not allowed"):
        RecipeProgress(seconds=0)
