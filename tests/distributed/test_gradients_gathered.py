"""What `recipes check gradients` gathers under every strategy is the gradient of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from recipes.check_gradients import ranks_differ
from recipes.gradient_difference import difference
from tests.invariance.gradients import write_rows
from tests.ranks import run_program

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "lora_alpha": 8}}
JOBS: dict[str, dict[str, Any]] = {"lora": {"backbone": {"adapter": LORA}}, "tied": {"model": "qwen3"}}
CELLS = {
    2: [(name, job) for name in ("ddp", "fsdp2", "tp", "fsdp1", "zero1", "zero2", "zero3") for job in JOBS],
    4: [("fsdp2-tp", "tied")],
}


def run(folder: Path, cells: list[dict[str, Any]], world: int) -> dict[str, Any]:
    run_program("tests.distributed.gradient_cells:main", cells, str(folder), folder=folder, ranks=world, timeout=500)
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
