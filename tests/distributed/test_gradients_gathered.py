"""What `recipes check gradients` gathers under every strategy is the gradient of one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.check_gradients import ranks_differ
from recipes.gradient_difference import difference
from tests.invariance.gradients import write_rows

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

ROOT = Path(__file__).parents[2]
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "lora_alpha": 8}}
JOBS: dict[str, dict[str, Any]] = {"lora": {"backbone": {"adapter": LORA}}, "tied": {"model": "qwen3"}}
CELLS = {
    2: [(name, job) for name in ("ddp", "fsdp2", "tp", "fsdp1", "zero1", "zero2", "zero3") for job in JOBS],
    4: [("fsdp2-tp", "tied")],
}


def run(folder: Path, cells: list[dict[str, Any]], world: int) -> dict[str, Any]:
    listed = folder / f"cells-{world}.json"
    listed.write_text(json.dumps(cells))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)] if world > 1 else []
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.distributed.gradient_cells", str(listed), str(folder)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {cell["name"]: torch.load(folder / f"{cell['name']}.pt") for cell in cells}


@pytest.fixture(scope="module")
def common(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("gradients")
    return {"rows": str(write_rows(folder, "pretrain", 40)), "cache": str(folder / "cache")}


@pytest.fixture(scope="module")
def reference(common: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cells = [common | job | {"name": name, "strategy": "single", "accumulate": 8} for name, job in JOBS.items()]
    return run(tmp_path_factory.mktemp("one"), cells, 1)


@pytest.mark.parametrize("world", CELLS)
def test_every_strategy(world: int, common: dict[str, Any], reference: dict[str, Any], tmp_path: Path) -> None:
    cells = [common | JOBS[job] | {"name": f"{n}-{job}", "strategy": n} for n, job in CELLS[world]]
    for name, kept in run(tmp_path, cells, world).items():
        expected = reference[name.rpartition("-")[2]]
        assert kept["processes"] == world
        assert ranks_differ(kept) is None, name
        assert kept["losses"] == pytest.approx(expected["losses"], abs=2e-6)
        for actual, wanted in zip(kept["steps"], expected["steps"], strict=True):
            found = difference(actual, wanted)
            assert found.within, f"{name}: {found.whole:.1e}, {found.tensors[:3]}"
            # No tensor escapes the comparison: also LoRA's A has a gradient from the first step on.
            assert found.rounding == 0
            assert len(found.tensors) == len(wanted)
