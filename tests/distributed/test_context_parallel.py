"""A row's positions on two ranks give the loss and the gradient of the whole row, in every family of the zoo."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.parity.test_zoo_families import FAMILIES
from tests.ranks import run_program

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("context")
    run_program("tests.distributed.context_cells:main", str(out), folder=out, timeout=300)
    return dict(json.loads((out / "context.json").read_text()))


def test_loss_and_gradient_are_those_of_whole_rows(result: dict[str, Any]) -> None:
    differences = result["differences"]
    assert len(differences) == 2 * len(FAMILIES) + 3
    assert differences.pop("llama, nothing to score") == {"loss": 0.0, "gradient": 0.0, "size": 0.0}
    for case, found in differences.items():
        assert found["size"] > 0.1, case
        assert found["loss"] <= 1e-5, case
        assert found["gradient"] <= 1e-5, case


def test_dropout_differs_between_slices_and_nothing_else_does(result: dict[str, Any]) -> None:
    assert result["dropout"] == {"inside differs": True, "after is equal": True}
