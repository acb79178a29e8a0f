"""Advantages, critics, multipliers: values worked out by hand, and direct loops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from llm_modules.objectives import GRPO, PPO, RLOO, OnlineDPO, ReinforcePlusPlus, SafePPO
from llm_modules.objectives.actor_critic import next_multiplier, value_losses
from llm_modules.objectives.advantages import (
    constant_groups,
    generalized_advantages,
    group_advantages,
    leave_one_out,
    rewards_to_go,
    whiten,
)
from llm_modules.objectives.policy import PolicyObjective, k3, surrogate
from llm_modules.rollouts import Rollouts, policy_batch

OF = torch.tensor([0, 0, 0, 1, 1])
REWARD = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0], dtype=torch.float64)


def rollouts(lengths: tuple[int, ...] = (2, 1, 3), groups: tuple[int, ...] = (0, 0, 1), **more: Tensor) -> Rollouts:
    random = torch.Generator().manual_seed(0)
    total, answers = sum(lengths), len(lengths)
    made = Rollouts(
        prompts=[torch.tensor([5, 6, 7]), torch.tensor([8])],
        rows=torch.arange(2),
        prompt_of=torch.tensor(groups),
        answer_ids=torch.arange(total) + 10,
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        finished=torch.ones(answers, dtype=torch.bool),
        rewards=torch.zeros(answers, 1),
        reward=torch.rand(answers, generator=random, dtype=torch.float64),
        sampled_logprobs=-torch.rand(total, generator=random),
        old_logprobs=-torch.rand(total, generator=random),
        reference_logprobs=-torch.rand(total, generator=random),
    )
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_advantages_of_groups() -> None:
    spread = math.sqrt((4 + 1 + 9) / 2)  # about the mean 3, of n - 1
    wanted = [-2 / (spread + 1e-4), -1 / (spread + 1e-4), 3 / (spread + 1e-4), 0.0, 0.0]
    assert group_advantages(REWARD, OF).tolist() == pytest.approx(wanted)
    assert group_advantages(REWARD, OF, "none").tolist() == pytest.approx([-2, -1, 3, 0, 0])
    whole = math.sqrt(sum((r - 3.4) ** 2 for r in (1, 2, 6, 4, 4)) / 4) + 1e-4
    assert group_advantages(REWARD, OF, "batch").tolist() == pytest.approx([v / whole for v in (-2, -1, 3, 0, 0)])
    assert leave_one_out(REWARD, OF).tolist() == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0])
    assert leave_one_out(torch.tensor([3.0]), torch.tensor([0])).tolist() == [0.0]
    assert constant_groups(REWARD, OF).tolist() == [False, True]


def test_sums_to_the_end_and_whitening() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0])
    assert rewards_to_go(rewards, torch.tensor([0, 2, 5])).tolist() == [3, 2, 28, 24, 16]
    white = whiten(rewards.double())
    assert float(white.mean()) == pytest.approx(0, abs=1e-12)
    assert float(white.var()) == pytest.approx(1, abs=1e-6)
    assert whiten(torch.tensor([3.0])).tolist() == [0.0]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (0.99, 1.0), (1.0, 0.0)])
def test_generalized_advantages_are_those_of_a_direct_loop(gamma: float, lam: float) -> None:
    random = torch.Generator().manual_seed(3)
    lengths = [4, 1, 7, 2, 7]
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    rewards, values = (torch.randn(sum(lengths), generator=random, dtype=torch.float64) for _ in range(2))
    advantages, returns = generalized_advantages(rewards, values, offsets, gamma, lam)
    for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        carried = 0.0
        for t in reversed(range(start, stop)):
            following = float(values[t + 1]) if t + 1 < stop else 0.0
            carried = float(rewards[t]) + gamma * following - float(values[t]) + gamma * lam * carried
            assert float(advantages[t]) == pytest.approx(carried)
            assert float(returns[t]) == pytest.approx(carried + float(values[t]))


def test_what_a_ratio_is_clipped_to() -> None:
    log_ratio = torch.tensor([1.5, 0.5, 1.5, 0.5]).log()
    losses = surrogate(log_ratio, torch.tensor([1.0, 1.0, -1.0, -1.0]), 0.2, 0.3)
    # Up while it is good: 1.3 at most; down while it is bad: 0.8 at least; the other ways all counts.
    assert losses.tolist() == pytest.approx([-1.3, -0.5, 1.5, 0.8])
    assert k3(torch.tensor([-1.0]), torch.tensor([-2.0])).tolist() == pytest.approx([math.exp(-1) + 1 - 1])


def test_values_count_no_more_where_they_have_moved_far() -> None:
    values, before, returns = torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]), torch.tensor([2.0, 2.0])
    assert value_losses(values, before, returns, None).tolist() == pytest.approx([0.5, 0.5])
    # 1 is held at 0.2 (error 1.8), 3 too (1.8, more than its own 1).
    assert value_losses(values, before, returns, 0.2).tolist() == pytest.approx([1.62, 1.62])


def test_the_divergence_is_taken_off_the_reward() -> None:
    made = rollouts(values=torch.zeros(6, 1))
    PPO(kl=0.5, lam=1.0, normalize=False).prepare(made)
    assert made.old_logprobs is not None
    assert made.reference_logprobs is not None
    divergence = (made.old_logprobs - made.reference_logprobs).tolist()
    wanted = [
        float(made.reward[0]) - 0.5 * (divergence[0] + divergence[1]),
        float(made.reward[0]) - 0.5 * divergence[1],
        float(made.reward[1]) - 0.5 * divergence[2],
    ]
    assert made.advantages is not None
    assert made.returns is not None
    assert made.advantages[:3].tolist() == pytest.approx(wanted, abs=1e-6)
    assert made.returns[:3, 0].tolist() == pytest.approx(wanted, abs=1e-6)
    ReinforcePlusPlus(kl=0.5).prepare(made)
    assert float(made.advantages.mean()) == pytest.approx(0, abs=1e-6)
    assert float(made.advantages[0] - made.advantages[1]) == pytest.approx(
        -0.5 * divergence[0] * _scale(made), abs=1e-5
    )


def _scale(made: Rollouts) -> float:
    """1 / standard deviation of what was whitened, told by two tokens of the same answer."""
    assert made.old_logprobs is not None
    assert made.reference_logprobs is not None
    divergence = (made.old_logprobs - made.reference_logprobs).double()
    rewards = -0.5 * divergence
    rewards[made.last] += made.reward
    return 1 / math.sqrt(float(rewards_to_go(rewards, made.offsets).var()) + 1e-8)


def test_the_weight_of_the_divergence_follows_its_target() -> None:
    high = rollouts(values=torch.zeros(6, 1), old_logprobs=torch.zeros(6), reference_logprobs=torch.full((6,), -9.0))
    low = rollouts(values=torch.zeros(6, 1), old_logprobs=torch.zeros(6), reference_logprobs=torch.zeros(6))
    objective = PPO(kl=0.1, kl_target=6.0, kl_horizon=30)
    assert objective.prepare(high)["kl_weight"] == 0.1
    assert objective.kl == pytest.approx(0.1 * (1 + 0.2 * 3 / 30))  # the error of 2 is held at 0.2
    before = objective.kl
    objective.prepare(low)
    assert objective.kl == pytest.approx(before * (1 - 0.2 * 3 / 30))
    other = PPO(kl=0.1, kl_target=6.0)
    other.load_state_dict(objective.state_dict())
    assert other.kl == objective.kl


@pytest.mark.parametrize("in_loss", [False, True])
def test_the_logged_weight_of_the_divergence_is_the_one_that_is_used(in_loss: bool) -> None:
    made = rollouts(values=torch.zeros(6, 1))
    objective = PPO(kl=0.1, kl_target=6.0, kl_horizon=30, kl_in_loss=in_loss, lam=1.0, normalize=False)
    logged = objective.prepare(made)["kl_weight"]
    batch = policy_batch(made, torch.arange(3), "packed", 32)
    assert made.old_logprobs is not None
    assert made.reference_logprobs is not None
    assert made.advantages is not None
    terms = objective.terms(batch, made.old_logprobs, torch.zeros(6, 1))
    taken = (made.reward[0] - made.advantages[1]) / (made.old_logprobs - made.reference_logprobs)[1]
    assert logged == pytest.approx(terms["kl"].weight if in_loss else float(taken), rel=1e-5)


def test_the_multiplier_of_safe_rlhf() -> None:
    assert next_multiplier(2.0, 0.5, 0.1, 100.0) == pytest.approx(2 * math.exp(0.1 * 2 * 0.5))
    assert next_multiplier(2.0, -3.0, 0.1, 100.0) == pytest.approx(2 * math.exp(-0.6))
    assert next_multiplier(99.0, 1e9, 1.0, 100.0) == 100.0
    assert next_multiplier(1.0, -1e9, 1.0, 100.0) > 0
    made = rollouts(values=torch.zeros(6, 2), cost=torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64))
    objective = SafePPO(limit=0.25, multiplier=3.0, multiplier_rate=0.1, kl=0.0, lam=1.0, normalize=False)
    facts = objective.prepare(made)
    assert facts["multiplier"] == 3.0
    assert facts["over_limit"] == pytest.approx(0.75)
    assert objective.multiplier == pytest.approx(3 * math.exp(0.1 * 3 * 0.75))
    wanted = [(float(r) - 3 * c) / 4 for r, c in zip(made.reward, (1.0, 0.0, 2.0), strict=True)]
    assert made.advantages is not None
    assert made.advantages[made.last].tolist() == pytest.approx(wanted)
    with_kl = SafePPO(multiplier=3.0, kl=0.4, lam=1.0, normalize=False)
    with_kl.prepare(made)
    assert made.old_logprobs is not None
    assert made.reference_logprobs is not None
    taken = 0.2 * (made.old_logprobs - made.reference_logprobs)[made.last]  # half of kl, off one, onto the other
    wanted = [
        (float(r) - float(d) - 3 * (c + float(d))) / 4
        for r, c, d in zip(made.reward, (1.0, 0.0, 2.0), taken, strict=True)
    ]
    assert made.advantages[made.last].tolist() == pytest.approx(wanted, abs=1e-6)


def test_terms_of_a_batch_by_hand() -> None:
    made = rollouts(values=torch.zeros(6, 1))
    made.advantages = torch.tensor([1.0, 1.0, -2.0, 0.5, 0.5, 0.5])
    batch = policy_batch(made, torch.arange(3), "packed", 32)
    logprobs = made.old_logprobs
    assert logprobs is not None
    by_answers = GRPO().terms(batch, logprobs, None)["loss"]  # the ratio is 1
    assert float(by_answers.sum) == pytest.approx(-(1.0 - 2.0 + 0.5))
    assert by_answers.count == "answers"
    by_tokens = GRPO(aggregate="tokens").terms(batch, logprobs, None)["loss"]
    assert float(by_tokens.sum) == pytest.approx(-(2.0 - 2.0 + 1.5))
    assert by_tokens.count == "tokens"
    constant = GRPO(aggregate="constant", longest=10).terms(batch, logprobs, None)["loss"]
    assert float(constant.sum) == pytest.approx(-(2.0 - 2.0 + 1.5) / 10)
    batch.values, batch.returns = torch.zeros(6, 1), torch.ones(6, 1)
    terms = PPO(kl=0.3, kl_in_loss=True).terms(batch, logprobs, torch.full((6, 1), 0.5))
    assert float(terms["value_reward"].sum) == pytest.approx(6 * max(0.5**2, 0.8**2) / 2)
    assert made.reference_logprobs is not None
    assert float(terms["kl"].sum) == pytest.approx(float(k3(logprobs, made.reference_logprobs).sum()), rel=1e-5)
    grouped = ReinforcePlusPlus(kl=0.3, baseline="group").terms(batch, logprobs, None)["kl"]
    assert float(grouped.sum) == pytest.approx(float(((logprobs - made.reference_logprobs) ** 2).sum()) / 2, rel=1e-5)


CLIPS = [
    (GRPO(), 0.1, 4),  # its tokens alternate between +10 % and -10 %, so that the whole answer's ratio is 1
    (GRPO(clip=0.05), 0.1, 4),
    (GRPO(ratio="sequence", clip=3e-4), 0.1, 4),
    (RLOO(kl=0.0, clip=0.05), 0.1, 4),
    (GRPO(clip=0.2), 0.03, 8),  # each 3 %, the answer 27 %
    (GRPO(ratio="sequence", clip=0.02), 0.03, 8),
    (RLOO(kl=0.0, clip=0.2), 0.03, 8),
    (ReinforcePlusPlus(clip=0.02), 0.03, 8),
]


@pytest.mark.parametrize(("objective", "step", "length"), CLIPS)
def test_clipped_are_the_tokens_without_a_gradient(objective: PolicyObjective, step: float, length: int) -> None:
    made = rollouts(lengths=(length, length), groups=(0, 0))
    made.advantages = torch.tensor([1.0] * length + [-1.0] * length)
    assert made.old_logprobs is not None
    signs = torch.tensor([1.0, -1.0]).repeat(length) if length == 4 else made.advantages
    logprobs = (made.old_logprobs + step * signs).requires_grad_()
    output = objective(policy_batch(made, torch.arange(2), "packed", 32), logprobs)
    output.terms["loss"].sum.backward()
    assert logprobs.grad is not None
    assert float(output.metrics["clipped"][0]) == float((logprobs.grad == 0).sum())


def test_online_dpo_clips_nothing() -> None:
    made = rollouts(lengths=(2, 2), groups=(0, 0), advantages=torch.ones(4))
    assert made.old_logprobs is not None
    output = OnlineDPO()(policy_batch(made, torch.arange(2), "packed", 32), made.old_logprobs + 1)
    assert float(output.metrics["clipped"][0]) == 0


def test_online_dpo_takes_the_best_and_the_worst() -> None:
    made = rollouts(lengths=(2, 1, 3, 2, 2), groups=(0, 0, 0, 1, 1))
    made.reward = torch.tensor([0.5, 1.0, 0.1, 0.7, 0.7])
    assert OnlineDPO().select(made).tolist() == [1, 2]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: GRPO(kl=-1), "objective.kl: -1"),
        (lambda: GRPO(clip=0), "objective.clip: 0"),
        (lambda: GRPO(clip=1.5), "objective.clip: 1.5 is above 1"),
        (lambda: GRPO(scale="all"), "objective.scale: 'all' is not one of group, batch, none"),  # type: ignore[arg-type]
        (lambda: GRPO(aggregate="constant"), "objective.longest: it goes with aggregate: constant"),
        (lambda: RLOO(clip_high=-0.1), "objective.clip_high: -0.1"),
        (lambda: PPO(lam=2.0), "objective.lam: 2.0 is not allowed; it must be between 0 and 1"),
        (lambda: PPO(kl=0, kl_target=3.0), "objective.kl_target: 3.0"),
        (lambda: SafePPO(multiplier=0), "objective.multiplier: 0"),
        (lambda: SafePPO(limit=math.nan), "objective.limit: nan"),
        (lambda: ReinforcePlusPlus(baseline="x"), "objective.baseline: 'x'"),  # type: ignore[arg-type]
        (lambda: OnlineDPO(beta=0), "objective.beta: 0"),
    ],
)
def test_settings_that_cannot_be(make: object, said: str) -> None:
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        make()  # type: ignore[operator]
