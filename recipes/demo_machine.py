"""What the demo makes of the machine it runs on: the precision, and how many steps it has time for."""

from __future__ import annotations

import time
from dataclasses import dataclass

PRETRAIN_STEPS, SFT_STEPS = 400, 160
"""Of the recipes: what is done where the machine is fast enough."""

FEWEST = 0.5
"""With less than this share of the steps the numbers that are promised would be at risk."""

PRETRAIN_FLOPS, SFT_FLOPS = 65e9, 40e9
"""Of one optimizer step."""

BUDGET_SECONDS = 200.0
"""For the steps of both runs, so that the whole stays within its minutes."""

EFFICIENCY = 0.5
"""Share of the speed of one large matrix product that training reaches here (measured)."""


@dataclass
class Steps:
    """Steps of the two runs (None: the recipe's own) and why."""

    pretrain: int | None
    sft: int | None
    reason: str


def choose_precision() -> str:
    """bf16-mixed on a GPU and on processors that multiply in bfloat16; 32-true elsewhere, where it would be slower."""
    import torch

    if torch.cuda.is_available():
        return "bf16-mixed"
    native = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    return "bf16-mixed" if native else "32-true"


def choose_steps(precision: str) -> Steps:
    """The recipes' steps, or fewer where this machine would need longer for them than there is time."""
    import torch

    if torch.cuda.is_available():
        return Steps(None, None, "all steps")
    speed = matrix_speed(torch.bfloat16 if precision.startswith("bf16") else torch.float32)
    seconds = (PRETRAIN_STEPS * PRETRAIN_FLOPS + SFT_STEPS * SFT_FLOPS) / (speed * EFFICIENCY)
    share = min(1.0, max(FEWEST, BUDGET_SECONDS / seconds))
    reason = f"{speed / 1e9:,.0f} GFLOP/s"
    if share == 1.0:
        return Steps(None, None, f"{reason}, so all steps")
    return Steps(
        _even(PRETRAIN_STEPS * share), _even(SFT_STEPS * share), f"{reason}, so {share:.0%} of the steps, to save time"
    )


def _even(steps: float) -> int:
    return max(2, round(steps / 2) * 2)


def matrix_speed(dtype: object, seconds: float = 0.4) -> float:
    """FLOP/s of a matrix product of the model's size: the best of several, so that other work disturbs it less."""
    import torch

    left, right = torch.ones(2048, 256, dtype=dtype), torch.ones(256, 768, dtype=dtype)  # type: ignore[call-overload]
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        began = time.perf_counter()
        for _ in range(8):
            left @ right
        best = min(best, (time.perf_counter() - began) / 8)
    return 2 * 2048 * 256 * 768 / best


def describe_machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
