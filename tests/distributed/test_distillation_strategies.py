"""Context distillation (the teacher a copy, or a LoRA's base) under every strategy, on two processes against one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_strategies import LORA, LOSS, STEPS, WEIGHTS, Launches, difference

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

PREPROMPT = {"preprompt": "Say it in a friendly way."}
JOBS: dict[str, dict[str, Any]] = {
    "a copy": {"stage": "distillation", "model": "qwen3", "data": PREPROMPT},
    "LoRA": {"stage": "distillation", "model": "llama", "data": PREPROMPT, "backbone": {"adapter": LORA}},
}
STRATEGIES = ("ddp", "fsdp2", "tp", "fsdp1", "zero2", "zero3", "context")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    launches = Launches(tmp_path_factory.mktemp("distillation"), JOBS)
    launches.rows["distillation"] = launches.rows["sft"]
    found = launches.run([launches.cell("single", job, 1) for job in JOBS])
    return found | launches.run([launches.cell(name, job, 2) for name in STRATEGIES for job in JOBS])


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_train_what_one_does(strategy: str, job: str, results: dict[str, dict[str, Any]]) -> None:
    expected, found = results[f"single-1-{job}"], results[f"{strategy}-2-{job}"]
    if strategy == "context":
        assert found["refused"] == "strategy.context_parallel: not for distillation; set it to 1"
        return
    assert len(found["losses"]) == STEPS
    loss, weights = difference(found, expected)
    assert loss <= LOSS
    assert weights <= WEIGHTS
