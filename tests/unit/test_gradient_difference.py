"""The comparison of two gradients, by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from recipes.check_gradients import other_cut, ranks_differ
from recipes.gradient_difference import difference

EXPECTED = {"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([[12.0]])}  # norms 5 and 12, the whole 13


def test_the_same() -> None:
    found = difference({k: v.clone() for k, v in EXPECTED.items()}, EXPECTED)
    assert found.whole == 0
    assert found.within


def test_by_hand() -> None:
    found = difference({"a": torch.tensor([3.0, 4.5]), "b": torch.tensor([[12.0]])}, EXPECTED)
    assert found.whole == pytest.approx(0.5 / 13)
    assert found.worst == (pytest.approx(0.5 / 5), "a")
    assert not found.within


def test_a_tensor_may_be_wrong_where_the_whole_is_right() -> None:
    expected = EXPECTED | {"c": torch.tensor([0.01])}
    found = difference(expected | {"c": torch.tensor([0.01001])}, expected)
    assert found.whole < 1e-5
    assert found.worst == (pytest.approx(1e-3, rel=1e-3), "c")
    assert not found.within


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_never_right(value: float) -> None:
    found = difference(EXPECTED | {"b": torch.tensor([[value]])}, EXPECTED)
    assert found.worst[1] == "b"
    assert not found.within


def test_zero_but_for_rounding_counts_in_the_whole_only() -> None:
    expected = EXPECTED | {"c": torch.tensor([1e-7])}
    found = difference(EXPECTED | {"c": torch.tensor([2e-7])}, expected)
    assert (found.rounding, found.within) == (1, True)
    # A gradient that one process does not have is not rounding.
    wrong = difference(EXPECTED | {"c": torch.tensor([0.1])}, EXPECTED | {"c": torch.tensor([0.0])})
    assert wrong.worst == (math.inf, "c")
    assert not wrong.within


def test_other_tensors_and_no_gradient() -> None:
    with pytest.raises(ValueError, match="do not train the same tensors: \\['b'\\]"):
        difference({"a": EXPECTED["a"]}, EXPECTED)
    zeros = {name: torch.zeros_like(value) for name, value in EXPECTED.items()}
    with pytest.raises(ValueError, match="is zero"):
        difference(zeros, zeros)


def kept(apart: dict[str, list[float]], gradients: dict[str, Tensor] = EXPECTED) -> dict[str, list]:
    return {"steps": [gradients], "ranks": [apart]}


def test_a_rank_of_its_own() -> None:
    assert ranks_differ(kept({"a": [0.0, 1e-5], "b": [0.0, 0.0]})) is None
    said = ranks_differ(kept({"a": [0.0, 0.0, 0.5], "b": [0.0, 1e-6, 0.0]}))
    assert said == "rank 2 has another gradient than rank 0: step 1, 1.0e-01 in a"
    assert "rank 1" in str(ranks_differ(kept({"a": [0.0, math.nan], "b": [0.0, 0.0]})))


@pytest.mark.parametrize(("batch", "rows", "other"), [(8, 32, 4), (3, 12, 2), (1, 8, 2), (1, 9, 3), (1, 1, 1)])
def test_another_cut(batch: int, rows: int, other: int) -> None:
    assert other_cut(batch, rows) == other
