"""What the demo makes of the machine it runs on: the precision, and how many steps it has time for."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llm_modules import LanguageModelModule

PRETRAIN_STEPS, SFT_STEPS = 400, 160
"""Of the recipes: what is done where the machine is fast enough."""

FEWEST_PRETRAIN, FEWEST_SFT = 0.25, 0.9
"""Shares of the steps. With fewer the numbers that are promised would be at risk: the perplexity has something to
spare (194 after 100 steps, 252 is promised), the answers have not (after 96 steps of fine-tuning 3 of 24 go on)."""

SFT_STEP = 0.9
"""Of a fine-tuning step for each of a pre-training step: as many tokens, the loss on a third of them."""

STEP_FACTOR = 1.4
"""Of a step with its data, clipping and optimizer for its forward and backward passes."""

VALIDATION_STEPS = 60
"""Steps that take as long as the validations of both runs at their end."""

BUDGET_SECONDS = 305.0
"""For both runs with their validations; the rest of the demo takes half a minute (2026-11-26, two cores)."""


@dataclass
class Steps:
    """Steps of the two runs (None: the recipe's own) and why."""

    pretrain: int | None
    sft: int | None
    reason: str


def choose_precision() -> str:
    """bf16-mixed on a GPU and on processors that multiply in bfloat16; 32-true elsewhere, where it would be slower."""
    import torch

    from llm_modules.optimizers import multiplies_bfloat16

    if torch.cuda.is_available():
        return "bf16-mixed"
    return "bf16-mixed" if multiplies_bfloat16() else "32-true"


def choose_steps(step_seconds: float) -> Steps:
    """The recipes' steps, or fewer where this machine would need longer for them than there is time.

    Args:
        step_seconds: of one step of pre-training.
    """
    reason = f"{step_seconds:.2f} s a step"
    affordable = BUDGET_SECONDS / (step_seconds * STEP_FACTOR) - VALIDATION_STEPS
    share = affordable / (PRETRAIN_STEPS + SFT_STEPS * SFT_STEP)
    if share >= 1.0:
        return Steps(None, None, f"{reason}, so all of them")
    sft = _even(SFT_STEPS * max(FEWEST_SFT, share))
    pretrain = _even(max(PRETRAIN_STEPS * FEWEST_PRETRAIN, affordable - sft * SFT_STEP))
    return Steps(pretrain, sft, f"{reason}, so {pretrain} and {sft} of {PRETRAIN_STEPS} and {SFT_STEPS}, to save time")


def _even(steps: float) -> int:
    return max(2, round(steps / 2) * 2)


def step_seconds(module: LanguageModelModule, precision: str, rows: int, tries: int = 4) -> float:
    """How long forward and backward of a step of ``rows`` full rows take: the fastest of some tries."""
    import torch

    from llm_modules.logprobs import next_token_targets

    module.configure_model()
    assert module.model is not None
    length = module.sequence_length
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = module.model.to(device)
    ids = torch.arange(rows * length, device=device).remainder(1000)[None]
    positions = torch.arange(length, device=device).repeat(rows)[None]
    offsets = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=device)
    best = float("inf")
    for _ in range(tries):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision.startswith("bf16")):
            scores = model(ids, positions, next_token_targets(ids, positions), offsets, length, uniform=True)
        scores.logprobs.mean().neg().backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


def describe_machine() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
