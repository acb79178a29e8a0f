"""Policy objectives: what makes answers likelier that were better than others, without a critic.

Shape legend: A answers, M their tokens, one after another. ``ratio`` is pi(token) / pi_old(token), where pi_old is the
policy that said it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm_modules.batch import ObjectiveOutput, Term
from llm_modules.objectives.advantages import (
    constant_groups,
    group_advantages,
    group_means,
    leave_one_out,
    rewards_to_go,
    whiten,
)
from llm_modules.rollouts import PolicyBatch, Rollouts

Scale = Literal["group", "batch", "none"]
Aggregate = Literal["answers", "tokens", "constant"]
Ratio = Literal["token", "sequence"]


class PolicyObjective:
    """What an iteration of ``PolicyModule`` learns from its answers.

    An objective of your own is a subclass with ``prepare``, which sees all answers of the iteration and sets
    ``advantages``, and ``terms``, which sees a micro-batch.

    Args:
        kl: weight of the divergence from the reference; 0: there is no reference.
        clip: how far the ratio may fall below 1 before it counts no more (epsilon of arXiv 1707.06347, equation 7).
        clip_high: how far it may rise above 1; None: as ``clip`` (DAPO's clip-higher, arXiv 2503.14476, section 3.1).
    """

    critics: tuple[str, ...] = ()
    """What critics are asked to expect: ``reward``, ``cost``."""

    whole_groups = False
    """Whether the answers to a prompt must be in one micro-batch."""

    least_group = 1
    """Answers to a prompt that it needs at least."""

    def __init__(self, kl: float = 0.0, clip: float = 0.2, clip_high: float | None = None) -> None:
        if not kl >= 0:
            raise ValueError(f"objective.kl: {kl} is not allowed; 0 or more")
        for name, value in (("clip", clip), ("clip_high", clip if clip_high is None else clip_high)):
            if not value > 0:
                raise ValueError(f"objective.{name}: {value} is not allowed; above 0")
        if not clip <= 1:
            raise ValueError(f"objective.clip: {clip} is above 1; a ratio is never below 0")
        self.kl, self.clip, self.clip_high = kl, clip, clip if clip_high is None else clip_high

    @property
    def needs_reference(self) -> bool:
        return self.kl > 0

    @property
    def reads_old_logprobs(self) -> bool:
        """Whether ``prepare`` does."""
        return self.kl > 0

    def prepare(self, rollouts: Rollouts) -> dict[str, float]:
        """Sets ``advantages`` (and ``returns``) of all answers of an iteration; called once for each.

        Returns:
            numbers to log.
        """
        raise NotImplementedError

    def select(self, rollouts: Rollouts) -> Tensor:
        """Numbers of the answers that are learned from, those to a prompt next to one another."""
        return torch.arange(len(rollouts))

    def terms(self, batch: PolicyBatch, logprobs: Tensor, values: Tensor | None) -> dict[str, Term]:
        """Of a micro-batch, ``logprobs`` (M,) and the critics' ``values`` (M, C) with their graphs."""
        raise NotImplementedError

    def __call__(self, batch: PolicyBatch, logprobs: Tensor, values: Tensor | None = None) -> ObjectiveOutput:
        with torch.no_grad():
            assert batch.advantages is not None
            log_ratio = logprobs.detach() - old(batch)
            ratio, better = log_ratio.exp(), batch.advantages
            compared = self.compared(log_ratio, batch).exp()
            clipped = (compared > 1 + self.clip_high) & (better > 0) | (compared < 1 - self.clip) & (better < 0)
            metrics = {
                "clipped": (clipped.double().sum(), "tokens"),
                "kl_old": ((ratio - 1 - log_ratio).double().sum(), "tokens"),  # k3 of schulman's note, from old to new
            }
            if batch.reference_logprobs is not None:
                metrics["kl_reference"] = (k3(logprobs.detach(), batch.reference_logprobs).double().sum(), "tokens")
        return ObjectiveOutput(self.terms(batch, logprobs, values), metrics)

    def compared(self, log_ratio: Tensor, batch: PolicyBatch) -> Tensor:
        """(M,) logarithm of the ratio that is clipped, at each token: here the token's own, ``log_ratio``."""
        return log_ratio

    def state_dict(self) -> dict[str, Any]:
        """What changes from iteration to iteration, for the checkpoint."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As it was saved."""


def old(batch: PolicyBatch) -> Tensor:
    """(M,) log-probabilities of the policy that answered."""
    assert batch.old_logprobs is not None
    return batch.old_logprobs


def k3(logprobs: Tensor, reference: Tensor) -> Tensor:
    """(M,) estimates of KL(policy | reference), each 0 or more: r - log r - 1 of r = reference / policy (Schulman,
    "Approximating KL divergence", 2020; GRPO, arXiv 2402.03300, equation 4)."""
    log_ratio = reference - logprobs
    return log_ratio.exp() - log_ratio - 1


def surrogate(log_ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    """PPO's clipped loss (arXiv 1707.06347, equation 7) of each token, or answer."""
    ratio = log_ratio.exp()
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages)


def by_answer(values: Tensor, batch: PolicyBatch) -> tuple[Tensor, Tensor]:
    """(A,) sums of the tokens' values, and how many these are."""
    assert batch.answer_index is not None
    lengths = torch.bincount(batch.answer_index, minlength=batch.answers).to(values)
    return values.new_zeros(batch.answers).index_add(0, batch.answer_index, values), lengths.clamp(min=1)


class GRPO(PolicyObjective):
    """Group relative policy optimization (arXiv 2402.03300, equation 3) and what was corrected of it.

    Dr. GRPO (arXiv 2503.20783): ``scale: none, aggregate: constant``. DAPO (arXiv 2503.14476): ``clip_high: 0.28,
    aggregate: tokens`` (with ``dynamic_sampling`` of the module). GSPO (arXiv 2507.18071): ``ratio: sequence``, with
    clips of some 1e-4.

    Args:
        kl, clip, clip_high: see ``PolicyObjective``.
        scale: what a group's rewards, less their mean, are divided by: the standard deviation of the ``group`` or of
            the whole ``batch``; ``none``.
        aggregate: the loss is the mean over ``answers`` of the mean over their tokens; over all ``tokens`` alike; or
            the sum over tokens by answers and a ``constant``.
        longest: that constant, in tokens: the most that an answer may have.
        ratio: of each ``token``, or the geometric mean over the answer (``sequence``).
        weighted_kl: multiply the divergence by the ratio, so that it is the new policy's (arXiv 2512.02556).
    """

    least_group = 2

    reads_old_logprobs = False

    def __init__(
        self,
        kl: float = 0.0,
        clip: float = 0.2,
        clip_high: float | None = None,
        scale: Scale = "group",
        aggregate: Aggregate = "answers",
        longest: int | None = None,
        ratio: Ratio = "token",
        weighted_kl: bool = False,
    ) -> None:
        super().__init__(kl, clip, clip_high)
        for name, value, allowed in (
            ("scale", scale, Scale),
            ("aggregate", aggregate, Aggregate),
            ("ratio", ratio, Ratio),
        ):
            if value not in get_args(allowed):
                raise ValueError(f"objective.{name}: {value!r} is not one of {', '.join(get_args(allowed))}")
        if (aggregate == "constant") != (longest is not None):
            raise ValueError("objective.longest: it goes with aggregate: constant, and the other way round")
        if longest is not None and longest < 1:
            raise ValueError(f"objective.longest: {longest} is below 1")
        if weighted_kl and not kl:
            raise ValueError("objective.weighted_kl: True, but kl is 0: there is no divergence; set kl above 0")
        self.scale, self.aggregate, self.longest, self.ratio = scale, aggregate, longest, ratio
        self.weighted_kl = weighted_kl

    def prepare(self, rollouts: Rollouts) -> dict[str, float]:
        by_group = group_advantages(rollouts.reward, rollouts.prompt_of, self.scale)
        rollouts.advantages = by_group.float().repeat_interleave(rollouts.lengths)
        return {}

    def terms(self, batch: PolicyBatch, logprobs: Tensor, values: Tensor | None) -> dict[str, Term]:
        assert batch.advantages is not None
        log_ratio = self.compared(logprobs - old(batch), batch)
        terms = {"loss": self._term(surrogate(log_ratio, batch.advantages, self.clip, self.clip_high), batch)}
        if self.needs_reference:
            assert batch.reference_logprobs is not None
            divergence = k3(logprobs, batch.reference_logprobs)
            divergence = divergence * log_ratio.exp() if self.weighted_kl else divergence
            terms["kl"] = self._term(divergence, batch, self.kl)
        return terms

    def compared(self, log_ratio: Tensor, batch: PolicyBatch) -> Tensor:
        if self.ratio == "token":
            return log_ratio
        sums, lengths = by_answer(log_ratio, batch)
        return (sums / lengths)[batch.answer_index]

    def _term(self, losses: Tensor, batch: PolicyBatch, weight: float = 1.0) -> Term:
        if self.aggregate == "tokens":
            return Term(losses.sum(), "tokens", weight)
        sums, lengths = by_answer(losses, batch)
        if self.longest is not None:
            return Term(sums.sum() / self.longest, "answers", weight)
        return Term((sums / lengths).sum(), "answers", weight)


class RLOO(PolicyObjective):
    """REINFORCE with the other answers to the same prompt as baseline (arXiv 2402.14740): an answer is one
    action; the divergence from the reference is a part of its reward.

    Args:
        kl, clip, clip_high: see ``PolicyObjective``; the clip is of the whole answer's ratio.
        normalize: advantages of mean 0 and variance 1 over the iteration.
    """

    least_group = 2

    def __init__(
        self, kl: float = 0.05, clip: float = 0.2, clip_high: float | None = None, normalize: bool = False
    ) -> None:
        super().__init__(kl, clip, clip_high)
        self.normalize = normalize

    def prepare(self, rollouts: Rollouts) -> dict[str, float]:
        reward = rollouts.reward
        if self.needs_reference:
            reward = reward - self.kl * answer_divergence(rollouts)
        advantages = leave_one_out(reward, rollouts.prompt_of)
        if self.normalize and len(advantages) > 1:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-4)
        rollouts.advantages = advantages.float().repeat_interleave(rollouts.lengths)
        return {}

    def terms(self, batch: PolicyBatch, logprobs: Tensor, values: Tensor | None) -> dict[str, Term]:
        assert batch.advantages is not None
        log_ratio, _ = by_answer(logprobs - old(batch), batch)
        sums, lengths = by_answer(batch.advantages, batch)
        return {"loss": Term(surrogate(log_ratio, sums / lengths, self.clip, self.clip_high).sum(), "answers")}

    def compared(self, log_ratio: Tensor, batch: PolicyBatch) -> Tensor:
        return by_answer(log_ratio, batch)[0][batch.answer_index]


