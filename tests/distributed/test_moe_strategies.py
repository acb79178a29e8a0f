"""Mixtures of experts, with their load-balancing loss, under the strategies that spread a model: as in one process."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_strategies import LOSS, STEPS, WEIGHTS, Launches, difference

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

EXPERTS = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "lora_alpha": 8}}
JOBS: dict[str, dict[str, Any]] = {
    "mixtral": {"stage": "pretrain", "model": "mixtral", "config": {"router_aux_loss_coef": 0.3}},
    "olmoe": {"stage": "pretrain", "model": "olmoe", "config": {"router_aux_loss_coef": 0.3}},
    "qwen3_moe": {"stage": "sft", "model": "qwen3_moe", "config": {"router_aux_loss_coef": 0.3}},
    "LoRA on experts": {"stage": "sft", "model": "mixtral", "backbone": {"adapter": EXPERTS}},
}
CELLS = [
    *((name, "mixtral") for name in ("ddp", "fsdp2", "tp", "fsdp1", "zero3")),
    ("tp", "olmoe"),
    *((name, "qwen3_moe") for name in ("fsdp2", "tp")),
    *((name, "LoRA on experts") for name in ("ddp", "fsdp2", "tp", "fsdp1", "zero3")),
]
REFUSED = {("fsdp1", "LoRA on experts"): "strategy: FSDP1 cannot train LoRA on stacked experts"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    launches = Launches(tmp_path_factory.mktemp("moe"), JOBS)
    found: dict[Any, dict[str, Any]] = {}
    for world, names in ((1, [("single", job) for job in JOBS]), (2, CELLS)):
        cells = [launches.cell(name, job, world) for name, job in names]
        done = launches.run(cells)
        found |= {(cell["strategy"], cell["job"]): done[cell["name"]] for cell in cells}
    return found


@pytest.mark.parametrize(("strategy", "job"), CELLS)
def test_two_processes_train_what_one_does(strategy: str, job: str, results: dict[Any, dict[str, Any]]) -> None:
    """A window of two micro-batches; the load-balancing loss depends on their number, and not on that of ranks."""
    result, expected = results[strategy, job], results["single", job]
    if (strategy, job) in REFUSED:
        assert REFUSED[strategy, job] in result["refused"]
        return
    assert len(result["losses"]) == STEPS
    loss, weights = difference(result, expected)
    norm = max(abs(a - b) / b for a, b in zip(result["norms"], expected["norms"], strict=True))
    balance = max(abs(a - b) for a, b in zip(result["balance"], expected["balance"], strict=True))
    print(f"{strategy} {job}: loss {loss:.0e}, weights {weights:.0e}, norm {norm:.0e}, balance {balance:.0e}")
    assert loss <= LOSS
    assert weights <= WEIGHTS
    assert norm <= 1e-5
    assert balance <= LOSS
    assert min(result["balance"]) > 1
