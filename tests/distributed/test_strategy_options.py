"""What changes when something is done, or where it is kept, changes no numbers: on two processes against one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed.test_strategies import LOSS, STEPS, WEIGHTS, Launches, difference

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

CELLS: dict[str, tuple[str, dict[str, Any]]] = {
    "prefetch": ("fsdp2-prefetch", {}),
    "prefetch, FSDP1": ("fsdp1-prefetch", {}),
    "every second block": ("fsdp2", {"activation_checkpointing": 2}),
    "selective and offload": ("fsdp2", {"activation_checkpointing": "selective", "activation_offload": True}),
    "selective and offload, ZeRO-3": ("zero3", {"activation_checkpointing": "selective", "activation_offload": True}),
    "compiled": ("fsdp2", {"compile": True}),
    "compiled, ddp": ("ddp", {"compile": True}),
    "refused": ("tp-prefetch", {}),
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    launches = Launches(tmp_path_factory.mktemp("options"))
    reference = launches.cell("single", "next token", 1)
    found = {"single": launches.run([reference])[reference["name"]]}
    cells = [
        launches.cell(strategy, "next token", 2, backbone=backbone) | {"name": name}
        for name, (strategy, backbone) in CELLS.items()
    ]
    return found | launches.run(cells, timeout=580)


@pytest.mark.parametrize("name", [name for name in CELLS if name != "refused"])
def test_the_numbers_are_those_of_one_process(name: str, results: dict[str, dict[str, Any]]) -> None:
    assert len(results[name]["losses"]) == STEPS
    loss, weights = difference(results[name], results["single"])
    assert loss <= LOSS
    assert weights <= WEIGHTS


def test_prefetching_where_nothing_is_gathered_is_refused(results: dict[str, dict[str, Any]]) -> None:
    assert results["refused"]["refused"].startswith("strategy.prefetch: 1, but with tensor_parallel 2 on 2 devices no")