def answer_divergence(rollouts: Rollouts) -> Tensor:
    """(A,) fp64 log pi_old(answer) - log reference(answer)."""
    assert rollouts.old_logprobs is not None
    assert rollouts.reference_logprobs is not None
    difference = (rollouts.old_logprobs - rollouts.reference_logprobs).double()
    return torch.zeros(len(rollouts), dtype=torch.float64).index_add(0, rollouts.answer_of, difference)


class ReinforcePlusPlus(PolicyObjective):
    """REINFORCE++ (arXiv 2501.03262): PPO's clipped loss without a critic, advantages normalized over the iteration.

    Args:
        kl, clip, clip_high: see ``PolicyObjective``.
        baseline: ``none``: a token's advantage is the answer's reward less ``kl`` times the divergence from it to the
            end; ``group``: the reward less its group's mean, and the divergence (k2) is a term of the loss.
    """

    def __init__(
        self,
        kl: float = 0.01,
        clip: float = 0.2,
        clip_high: float | None = None,
        baseline: Literal["none", "group"] = "none",
    ) -> None:
        super().__init__(kl, clip, clip_high)
        if baseline not in ("none", "group"):
            raise ValueError(f"objective.baseline: {baseline!r} is not one of none, group")
        self.baseline = baseline
        self.least_group = 2 if baseline == "group" else 1

    def prepare(self, rollouts: Rollouts) -> dict[str, float]:
        if self.baseline == "group":
            means, _ = group_means(rollouts.reward, rollouts.prompt_of, len(rollouts.prompts))
            advantages = (rollouts.reward - means[rollouts.prompt_of]).repeat_interleave(rollouts.lengths)
        else:
            advantages = rewards_to_go(token_rewards(rollouts, self.kl), rollouts.offsets)
        rollouts.advantages = whiten(advantages).float()
        return {}

    def terms(self, batch: PolicyBatch, logprobs: Tensor, values: Tensor | None) -> dict[str, Term]:
        assert batch.advantages is not None
        losses = surrogate(logprobs - old(batch), batch.advantages, self.clip, self.clip_high)
        terms = {"loss": Term(losses.sum(), "tokens")}
        if self.baseline == "group" and self.needs_reference:
            assert batch.reference_logprobs is not None
            squares = (logprobs - batch.reference_logprobs).square() / 2
            terms["kl"] = Term(squares.sum(), "tokens", self.kl)
        return terms


