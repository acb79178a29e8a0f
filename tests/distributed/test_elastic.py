"""torchrun restarts what was killed, and the run goes on exactly: `recipes launch torchrun`, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed.test_resume import LAYOUTS, ROOT, metrics, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEPS = 10  # two epochs
LAYOUT = LAYOUTS["packed, 2 workers, two ranks"]


def launch(folder: Path, *words: str) -> subprocess.Popen[str]:
    arguments = ["launch", "torchrun", "-c", "recipe.yaml", "--devices", "2", "--preflight", "180", *words]
    return subprocess.Popen(
        [sys.executable, "-m", "recipes", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_recipe(folder, LAYOUT)
    process = launch(folder)
    _, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    assert "cluster: 2 processes" in err
    rows = metrics(folder)
    assert len([row for row in rows if row.get("train/loss")]) == STEPS
    return rows


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_is_killed(undisturbed: list[dict[str, str]], tmp_path: Path, rank: int) -> None:
    write_recipe(tmp_path, LAYOUT)
    pause = {"class_path": "tests.distributed.pause.Pause", "init_args": {"seconds": 0.5, "folder": str(tmp_path)}}
    (tmp_path / "pause.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [pause]}}))
    process = launch(tmp_path, "-c", "pause.yaml")
    try:
        end = time.monotonic() + 300
        while not list(tmp_path.glob("runs/recipe/0/checkpoints/step-*.ckpt")):
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < end
            time.sleep(0.1)
        victim = int((tmp_path / f"rank{rank}.pid").read_text())
        os.kill(victim, signal.SIGKILL)
        _, err = process.communicate(timeout=400)
    finally:
        process.terminate()
    assert process.returncode == 0, err[-3000:]
    assert int((tmp_path / f"rank{rank}.pid").read_text()) != victim
    assert err.count("continuing runs/recipe/0 from step-") == 1, err[-3000:]  # the first restart succeeds
    assert metrics(tmp_path) == undisturbed
