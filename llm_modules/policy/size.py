"""What an iteration takes, known before there is an answer: positions of a micro-batch, answers sampled together."""

from __future__ import annotations

from typing import Any


def step_tokens(module: Any, data: Any, parts: int) -> tuple[int, float]:
    """Positions of a micro-batch, each prompt once for its answers, all as long as they may be, and the share of them
    that is trained.

    Args:
        module: a ``PolicyModule``.
        data: its prompts.
        parts: micro-batches of an optimizer step, on all devices.
    """
    answers = module.group_size * module.generator.max_new_tokens
    taken = data.batch_size // module.dynamic_sampling
    prompts = -(-taken // (module.minibatches * parts))
    each = data.longest_prompt + answers
    return prompts * each, answers / each


def answers_together(module: Any, data: Any, devices: int) -> tuple[int, int]:
    """(rows, positions) of the largest cache of keys and values, of answers that are as long as they may be."""
    generator, group = module.generator, module.group_size
    prompts = min(max(1, generator.batch_size // group), -(-data.batch_size // devices))
    return prompts * group, data.longest_prompt + generator.max_new_tokens - 1
