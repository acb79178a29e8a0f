"""Schedules against values worked out by hand."""

from __future__ import annotations

import pytest
import torch

from llm_modules.schedules import RunSchedule, WarmupConstant, WarmupCosine, WarmupLinear, WarmupStableDecay


def rates(schedule: RunSchedule, steps: int) -> list[float]:
    seen = []
    for _ in range(steps):
        seen.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return seen


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)


def bound(schedule: RunSchedule, steps: int) -> RunSchedule:
    schedule.bind(steps)
    return schedule


def test_cosine_by_hand() -> None:
    seen = rates(bound(WarmupCosine(optimizer(), warmup=2, final=0.1), 6), 7)
    # warm-up 1/2, 1; then 0.1 + 0.9 * (1 + cos(pi k / 4)) / 2 for k = 0..4
    assert seen == pytest.approx([1.0, 2.0, 2.0, 1.7363961, 1.1, 0.4636039, 0.2])


def test_linear_and_constant_by_hand() -> None:
    assert rates(bound(WarmupLinear(optimizer(), warmup=0.25, final=0.0), 4), 5) == pytest.approx(
        [2.0, 2.0, 2.0 * 2 / 3, 2.0 / 3, 0.0]
    )
    assert rates(bound(WarmupConstant(optimizer(), warmup=2), 9), 4) == pytest.approx([1.0, 2.0, 2.0, 2.0])


def test_stable_then_decay_by_hand() -> None:
    seen = rates(bound(WarmupStableDecay(optimizer(), warmup=0.0, final=0.0, decay=0.5), 8), 9)
    assert seen == pytest.approx([2.0, 2.0, 2.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0])


def test_resumed_schedule_goes_on_and_may_be_longer() -> None:
    first = bound(WarmupLinear(optimizer(), final=0.0), 4)
    rates(first, 2)
    second = bound(WarmupLinear(optimizer(), final=0.0), 8)
    second.load_state_dict(first.state_dict())
    second.optimizer.step()
    second.step()
    assert second.optimizer.param_groups[0]["lr"] == pytest.approx(2.0 * 5 / 8)


def test_warmup_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match=r"schedule\.warmup: 9 steps are more than the run's 4"):
        WarmupCosine(optimizer(), warmup=9).bind(4)


@pytest.mark.parametrize(("key", "value"), [("warmup", -1), ("final", 1.5)])
def test_values_outside_their_range_are_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"schedule.{key}"):
        WarmupCosine(optimizer(), **{key: value})
