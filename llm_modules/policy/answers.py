"""The answers of an iteration: sampled, rewarded, put together, described."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llm_modules.evaluation.rewards import LARGEST, Answer, Reward
from llm_modules.generation import Generator
from llm_modules.generation.rollout import GroupSampler, Sampled
from llm_modules.generation.vllm_engine import VLLM
from llm_modules.objectives.advantages import constant_groups
from llm_modules.rollouts import PromptBatch, Rollouts
from llm_modules.strategies.together import together

VALIDATION = -1
"""Stands for the number of the iteration in what is sampled for validation."""


@dataclass(frozen=True)
class ScoredAnswer:
    """One answer with what it is worth.

    Attributes:
        sampled: the answer.
        parts: of each reward, then of each cost, without its weight.
        reward, cost: their weighted sums.
    """

    sampled: Sampled
    parts: list[float]
    reward: float
    cost: float


Group = tuple[int, list[ScoredAnswer]]
"""The place of a prompt in its batch, and answers to it."""


class Respondent:
    """Samples answers and has them scored.

    Args:
        generator: how answers are sampled.
        rewards, costs: see ``PolicyModule``.
        seed: together with the iteration and the prompt's place it decides what is sampled.
        engine: what samples them; None: the model itself.
    """

    def __init__(
        self, generator: Generator, rewards: list[Reward], costs: list[Reward], seed: int, engine: VLLM | None = None
    ) -> None:
        for reward in (*rewards, *costs):
            if not {"name", "weight"} <= vars(reward).keys():
                kind = f"{type(reward).__module__}.{type(reward).__qualname__}"
                raise ValueError(f"reward {kind}: its __init__ must call super().__init__(weight, name), and does not")
        self.generator, self.rewards, self.costs, self.seed = generator, rewards, costs, seed
        self.engine = engine

    @property
    def names(self) -> list[str]:
        """Of what a ``ScoredAnswer`` has parts of."""
        return [reward.name for reward in (*self.rewards, *self.costs)]

    def answer(
        self, model: Any, tokenizer: Any, batch: PromptBatch, places: Sequence[int], size: int, iteration: int
    ) -> list[Group]:
        """``size`` answers to each of some prompts of the batch."""
        seed = int(np.random.SeedSequence([self.seed, iteration + 1]).generate_state(1)[0])
        # Validation is dealt in another way, and the same prompts are to get the same answers each time.
        numbers = [batch.rows[place] if iteration == VALIDATION else place for place in places]
        rows = [[number * size + answer for answer in range(size)] for number in numbers]
        settings, prompts = replace(self.generator, seed=seed), [batch.prompts[place].tolist() for place in places]
        if self.engine is not None:
            groups = self.engine.sample(settings, model, tokenizer, prompts, rows)
        else:
            with GroupSampler(settings, model, tokenizer) as sampler:
                groups = sampler.sample(prompts, rows)
        return self._scored(batch, places, groups)

    def _scored(self, batch: PromptBatch, places: Sequence[int], groups: list[list[Sampled]]) -> list[Group]:
        flat = [(place, answer) for place, group in zip(places, groups, strict=True) for answer in group]
        answers = [
            Answer(
                row=batch.rows[place],
                text=answer.text,
                tokens=len(answer.token_ids),
                finished=answer.finished,
                **batch.records[place],
            )
            for place, answer in flat
        ]
        rewards, costs = ([(kind.weight, kind(answers)) for kind in kinds] for kinds in (self.rewards, self.costs))
        found: dict[int, list[ScoredAnswer]] = {place: [] for place in places}
        for number, (place, answer) in enumerate(flat):
            reward, cost = (sum(weight * scores[number] for weight, scores in part) for part in (rewards, costs))
            if not max(abs(reward), abs(cost)) <= LARGEST:
                raise ValueError(
                    f"model.rewards: {answers[number].place}: what an answer is worth adds up to {reward:g} (costs: "
                    f"{cost:g}), which is not finite in fp32; set smaller weights"
                )
            parts = [scores[number] for _, scores in (*rewards, *costs)]
            found[place].append(ScoredAnswer(answer, parts, reward, cost))
        return list(found.items())

    def roll_out(
        self,
        ask: Callable[[Sequence[int]], list[Group]],
        batch: PromptBatch,
        dealt: tuple[int, int],
        factor: int,
    ) -> tuple[Rollouts, Rollouts]:
        """The answers of an iteration, the same on every rank: those that are learned from, and all.

        Args:
            ask: answers to the prompts at some places.
            dealt: (ranks, this one's number), between which prompts are dealt.
            factor: as of ``dynamic_sampling`` of ``PolicyModule``.

        Raises:
            ValueError: of none of the prompts the rewards differ, though that was asked for.
        """
        ranks, rank = dealt
        taken, asked = len(batch.prompts) // factor, 0
        given: list[Group] = []
        kept: list[Group] = []
        while asked < len(batch.prompts) and len(kept) < taken:
            places = range(asked, min(asked + taken, len(batch.prompts)))
            mine = places[rank::ranks]
            groups = sorted((g for part in together(partial(ask, mine)) for g in part), key=lambda g: g[0])
            given += groups
            kept += [g for g in groups if factor == 1 or len({answer.reward for answer in g[1]}) > 1]
            asked = places.stop
        if not kept:
            raise ValueError(
                f"model.dynamic_sampling: to none of {asked} prompts did two answers have different rewards; set it to "
                "1, or give prompts that are sometimes answered well"
            )
        learned = _rollouts(batch, kept[:taken], bool(self.costs))
        return learned, learned if factor == 1 else _rollouts(batch, given, bool(self.costs))

    def describe(self, rollouts: Rollouts, iteration: int, kept: int, compares: bool) -> dict[str, float]:
        """Numbers to log; what hinders learning is said.

        Args:
            rollouts: all answers, also those that are not learned from.
            kept: prompts whose answers are learned from.
            compares: whether nothing can be learned where all answers to a prompt have the same reward.
        """
        same = float(constant_groups(rollouts.reward, rollouts.prompt_of).double().mean())
        facts = {name: float(rollouts.rewards[:, number].mean()) for number, name in enumerate(self.names)}
        facts |= {
            "reward": float(rollouts.reward.mean()),
            "reward_std": float(rollouts.reward.std()) if len(rollouts) > 1 else 0.0,
            "tokens": float(rollouts.lengths.double().mean()),
            "finished": float(rollouts.finished.double().mean()),
            "constant_groups": same,
            "prompts": float(len(rollouts.prompts)),
            "kept": float(kept),
            "entropy": float(-rollouts.sampled_logprobs.double().mean()),
        }
        if rollouts.cost is not None:
            facts["cost"] = float(rollouts.cost.mean())
        if same == 1 and compares:
            warnings.warn(
                f"iteration {iteration}: to no prompt did two answers have different rewards: there is nothing to "
                "learn from",
                stacklevel=2,
            )
        if facts["finished"] == 0:
            warnings.warn(f"iteration {iteration}: no answer ended within model.generator.max_new_tokens", stacklevel=2)
        return {f"rollout/{name}": value for name, value in facts.items()}

    def measure(self, groups: list[Group]) -> dict[str, float]:
        """Sums over the first answers to prompts, for validation."""
        answers = [group[0] for _, group in groups]
        found = {name: [answer.parts[number] for answer in answers] for number, name in enumerate(self.names)}
        found |= {
            "reward": [answer.reward for answer in answers],
            "tokens": [float(len(answer.sampled.token_ids)) for answer in answers],
            "finished": [float(answer.sampled.finished) for answer in answers],
        }
        if self.costs:
            found["cost"] = [answer.cost for answer in answers]
        return {name: sum(values) for name, values in found.items()}


def _rollouts(batch: PromptBatch, groups: list[Group], costs: bool) -> Rollouts:
    answers = [answer for _, group in groups for answer in group]
    lengths = torch.tensor([len(answer.sampled.token_ids) for answer in answers])
    sizes = torch.tensor([len(group) for _, group in groups])

    def column(values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64)

    return Rollouts(
        prompts=[batch.prompts[place] for place, _ in groups],
        rows=torch.tensor([batch.rows[place] for place, _ in groups]),
        prompt_of=torch.repeat_interleave(torch.arange(len(groups)), sizes),
        answer_ids=torch.tensor([token for answer in answers for token in answer.sampled.token_ids]),
        offsets=torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]),
        finished=torch.tensor([answer.sampled.finished for answer in answers]),
        rewards=column([answer.parts for answer in answers]),
        reward=column([answer.reward for answer in answers]),
        cost=column([answer.cost for answer in answers]) if costs else None,
        sampled_logprobs=column([value for answer in answers for value in answer.sampled.logprobs]).float(),
    )
