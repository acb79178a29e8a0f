"""SIGTERM where nothing is to be saved: all processes end, at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.distributed.test_resume import LAYOUTS, ROOT, write_recipe


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_wait_for_one_another(tmp_path: Path, rank: int) -> None:
    write_recipe(tmp_path, LAYOUTS["padded, 0 workers, two ranks"])
    pause = {"class_path": "tests.distributed.pause.PauseInValidation"}
    pause["init_args"] = {"seconds": 100.0, "folder": str(tmp_path)}
    (tmp_path / "pause.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [pause]}}))
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes", "validate", "-c", "recipe.yaml", "-c", "pause.yaml"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    files = [tmp_path / f"rank{number}.pid" for number in (0, 1)]
    try:
        end = time.monotonic() + 120
        while not all(file.exists() and file.read_text() for file in files):
            assert process.poll() is None, process.communicate()[1][-3000:]
            assert time.monotonic() < end
            time.sleep(0.1)
        os.kill(int(files[rank].read_text()), signal.SIGTERM)
        began = time.monotonic()
        process.communicate(timeout=60)
        assert time.monotonic() - began < 60
        assert process.returncode != 0
        if rank == 0:
            assert process.returncode == -signal.SIGTERM
        while Path(f"/proc/{files[1].read_text()}").exists():
            assert time.monotonic() - began < 60
            time.sleep(0.1)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
