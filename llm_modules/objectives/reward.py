"""Reward objectives: what makes a scalar head give the better of two answers the higher score.

Shape legend: P pairs. c and r are the scores of the chosen and of the rejected answers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm_modules.batch import ObjectiveOutput, RewardScores, Term
from llm_modules.objectives.shapes import summed


class RewardObjective:
    """What a step of ``RewardModule`` minimizes: sums over the micro-batch's pairs.

    An objective of your own is a subclass with ``losses``, a loss for each pair; ``better`` is the difference of scores
    that is above zero where a pair is the right way round.
    """

    def losses(self, scores: RewardScores) -> Tensor:
        """(P,) of each pair."""
        raise NotImplementedError

    def better(self, scores: RewardScores) -> Tensor:
        """(P,)."""
        return scores.chosen - scores.rejected

    def __call__(self, scores: RewardScores) -> ObjectiveOutput:
        with torch.no_grad():
            better = self.better(scores)
            measured = {
                "score_chosen": scores.chosen,
                "score_rejected": scores.rejected,
                "score_margin": better,
                "accuracy": (better > 0).to(better),
            }
            metrics = {name: (value.detach().sum(), "pairs") for name, value in measured.items()}
        total = summed(self, self.losses(scores), len(scores.chosen), "pairs")
        return ObjectiveOutput({"loss": Term(total, "pairs")}, metrics)


class BradleyTerry(RewardObjective):
    """-log sigmoid(c - r - m), where m is the pair's margin, if it has one (Bradley and Terry 1952; InstructGPT, arXiv
    2203.02155, equation 1; margins: Llama 2, arXiv 2307.09288, equation 2).

    Args:
        centering: weight of (c + r)^2, which holds the scores around zero (arXiv 2312.09244, equation 2).
    """

    def __init__(self, centering: float = 0.0) -> None:
        if centering < 0:
            raise ValueError(f"objective.centering: {centering} is negative; allowed: 0 or more")
        self.centering = centering

    def losses(self, scores: RewardScores) -> Tensor:
        margin = scores.values[:, 0].nan_to_num(0.0)
        losses = -logsigmoid(scores.chosen - scores.rejected - margin)
        if self.centering:
            losses = losses + self.centering * (scores.chosen + scores.rejected).square()
        return losses


class CostModel(RewardObjective):
    """The cost of Safe RLHF (arXiv 2310.12773, equation 7), which is above zero for harm: the chosen answer is the less
    harmful one, so -log sigmoid(r - c), and for each answer -log sigmoid(s * cost), where s is 1 for an unsafe one and
    -1 for a safe one.

    Args:
        signs: weight of the two terms of sign.
    """

    def __init__(self, signs: float = 1.0) -> None:
        if signs < 0:
            raise ValueError(f"objective.signs: {signs} is negative; allowed: 0 or more")
        self.signs = signs

    def better(self, scores: RewardScores) -> Tensor:
        return scores.rejected - scores.chosen

    def losses(self, scores: RewardScores) -> Tensor:
        losses = -logsigmoid(self.better(scores))
        if not self.signs:
            return losses
        safe = scores.values[:, 1:]
        if safe.isnan().any():
            raise ValueError(
                "objective: CostModel needs the columns chosen_safe and rejected_safe (true or false) in every row; "
                "add them, or set objective.signs to 0"
            )
        sign = 1 - 2 * safe
        return losses - self.signs * (logsigmoid(sign[:, 0] * scores.chosen) + logsigmoid(sign[:, 1] * scores.rejected))
