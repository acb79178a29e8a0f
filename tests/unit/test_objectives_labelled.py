"""KTO and BCO: values worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from llm_modules.batch import LabelledScores
from llm_modules.objectives import BCO, KTO


def sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def scores() -> LabelledScores:
    """Log-ratios 2, -1, 0.5; the second answer is undesirable."""
    logprobs = torch.tensor([-10.0, -7.0, -3.5], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-12.0, -6.0, -4.0], dtype=torch.float64)
    tokens = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    return LabelledScores(logprobs, reference, tokens, torch.tensor([True, False, True]))


def test_kto_by_hand() -> None:
    objective = KTO(beta=0.5, desirable_weight=1.5, undesirable_weight=0.7)
    point = objective.point(torch.tensor(0.8, dtype=torch.float64))
    given = scores()
    found = objective(given, point)
    # Rewards 1, -0.5, 0.25; the point is 0.4.
    expected = 1.5 * (1 - sigmoid(0.6)) + 0.7 * (1 - sigmoid(0.9)) + 1.5 * (1 - sigmoid(-0.15))
    assert float(found.terms["loss"].sum) == pytest.approx(expected, abs=1e-12)
    assert found.terms["loss"].count == "answers"
    found.terms["loss"].sum.backward()
    slopes = [-1.5 * 0.5 * sigmoid(0.6) * sigmoid(-0.6), 0.7 * 0.5 * sigmoid(0.9) * sigmoid(-0.9)]
    assert given.logprobs.grad is not None
    assert given.logprobs.grad[:2].tolist() == pytest.approx(slopes, abs=1e-12)
    measured = {name: (float(value), count) for name, (value, count) in found.metrics.items()}
    assert measured["reward_desirable"] == (1.25, "desirable")
    assert measured["reward_undesirable"] == (-0.5, "undesirable")
    assert measured["reward_accuracy"] == (2.0, "answers")
    assert measured["kl"] == (1.5, "tokens")
    assert measured["reward_point"] == (pytest.approx(1.2), "answers")


def test_ktos_point_is_never_below_zero() -> None:
    assert float(KTO().point(torch.tensor(-3.0))) == 0.0


def test_bco_by_hand() -> None:
    objective = BCO(beta=0.5, undesirable_weight=2.0, decay=0.8)
    first = objective(scores(), objective.point())
    expected = -math.log(sigmoid(1.0)) - 2 * math.log(sigmoid(0.5)) - math.log(sigmoid(0.25))
    assert float(first.terms["loss"].sum) == pytest.approx(expected, abs=1e-12)
    objective.follow(torch.tensor([1.25, -0.5, 2.0, 1.0]))
    # Running means 0.2 * 0.625 and 0.2 * -0.5, and their half sum.
    assert objective.state() == pytest.approx([0.125, -0.1])
    assert objective.point() == pytest.approx(0.0125)
    objective.follow(torch.tensor([3.0, 0.0, 3.0, 0.0]))  # none of the undesirable
    assert objective.state() == pytest.approx([0.8 * 0.125 + 0.2, -0.1])
    found = objective(scores(), objective.point())
    delta = (0.3 - 0.1) / 2
    expected = -math.log(sigmoid(1 - delta)) - 2 * math.log(sigmoid(delta + 0.5)) - math.log(sigmoid(0.25 - delta))
    assert float(found.terms["loss"].sum) == pytest.approx(expected, abs=1e-12)
    other = BCO()
    other.load_state(objective.state())
    assert other.point() == objective.point()


@pytest.mark.parametrize(
    ("weights", "counts", "said"),
    [
        ((1.0, 1.0), (100, 100), None),
        ((1.0, 1.0), (133, 100), None),
        ((4.0, 1.0), (25, 75), None),
        (
            (1.0, 1.0),
            (60, 40),
            "60 desirable answers of weight 1 against 40 undesirable ones of weight 1 are 1.50 to 1",
        ),
        ((1.0, 1.0), (1000, 2000), "0.50 to 1; KTO's paper advises 1 to 1.33: desirable_weight from 2.00 to 2.67"),
    ],
)
def test_the_balance_that_ktos_paper_advises(
    weights: tuple[float, float], counts: tuple[int, int], said: str | None
) -> None:
    found = KTO(0.1, *weights).balance(*counts)
    assert found is None if said is None else found is not None and said in found
    assert BCO(0.1, *weights).balance(*counts) is None


@pytest.mark.parametrize("mistake", [{"beta": 0.0}, {"desirable_weight": -1.0}, {"undesirable_weight": -1.0}])
def test_mistakes(mistake: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"objective.{next(iter(mistake))}: "):
        KTO(**mistake)
    with pytest.raises(ValueError, match=r"objective\.decay: 1 is not in"):
        BCO(decay=1)
