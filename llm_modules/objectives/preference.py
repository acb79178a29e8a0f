"""Preference objectives: what makes the chosen of two answers likelier than the rejected one.

Shape legend: P pairs. c and r are log p(chosen | prompt) and log p(rejected | prompt), summed over the answer's tokens;
c' and r' those of the reference; ``margin`` is (c - c') - (r - r').
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm_modules.batch import ObjectiveOutput, PairScores, Term
from llm_modules.objectives.shapes import summed


class PreferenceObjective:
    """What a step of ``PreferenceModule`` minimizes: sums over the micro-batch's pairs.

    An objective of your own is a subclass with ``losses``, a loss for each pair: the module divides their sum by the
    pairs of the whole accumulation window over all ranks. A part over tokens is added by ``terms``; what is logged as
    ``loss`` is the weighted total, and the pairs' own part beside others as ``preference``.

    Args:
        beta: how strongly the model is held to the reference; the scale of the implicit rewards beta * (c - c').
    """

    needs_reference: bool = True
    """Whether the scores must hold the reference's."""

    length_normalized: bool = False
    """Whether answers are compared by token; then so are the implicit rewards."""

    def __init__(self, beta: float = 0.1) -> None:
        if not beta > 0:
            raise ValueError(f"objective.beta: {beta} is not allowed; above 0")
        self.beta = beta

    def losses(self, scores: PairScores) -> Tensor:
        """(P,) of each pair."""
        raise NotImplementedError

    def terms(self, scores: PairScores) -> dict[str, Term]:
        return {"loss": Term(self._sum(scores), "pairs")}

    def _sum(self, scores: PairScores) -> Tensor:
        return summed(self, self.losses(scores), len(scores.chosen), "pairs")

    def rewards(self, scores: PairScores) -> tuple[Tensor, Tensor]:
        """(P,) implicit rewards of the chosen and of the rejected answers; without a reference its part is left out."""
        chosen, rejected = scores[:2] if scores.reference_chosen is None else log_ratios(scores)
        if self.length_normalized:
            chosen, rejected = by_token(scores, chosen, rejected)
        return self.beta * chosen, self.beta * rejected

    def __call__(self, scores: PairScores) -> ObjectiveOutput:
        with torch.no_grad():
            chosen, rejected = self.rewards(scores)
            measured = {
                "reward_chosen": chosen,
                "reward_rejected": rejected,
                "reward_margin": chosen - rejected,
                "reward_accuracy": (chosen > rejected).to(chosen),
                "logp_chosen": scores.chosen,
                "logp_rejected": scores.rejected,
                "tokens_chosen": scores.chosen_tokens,
                "tokens_rejected": scores.rejected_tokens,
            }
            metrics = {name: (value.detach().sum(), "pairs") for name, value in measured.items()}
            if scores.entropy is not None:
                metrics["entropy"] = (scores.entropy, "tokens")
            if scores.reference_chosen is not None:
                metrics["kl"] = (torch.cat(log_ratios(scores)).sum(), "tokens")
        return ObjectiveOutput(self.terms(scores), metrics)


def log_ratios(scores: PairScores) -> tuple[Tensor, Tensor]:
    """(P,) c - c' and r - r'."""
    assert scores.reference_chosen is not None
    assert scores.reference_rejected is not None
    return scores.chosen - scores.reference_chosen, scores.rejected - scores.reference_rejected


def by_token(scores: PairScores, chosen: Tensor, rejected: Tensor) -> tuple[Tensor, Tensor]:
    """(P,) sums of the chosen and of the rejected answers, each by its answer's tokens."""
    return chosen / scores.chosen_tokens.clamp(min=1), rejected / scores.rejected_tokens.clamp(min=1)


class DPO(PreferenceObjective):
    """Direct preference optimization (arXiv 2305.18290, equation 7): -log sigmoid(beta * margin).

    Args:
        beta: see ``PreferenceObjective``.
        label_smoothing: the share e of labels that are taken to be the wrong way round, in [0, 0.5).
        robust: what is made of e: false: (1 - e) L(margin) + e L(-margin) (conservative DPO, Mitchell 2023); true: the
            unbiased ((1 - e) L(margin) - e L(-margin)) / (1 - 2e) (arXiv 2403.00409, equation 12).
        length_normalized: log-probabilities by token (as in arXiv 2405.14734, section 2, with a reference).
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        robust: bool = False,
        length_normalized: bool = False,
    ) -> None:
        super().__init__(beta)
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"objective.label_smoothing: {label_smoothing} is not in [0, 0.5)")
        self.label_smoothing, self.robust, self.length_normalized = label_smoothing, robust, length_normalized

    def losses(self, scores: PairScores) -> Tensor:
        logits = self.beta * margin(scores, self.length_normalized)
        smoothing = self.label_smoothing
        if self.robust:
            return ((smoothing - 1) * logsigmoid(logits) + smoothing * logsigmoid(-logits)) / (1 - 2 * smoothing)
        return (smoothing - 1) * logsigmoid(logits) - smoothing * logsigmoid(-logits)


def margin(scores: PairScores, length_normalized: bool = False) -> Tensor:
    """(P,) (c - c') - (r - r'), each log-probability by its answer's tokens if asked for."""
    chosen, rejected = log_ratios(scores)
    if length_normalized:
        chosen, rejected = by_token(scores, chosen, rejected)
    return chosen - rejected


class Hinge(PreferenceObjective):
    """SLiC's loss on DPO's margin (arXiv 2305.10425; as in arXiv 2309.06657): max(0, 1 - beta * margin)."""

    def losses(self, scores: PairScores) -> Tensor:
        return torch.relu(1 - self.beta * margin(scores))


class IPO(PreferenceObjective):
    """Identity preference optimization (arXiv 2310.12036, equation 17): (margin - 1 / (2 beta))^2.

    Args:
        beta: tau of the paper.
        length_normalized: log-probabilities by token, as its authors' experiments have it; false: as the paper writes.
    """

    def __init__(self, beta: float = 0.1, length_normalized: bool = True) -> None:
        super().__init__(beta)
        self.length_normalized = length_normalized

    def losses(self, scores: PairScores) -> Tensor:
        return (margin(scores, self.length_normalized) - 1 / (2 * self.beta)).square()


class SPPO(PreferenceObjective):
    """Self-play preference optimization with hard labels (arXiv 2405.00675, equation 4.7, where the winner has 1)."""

    def losses(self, scores: PairScores) -> Tensor:
        chosen, rejected = log_ratios(scores)
        half = 0.5 / self.beta
        return (chosen - half).square() + (rejected + half).square()


class APO(PreferenceObjective):
    """Anchored preference optimization (arXiv 2408.06266, equations 7 and 8).

    Args:
        beta: see ``PreferenceObjective``.
        kind: ``zero``: chosen answers are better than the model's own: they become likelier; ``down``: they are worse:
            both become less likely, the rejected ones more so.
    """

    def __init__(self, beta: float = 0.1, kind: Literal["zero", "down"] = "zero") -> None:
        super().__init__(beta)
        if kind not in ("zero", "down"):
            raise ValueError(f"objective.kind: {kind!r} is not one of zero, down")
        self.kind = kind

    def losses(self, scores: PairScores) -> Tensor:
        chosen, rejected = log_ratios(scores)
        if self.kind == "zero":
            return 1 - torch.sigmoid(self.beta * chosen) + torch.sigmoid(self.beta * rejected)
        return torch.sigmoid(self.beta * chosen) + 1 - torch.sigmoid(self.beta * (chosen - rejected))


class SimPO(PreferenceObjective):
    """Simple preference optimization, without a reference (arXiv 2405.14734, equation 6).

    Args:
        beta: scale of the log-probability by token; 2 to 10 in the paper.
        gamma: target margin of the rewards.
    """

    needs_reference = False
    length_normalized = True

    def __init__(self, beta: float = 2.0, gamma: float = 1.0) -> None:
        super().__init__(beta)
        if gamma < 0:
            raise ValueError(f"objective.gamma: {gamma} is negative; allowed: 0 or more")
        self.gamma = gamma

    def losses(self, scores: PairScores) -> Tensor:
        chosen, rejected = by_token(scores, *scores[:2])
        return -logsigmoid(self.beta * (chosen - rejected) - self.gamma)


class CPO(PreferenceObjective):
    """Contrastive preference optimization, without a reference (arXiv 2401.08417, equation 4): DPO's loss with a
    uniform reference, and the likelihood of the chosen answers' tokens.

    Args:
        beta: see ``PreferenceObjective``.
        alpha: weight of the likelihood.
    """

    needs_reference = False

    def __init__(self, beta: float = 0.1, alpha: float = 1.0) -> None:
        super().__init__(beta)
        if alpha < 0:
            raise ValueError(f"objective.alpha: {alpha} is negative; allowed: 0 or more")
        self.alpha = alpha

    def losses(self, scores: PairScores) -> Tensor:
        return -logsigmoid(self.beta * (scores.chosen - scores.rejected))

    def terms(self, scores: PairScores) -> dict[str, Term]:
        return {
            "preference": Term(self._sum(scores), "pairs"),
            "nll_chosen": Term(-scores.chosen.sum(), "tokens_chosen", self.alpha),
        }


class ORPO(PreferenceObjective):
    """Odds-ratio preference optimization, without a reference (arXiv 2403.07691, equations 6 and 7): the likelihood of
    the chosen answers' tokens, and -log sigmoid of the log odds ratio of the two answers by token.

    Args:
        beta: weight of the odds ratio (lambda of the paper).
    """

    needs_reference = False
    length_normalized = True

    def losses(self, scores: PairScores) -> Tensor:
        chosen, rejected = by_token(scores, *scores[:2])
        return -logsigmoid(_log_odds(chosen) - _log_odds(rejected))

    def terms(self, scores: PairScores) -> dict[str, Term]:
        return {
            "odds_ratio": Term(self._sum(scores), "pairs", self.beta),
            "nll_chosen": Term(-scores.chosen.sum(), "tokens_chosen"),
        }


def _log_odds(logprob: Tensor) -> Tensor:
    """log(p / (1 - p)); p of 1 in fp32 counts as the number below it."""
    return logprob - torch.log(-torch.expm1(logprob.clamp(max=-torch.finfo(logprob.dtype).eps)))