def token_rewards(rollouts: Rollouts, kl: float, reward: Tensor | None = None) -> Tensor:
    """(T,) fp64: ``-kl`` times the divergence from the reference at each token, and the answer's reward at its last."""
    rewards = torch.zeros(len(rollouts.answer_ids), dtype=torch.float64)
    if kl:
        assert rollouts.old_logprobs is not None
        assert rollouts.reference_logprobs is not None
        rewards -= kl * (rollouts.old_logprobs - rollouts.reference_logprobs).double()
    rewards[rollouts.last] += rollouts.reward if reward is None else reward
    return rewards


class OnlineDPO(PolicyObjective):
    """DPO on the best and the worst of a prompt's own answers (arXiv 2402.04792); prompts whose answers all
    have the same reward are left out.

    Args:
        beta: how strongly the model is held to the reference.
    """

    whole_groups = True

    least_group = 2

    reads_old_logprobs = False

    def __init__(self, beta: float = 0.1) -> None:
        super().__init__()
        if not beta > 0:
            raise ValueError(f"objective.beta: {beta} is not allowed; above 0")
        self.beta = beta

    @property
    def needs_reference(self) -> bool:
        return True

    def prepare(self, rollouts: Rollouts) -> dict[str, float]:
        centred = rollouts.reward - rollouts.reward.mean()
        rollouts.advantages = centred.float().repeat_interleave(rollouts.lengths)
        return {}

    def select(self, rollouts: Rollouts) -> Tensor:
        chosen = []
        same = constant_groups(rollouts.reward, rollouts.prompt_of)
        for prompt in (~same).nonzero().flatten().tolist():
            answers = (rollouts.prompt_of == prompt).nonzero().flatten()
            reward = rollouts.reward[answers]
            chosen += [int(answers[reward.argmax()]), int(answers[reward.argmin()])]
        return torch.tensor(chosen, dtype=torch.int64)

    def compared(self, log_ratio: Tensor, batch: PolicyBatch) -> Tensor:
        return torch.zeros_like(log_ratio)  # nothing is clipped

    def terms(self, batch: PolicyBatch, logprobs: Tensor, values: Tensor | None) -> dict[str, Term]:
        assert batch.reference_logprobs is not None
        differences, _ = by_answer((logprobs - batch.reference_logprobs).double(), batch)
        losses = -logsigmoid(self.beta * (differences[::2] - differences[1::2]))
        return {"loss": Term(losses.sum().float(), "groups")}
