"""Objectives of answers that were judged one by one: what makes the desirable ones likelier, and the others less so.

Shape legend: A answers. The reward of an answer is beta * (log p - log p'), where p' is the reference's probability.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm_modules.batch import LabelledScores, ObjectiveOutput, Term
from llm_modules.objectives.shapes import summed


class LabelledObjective:
    """What a step of ``PreferenceModule`` minimizes on labelled answers: sums over the micro-batch's answers, each loss
    a function of how far the reward is on the right side of a point that all rewards are compared with.

    An objective of your own is a subclass with ``losses``, and with a ``point`` unless that is zero.

    Args:
        beta: how strongly the model is held to the reference; the scale of the rewards.
        desirable_weight: weight of the losses of desirable answers.
        undesirable_weight: weight of those of the others.
    """

    needs_reference: bool = True
    needs_mismatched: bool = False
    """Whether the point is made of answers to other prompts."""
    follows: bool = False
    """Whether it has a state that follows the rewards."""

    def __init__(self, beta: float = 0.1, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> None:
        if not beta > 0:
            raise ValueError(f"objective.beta: {beta} is not allowed; above 0")
        for name, weight in (("desirable_weight", desirable_weight), ("undesirable_weight", undesirable_weight)):
            if weight < 0:
                raise ValueError(f"objective.{name}: {weight} is negative; allowed: 0 or more")
        self.beta, self.weights = beta, (desirable_weight, undesirable_weight)

    def losses(self, better: Tensor) -> Tensor:
        """(A,) from (A,) reward minus point, for an undesirable answer the point minus the reward."""
        raise NotImplementedError

    def point(self, mismatched: Tensor | None = None) -> Tensor | float:
        """() what rewards are compared with, a constant of the step.

        Args:
            mismatched: () mean of log p - log p' of answers to other prompts, over the window and all ranks.
        """
        return 0.0

    def balance(self, desirable: int, undesirable: int) -> str | None:
        """What is to be said about the weights for so many answers, if anything."""
        return None

    def follow(self, sums: Tensor) -> None:
        """Takes (4,) the step's rewards, summed over desirable and undesirable answers, and how many they were."""

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return []

    def load_state(self, state: list[float]) -> None:
        """Goes on from a checkpoint."""

    def rewards(self, scores: LabelledScores) -> Tensor:
        """(A,)."""
        return self.beta * (scores.logprobs - scores.reference)

    def __call__(self, scores: LabelledScores, point: Tensor | float) -> ObjectiveOutput:
        desirable, rewards = scores.desirable, self.rewards(scores)
        better = torch.where(desirable, rewards - point, point - rewards)
        good, bad = desirable.double(), (~desirable).double()
        losses = self.losses(better)
        summed(self, losses, len(better), "answers")  # before the weights, which would hide a mean
        losses = (self.weights[0] * good + self.weights[1] * bad) * losses
        detached = rewards.detach()
        metrics = {
            "reward_desirable": (detached @ good, "desirable"),
            "reward_undesirable": (detached @ bad, "undesirable"),
            "logp_desirable": (scores.logprobs.detach() @ good, "desirable"),
            "logp_undesirable": (scores.logprobs.detach() @ bad, "undesirable"),
            "tokens_desirable": (scores.tokens @ good, "desirable"),
            "tokens_undesirable": (scores.tokens @ bad, "undesirable"),
            "kl": ((scores.logprobs - scores.reference).detach().sum(), "tokens"),
            "reward_accuracy": ((better.detach() > 0).double().sum(), "answers"),
            "reward_point": ((torch.zeros_like(detached) + point).sum(), "answers"),
        }
        if scores.entropy is not None:
            metrics["entropy"] = (scores.entropy, "tokens")
        return ObjectiveOutput({"loss": Term(losses.sum(), "answers")}, metrics)


class KTO(LabelledObjective):
    """Kahneman-Tversky optimization (arXiv 2402.01306, section 4): for a desirable answer 1 - sigmoid(reward - beta z),
    for another 1 - sigmoid(beta z - reward), where z is the mean of log p - log p' of answers to other prompts of the
    batch, at least 0. The batch is the whole accumulation window, of all ranks; an answer is compared under the prompt
    that comes after its own.

    Args:
        beta: see ``LabelledObjective``.
        desirable_weight: lambda_D of the paper, which advises lambda_D n_D / (lambda_U n_U) from 1 to 4/3, for so many
            answers of each kind.
        undesirable_weight: lambda_U.
    """

    needs_mismatched = True

    def losses(self, better: Tensor) -> Tensor:
        return 1 - torch.sigmoid(better)

    def point(self, mismatched: Tensor | None = None) -> Tensor | float:
        assert mismatched is not None
        return self.beta * mismatched.clamp(min=0)

    def balance(self, desirable: int, undesirable: int) -> str | None:
        of_desirable, of_undesirable = self.weights[0] * desirable, self.weights[1] * undesirable
        if of_undesirable <= of_desirable * (1 + 1e-9) and of_desirable <= of_undesirable * 4 / 3 * (1 + 1e-9):
            return None
        ratio = of_desirable / of_undesirable if of_undesirable else float("inf")
        wanted = self.weights[1] * undesirable / desirable if desirable else float("nan")
        return (
            f"model.objective: {desirable:,} desirable answers of weight {self.weights[0]:g} against {undesirable:,} "
            f"undesirable ones of weight {self.weights[1]:g} are {ratio:.2f} to 1; KTO's paper advises 1 to 1.33: "
            f"desirable_weight from {wanted:.2f} to {wanted * 4 / 3:.2f}"
        )


class BCO(LabelledObjective):
    """Binary classifier optimization (arXiv 2404.04656): -log sigmoid(reward - delta) for a desirable answer, -log
    sigmoid(delta - reward) for another. The reward shift delta is half the sum of the mean rewards of both kinds, of
    all steps before this one (a running mean, zero at first, as all rewards are), so that it is known before a step.

    Args:
        beta: see ``LabelledObjective``.
        desirable_weight: see ``LabelledObjective``.
        undesirable_weight: see ``LabelledObjective``.
        decay: how much of the running means each step keeps, in [0, 1).
    """

    follows = True

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        decay: float = 0.9,
    ) -> None:
        super().__init__(beta, desirable_weight, undesirable_weight)
        if not 0 <= decay < 1:
            raise ValueError(f"objective.decay: {decay} is not in [0, 1)")
        self.decay = decay
        self.means = [0.0, 0.0]

    def losses(self, better: Tensor) -> Tensor:
        return -logsigmoid(better)

    def point(self, mismatched: Tensor | None = None) -> Tensor | float:
        return sum(self.means) / 2

    def follow(self, sums: Tensor) -> None:
        values = sums.tolist()
        for kind, (total, count) in enumerate(zip(values[:2], values[2:], strict=True)):
            if count:  # a step may have had none of a kind
                self.means[kind] = self.decay * self.means[kind] + (1 - self.decay) * total / count

    def state(self) -> list[float]:
        return list(self.means)

    def load_state(self, state: list[float]) -> None:
        self.means = list(state)
