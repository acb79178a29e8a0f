"""Mixtures of experts: the same gradient however a window is cut; but for the load-balancing loss, over micro-batches.

The balance of a window is that of its micro-batches, each over all ranks (see ``LoadBalance.micro_batch_dependent``):
packing, padding, checkpointing and the number of ranks change nothing, the number of micro-batches does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_modules.objectives.balance import LoadBalance
from tests.invariance.gradients import run, write_rows
from tests.invariance.test_gradient_invariance import (
    RANKS,
    REFERENCE,
    VARIANTS,
    assert_same_gradient,
    run_on_ranks,
)

MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "num_local_experts": 4,
}  # fmt: skip
COEFFICIENT = 0.02
"""Of the published Mixtral 8x7B."""

CUT = ("4x2", "2x4", "1x8", "packed 1x8")
"""Variants with more than one micro-batch."""

WHOLE = ("packed 8x1", "checkpointed", "checkpointed, packed", "plain loss")


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("moe")
    common = {"stage": "sft", "path": str(write_rows(folder, "sft")), "cache": str(folder / "cache")}
    return common | REFERENCE


def gradient(settings: dict[str, Any], coefficient: float, **variant: Any) -> dict[str, Tensor]:
    model = MIXTRAL | {"router_aux_loss_coef": coefficient}
    return run(settings | {"model": model} | variant)[0].steps[0]


@pytest.fixture(scope="module")
def balanced(settings: dict[str, Any]) -> dict[str, Tensor]:
    return gradient(settings, COEFFICIENT)


@pytest.fixture(scope="module")
def plain(settings: dict[str, Any]) -> dict[str, Tensor]:
    return gradient(settings, 0.0)


@pytest.mark.parametrize("name", ["2x4", "packed 1x8", "checkpointed, packed"])
def test_without_the_loss_no_cut_matters(name: str, settings: dict[str, Any], plain: dict[str, Tensor]) -> None:
    assert_same_gradient(gradient(settings, 0.0, **VARIANTS[name]), plain)


@pytest.mark.parametrize("name", WHOLE)
def test_with_it_layouts_do_not_matter(name: str, settings: dict[str, Any], balanced: dict[str, Tensor]) -> None:
    assert_same_gradient(gradient(settings, COEFFICIENT, **VARIANTS[name]), balanced)


@pytest.mark.parametrize("name", CUT)
def test_micro_batches_matter_as_declared(
    name: str, settings: dict[str, Any], balanced: dict[str, Tensor], plain: dict[str, Tensor]
) -> None:
    """The difference is outside of the bound, of the load-balancing loss alone, and small in the total."""
    assert "micro-batch" in LoadBalance.micro_batch_dependent
    cut = gradient(settings, COEFFICIENT, **VARIANTS[name])
    with pytest.raises(AssertionError):
        assert_same_gradient(cut, balanced)
    total = flat(balanced)
    difference = (flat(cut) - total).norm()
    of_the_loss = difference / (total - flat(plain)).norm()
    print(f"{name}: {difference / total.norm():.1e} of the gradient, {of_the_loss:.1e} of the load-balancing loss's")
    assert difference <= 2e-3 * total.norm()


@pytest.mark.parametrize("name", ["two ranks 4x1", "two ranks packed 2x2"])
def test_ranks_do_not_matter(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    ranks = RANKS[name]
    alone = {**ranks, "devices": 1, "batch_size": 2 * ranks["batch_size"]}
    model = {"model": MIXTRAL | {"router_aux_loss_coef": COEFFICIENT}}
    assert_same_gradient(run_on_ranks(settings | model | ranks, tmp_path), gradient(settings, COEFFICIENT, **alone))


def flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradient[name].flatten() for name in sorted(gradient)])
