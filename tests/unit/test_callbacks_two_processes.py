"""The callbacks under ddp on two processes that Lightning starts itself."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from callbacks.metrics_csv import MACHINE_COLUMNS, read_rows

SCRIPT = Path(__file__).with_name("callback_runs.py")
TRAINER = {"devices": 2, "strategy": "ddp", "accumulate_grad_batches": 2}

pytestmark = pytest.mark.slow


def start(folder: Path, trainer: dict[str, Any], **options: Any) -> subprocess.Popen[str]:
    options |= {"folder": str(folder), "trainer": TRAINER | trainer}
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MASTER_", "LOCAL_RANK"))}
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), json.dumps(options)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def measured(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in read_rows(folder / "metrics.csv")]


def test_a_signal_to_one_rank_stops_all_and_the_resumed_run_is_exact(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "trainer": {"max_steps": 24, "limit_val_batches": 1, "val_check_interval": 16, "log_every_n_steps": 3},
        "checkpoint": {"every_n_steps": 1000},
        "module": {"length": 48},
    }
    stopping = {"throughput": [], "stop": [], "announce": [0.05]}
    process = start(tmp_path / "run", callbacks=stopping, **options)
    assert process.stdout is not None
    other = next(int(m[1]) for line in process.stdout if (m := re.match(r"rank 1, pid (\d+), step 4", line)))
    os.kill(other, signal.SIGTERM)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, errors
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert 4 <= last["global_step"] <= 7
    # What both ranks have worked since the last logged step: two micro-batches of 8 positions, one of them padding.
    steps = last["global_step"] % 3
    assert last["callbacks"]["Throughput"]["since_log"] == [32 * steps, 28 * steps, steps]
    for folder in (tmp_path / "run", tmp_path / "whole"):
        process = start(folder, callbacks={"throughput": [], "stop": []}, **options)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    assert measured(tmp_path / "run") == measured(tmp_path / "whole")
    assert len(measured(tmp_path / "whole")) == 10  # every third step of 24, and validations after steps 8 and 16
    states = [torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True) for name in ("run", "whole")]
    torch.testing.assert_close(states[0]["state_dict"], states[1]["state_dict"], rtol=0, atol=0)


def test_a_bad_batch_of_another_rank_is_named_by_rank_0(tmp_path: Path) -> None:
    process = start(
        tmp_path, {"max_steps": 9}, callbacks={"guard": []}, module={"length": 40, "poison": 7, "poison_rank": 1}
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "UnstableTraining: rank 1, step 3, micro-batch 1, dataset rows 14, 15: the loss is nan" in errors
