"""How much better than expected an answer, or each of its tokens, was: advantages of reinforcement learning.

Shape legend: P prompts, A answers (those to a prompt are neighbours), T tokens of all answers, one after another.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

EPSILON = 1e-4
"""Added to a standard deviation of rewards, as GRPO's implementations have it."""


def group_means(values: Tensor, group_of: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """(P,) means of the answers' values by group, and how many these are."""
    counts = torch.bincount(group_of, minlength=groups).to(values)
    return torch.zeros(groups, dtype=values.dtype).index_add(0, group_of, values) / counts.clamp(min=1), counts


def group_advantages(reward: Tensor, group_of: Tensor, scale: Literal["group", "batch", "none"] = "group") -> Tensor:
    """(A,) rewards less their group's mean (GRPO, arXiv 2402.03300, section 4.1.2).

    Args:
        scale: divided by the standard deviation (of n - 1) of the ``group`` or of the whole ``batch``; ``none``: not,
            as it favours questions that are nearly always, or never, answered (Dr. GRPO, arXiv 2503.20783).
    """
    groups = int(group_of.max()) + 1
    means, counts = group_means(reward, group_of, groups)
    centred = reward - means[group_of]
    if scale == "none":
        return centred
    if scale == "batch":
        return centred / (reward.std() + EPSILON) if len(reward) > 1 else centred
    squares = torch.zeros_like(means).index_add(0, group_of, centred.square())
    spread = (squares / (counts - 1).clamp(min=1)).sqrt()
    return centred / (spread[group_of] + EPSILON)


def leave_one_out(reward: Tensor, group_of: Tensor) -> Tensor:
    """(A,) rewards less the mean of the others to the same prompt (RLOO, arXiv 2402.14740); 0 where there
    is no other."""
    means, counts = group_means(reward, group_of, int(group_of.max()) + 1)
    others = (counts - 1).clamp(min=1)[group_of]
    return (reward - means[group_of]) * counts[group_of] / others * (counts[group_of] > 1)


def constant_groups(reward: Tensor, group_of: Tensor) -> Tensor:
    """(P,) bool, whether all rewards of a group are the same: nothing is learned from which of them is better."""
    groups = int(group_of.max()) + 1
    high = torch.full((groups,), -torch.inf, dtype=reward.dtype).scatter_reduce(0, group_of, reward, "amax")
    low = torch.full((groups,), torch.inf, dtype=reward.dtype).scatter_reduce(0, group_of, reward, "amin")
    return high - low <= 1e-8 * high.abs().clamp(min=1)


def whiten(values: Tensor) -> Tensor:
    """Values of mean 0 and variance 1 (over all of them; the mean alone where there is one)."""
    centred = values - values.mean()
    return centred if len(values) < 2 else centred * torch.rsqrt(values.var() + 1e-8)


def rewards_to_go(rewards: Tensor, offsets: Tensor) -> Tensor:
    """(T,) sums of each token's reward and those of its answer's later ones, undiscounted."""
    totals = rewards.cumsum(0)
    ends = totals[offsets[1:] - 1].repeat_interleave(offsets.diff())
    return ends - totals + rewards


def generalized_advantages(
    rewards: Tensor, values: Tensor, offsets: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimation (arXiv 1506.02438, equations 11 and 16), by answer; after its end nothing is
    expected any more.

    Args:
        rewards, values: (T,) what each token brought, and what was expected before it.
        offsets: (A + 1,) where the answers begin.
        gamma: discount of later rewards.
        lam: 0: what the next value says; 1: what came of it.

    Returns:
        (T,) advantages, and (T,) returns: what a critic is to expect.
    """
    lengths = offsets.diff()
    place = torch.arange(len(rewards)) - offsets[:-1].repeat_interleave(lengths)
    rest = lengths.repeat_interleave(lengths) - 1 - place  # tokens after it
    following = torch.where(rest > 0, values.roll(-1), torch.zeros_like(values))
    delta = rewards + gamma * following - values
    advantages = torch.zeros_like(delta)
    # From the last tokens of all answers to the first of the longest.
    order = torch.argsort(rest, stable=True)
    for at in order.split(torch.bincount(rest).tolist()):
        carried = torch.where(rest[at] > 0, advantages[(at + 1).clamp(max=len(delta) - 1)], torch.zeros_like(delta[at]))
        advantages[at] = delta[at] + gamma * lam * carried
    return advantages, advantages + values
