"""Policy objectives with critics: PPO, and Safe RLHF, which holds a cost under a limit.

Shape legend: A answers, T or M tokens, one after another, C critics.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from llm_modules.batch import Term
from llm_modules.objectives.advantages import generalized_advantages, whiten
from llm_modules.objectives.policy import PolicyObjective, answer_divergence, old, surrogate, token_rewards
from llm_modules.rollouts import PolicyBatch, Rollouts

KL_HORIZON = 10000


class PPO(PolicyObjective):
    """Proximal policy optimization with a critic (arXiv 1707.06347; for language models arXiv 1909.08593, 2203.02155).

    Args:
        kl: weight of the divergence from the reference, which is taken off the reward of each token.
        kl_target: divergence by answer in nats at which ``kl`` is held (arXiv 1909.08593, section 2.2): it changes from
            iteration to iteration; None: it stays.
        kl_horizon: answers after which ``kl`` has changed by a share of the error at most.
        clip, clip_high: see ``PolicyObjective``.
        gamma, lam: of generalized advantage estimation.
        value_clip: how far a value may move from what it was before it counts no more; None: any.
        value_weight: weight of the critics' loss.
        normalize: advantages of mean 0 and variance 1 over the iteration.
        kl_in_loss: the divergence (k3) is a term of the loss instead.
    """

    critics: tuple[str, ...] = ("reward",)

    def __init__(
        self,
        kl: float = 0.05,
        kl_target: float | None = None,
        kl_horizon: int = KL_HORIZON,
        clip: float = 0.2,
        clip_high: float | None = None,
        gamma: float = 1.0,
        lam: float = 0.95,
        value_clip: float | None = 0.2,
        value_weight: float = 0.5,
        normalize: bool = True,
        kl_in_loss: bool = False,
    ) -> None:
        super().__init__(kl, clip, clip_high)
        checks = (
            ("kl_target", kl_target, kl_target is None or (kl_target > 0 and kl > 0), "above 0, with kl above 0"),
            ("kl_horizon", kl_horizon, kl_horizon >= 1, "at least 1"),
            (
                "kl_horizon",
                kl_horizon,
                kl_target is not None or kl_horizon == KL_HORIZON,
                "left out where there is no kl_target, for kl then stays as it is",
            ),
            ("kl_in_loss", kl_in_loss, not kl_in_loss or kl > 0, "left out where kl is 0: there is no divergence"),
            ("gamma", gamma, 0 < gamma <= 1, "above 0 and at most 1"),
            ("lam", lam, 0 <= lam <= 1, "between 0 and 1"),
            ("value_clip", value_clip, value_clip is None or value_clip > 0, "above 0"),
            ("value_weight", value_weight, value_weight > 0, "above 0"),
        )
        for name, value, holds, allowed in checks:
            if not holds:
                raise ValueError(f"objective.{name}: {value} is not allowed; it must be {allowed}")
        self.kl_target, self.kl_horizon, self.gamma, self.lam = kl_target, kl_horizon, gamma, lam
        self.value_clip, self.value_weight, self.normalize = value_clip, value_weight, normalize
        self.kl_in_loss = kl_in_loss

    def prepare(self, rollouts: Rollouts) -> dict[str, float]:
        assert rollouts.values is not None
        kl = 0.0 if self.kl_in_loss else self.kl
        rewards = token_rewards(rollouts, kl)
        advantages, returns = self._estimate(rollouts, rewards, 0)
        rollouts.advantages = self._normalized(advantages)
        rollouts.returns = returns.float()[:, None]
        return self._adapt_kl(rollouts) | self._explained(rollouts)

    def terms(self, batch: PolicyBatch, logprobs: Tensor, values: Tensor | None) -> dict[str, Term]:
        assert batch.advantages is not None
        losses = surrogate(logprobs - old(batch), batch.advantages, self.clip, self.clip_high)
        terms = {"loss": Term(losses.sum(), "tokens")}
        assert values is not None
        assert batch.values is not None
        assert batch.returns is not None
        for number, name in enumerate(self.critics):
            now, before, returns = (part[:, number] for part in (values, batch.values, batch.returns))
            losses = value_losses(now, before, returns, self.value_clip)
            terms[f"value_{name}"] = Term(losses.sum(), "tokens", self.value_weight)
        if self.kl_in_loss and self.needs_reference:
            assert batch.reference_logprobs is not None
            log_ratio = batch.reference_logprobs - logprobs
            terms["kl"] = Term((log_ratio.exp() - log_ratio - 1).sum(), "tokens", self.kl)
        return terms

    def state_dict(self) -> dict[str, Any]:
        return {"kl": self.kl}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.kl = state["kl"] if self.kl_target is not None else self.kl

    def _estimate(self, rollouts: Rollouts, rewards: Tensor, critic: int) -> tuple[Tensor, Tensor]:
        assert rollouts.values is not None
        expected = rollouts.values[:, critic].double()
        return generalized_advantages(rewards, expected, rollouts.offsets, self.gamma, self.lam)

    def _normalized(self, advantages: Tensor) -> Tensor:
        return (whiten(advantages) if self.normalize else advantages).float()

    def _adapt_kl(self, rollouts: Rollouts) -> dict[str, float]:
        """The weight of the next divergence (arXiv 1909.08593, section 2.2): in a loss, of this iteration's already."""
        used = self.kl
        if self.kl_target is not None:
            error = float(answer_divergence(rollouts).mean()) / self.kl_target - 1
            self.kl *= 1 + min(max(error, -0.2), 0.2) * len(rollouts) / self.kl_horizon
        return {"kl_weight": self.kl if self.kl_in_loss else used} if self.needs_reference else {}

    def _explained(self, rollouts: Rollouts) -> dict[str, float]:
        """Share of the returns' variance that each critic knew of."""
        assert rollouts.values is not None
        assert rollouts.returns is not None
        rest = (rollouts.returns - rollouts.values).var(0) / rollouts.returns.var(0).clamp(min=1e-8)
        return {f"explained_{name}": 1 - float(rest[number]) for number, name in enumerate(self.critics)}


