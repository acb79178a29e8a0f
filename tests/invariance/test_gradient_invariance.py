"""The same data gives the same gradient, whatever the micro-batch, packing, checkpointing, head or number of ranks.

Bounds of the design: 1e-5 over the whole gradient, 1e-4 for each parameter tensor, relative, in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.invariance.gradients import run, write_rows
from tests.ranks import run_program

REFERENCE = {"batch_size": 8, "accumulate": 1, "packing": "none"}
VARIANTS: dict[str, dict[str, Any]] = {
    "4x2": {"batch_size": 4, "accumulate": 2},
    "2x4": {"batch_size": 2, "accumulate": 4},
    "1x8": {"batch_size": 1, "accumulate": 8},
    "packed 8x1": {"packing": "batch"},
    "packed 4x2": {"packing": "batch", "batch_size": 4, "accumulate": 2},
    "packed 1x8": {"packing": "batch", "batch_size": 1, "accumulate": 8},
    "checkpointed": {"activation_checkpointing": True},
    "checkpointed, packed": {"activation_checkpointing": True, "packing": "batch"},
    "plain loss": {"head": "plain"},
    "plain loss, packed 2x4": {"head": "plain", "packing": "batch", "batch_size": 2, "accumulate": 4},
}
RANKS: dict[str, dict[str, Any]] = {
    "two ranks 4x1": {"devices": 2, "batch_size": 4, "accumulate": 1},
    "two ranks 1x4": {"devices": 2, "batch_size": 1, "accumulate": 4},
    "two ranks packed 2x2": {"devices": 2, "batch_size": 2, "accumulate": 2, "packing": "batch"},
}


def assert_same_gradient(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        error = ((actual[name] - want).norm() / want.norm()).item()
        assert error <= 1e-4, f"{name}: {error:.1e}"
    whole = torch.cat([(actual[name] - expected[name]).flatten() for name in expected]).norm()
    total = torch.cat([want.flatten() for want in expected.values()]).norm()
    assert (whole / total).item() <= 1e-5


@pytest.fixture(scope="module", params=["pretrain", "sft"])
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    path = write_rows(folder, request.param)
    settings = {"stage": request.param, "path": str(path), "cache": str(folder / "cache")}
    return settings | {"reference": run(settings | REFERENCE)[0].steps[0]}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_process(stage: dict[str, Any], name: str) -> None:
    assert_same_gradient(run(stage | REFERENCE | VARIANTS[name])[0].steps[0], stage["reference"])


@pytest.mark.parametrize("objective", [{"label_smoothing": 0.1}, {"z_loss": 1e-2}])
def test_other_terms(stage: dict[str, Any], objective: dict[str, float]) -> None:
    settings = stage | REFERENCE | {"objective": objective}
    expected = run(settings)[0].steps[0]
    actual = run(settings | {"packing": "batch", "batch_size": 2, "accumulate": 4})[0].steps[0]
    assert_same_gradient(actual, expected)


@pytest.mark.parametrize("name", RANKS)
def test_two_processes_with_unequal_token_counts(stage: dict[str, Any], name: str, tmp_path: Path) -> None:
    settings = {k: v for k, v in stage.items() if k != "reference"} | REFERENCE | RANKS[name]
    assert_same_gradient(run_on_ranks(settings, tmp_path), stage["reference"])


def run_on_ranks(settings: dict[str, Any], tmp_path: Path) -> dict[str, Tensor]:
    """The gradient of the first step of a run of two ranks."""
    run_program("tests.invariance.gradients:save", settings, str(tmp_path / "out.pt"), folder=tmp_path, timeout=300)
    return torch.load(tmp_path / "out.pt")[0]


def test_the_bound_can_fail(stage: dict[str, Any]) -> None:
    """A mean of micro-batch means, which is what a loss without window counts gives, is far outside of the bounds."""
    import tests.invariance.gradients as gradients

    class MicroBatchMeans(gradients.LanguageModelModule):
        def global_counts(self, batch: Any) -> dict[str, Tensor]:
            return {name: torch.tensor(value) for name, value in batch.counts().items()}

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self._window = self.global_counts(batch)
            return super().training_step(batch, batch_idx) / self.trainer.accumulate_grad_batches

    original = gradients.LanguageModelModule
    gradients.LanguageModelModule = MicroBatchMeans  # type: ignore[misc]
    try:
        naive = run(stage | REFERENCE | {"batch_size": 2, "accumulate": 4})[0].steps[0]
    finally:
        gradients.LanguageModelModule = original  # type: ignore[misc]
    with pytest.raises(AssertionError):
        assert_same_gradient(naive, stage["reference"])