def value_losses(values: Tensor, before: Tensor, returns: Tensor, clip: float | None) -> Tensor:
    """(M,) half the squared error; with a clip the larger one of it and of a value that moved no further (as in the
    code of arXiv 1707.06347)."""
    errors = (values - returns).square()
    if clip is not None:
        near = before + (values - before).clamp(-clip, clip)
        errors = torch.maximum(errors, (near - returns).square())
    return errors / 2


class SafePPO(PPO):
    """Safe RLHF (arXiv 2310.12773, section 3.2 and appendix B): the most reward whose mean cost is within a limit. The
    advantage is (A_reward - multiplier * A_cost) / (1 + multiplier), and after each iteration
    log(multiplier) += rate * multiplier * (mean cost - limit).

    Args:
        limit: the mean cost that is allowed.
        multiplier: its first value.
        multiplier_rate: how fast it follows.
        multiplier_max: what it never exceeds.
        kwargs: as of ``PPO``; of the divergence one half is taken off the reward, one half put on the cost.
    """

    critics = ("reward", "cost")

    def __init__(
        self,
        limit: float = 0.0,
        multiplier: float = 1.0,
        multiplier_rate: float = 0.1,
        multiplier_max: float = 100.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not math.isfinite(limit):
            raise ValueError(f"objective.limit: {limit} is not allowed; a finite number")
        if not 0 < multiplier <= multiplier_max:
            raise ValueError(f"objective.multiplier: {multiplier} is not above 0 and at most {multiplier_max}")
        if not multiplier_rate >= 0:
            raise ValueError(f"objective.multiplier_rate: {multiplier_rate} is negative; allowed: 0 or more")
        self.limit, self.multiplier = limit, multiplier
        self.multiplier_rate, self.multiplier_max = multiplier_rate, multiplier_max

    def prepare(self, rollouts: Rollouts) -> dict[str, float]:
        assert rollouts.cost is not None
        half = 0.0 if self.kl_in_loss else self.kl / 2
        better, returns = self._estimate(rollouts, token_rewards(rollouts, half), 0)
        worse, costs = self._estimate(rollouts, token_rewards(rollouts, -half, rollouts.cost), 1)
        used = self.multiplier
        rollouts.advantages = self._normalized((better - used * worse) / (1 + used))
        rollouts.returns = torch.stack([returns, costs], dim=1).float()
        mean = float(rollouts.cost.mean())
        self.multiplier = next_multiplier(used, mean - self.limit, self.multiplier_rate, self.multiplier_max)
        facts = {"multiplier": used, "over_limit": mean - self.limit}
        return facts | self._adapt_kl(rollouts) | self._explained(rollouts)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"multiplier": self.multiplier}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.multiplier = state["multiplier"]


def next_multiplier(multiplier: float, excess: float, rate: float, most: float) -> float:
    """The multiplier after a step on its logarithm (arXiv 2310.12773, appendix B), within (0, most]."""
    step = min(max(rate * multiplier * excess, -50.0), 50.0)
    return min(max(multiplier * math.exp(step), 1e-8), most)
