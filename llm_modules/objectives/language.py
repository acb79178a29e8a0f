"""Language-modelling objectives: pure functions of token log-probabilities."""

from __future__ import annotations

from llm_modules.batch import ObjectiveOutput, Term, TokenScores


class LanguageObjective:
    """What a step of ``LanguageModelModule`` minimizes: sums over the micro-batch's trained tokens.

    An objective of your own is a subclass with ``__call__``; it returns terms that are *sums* and name their
    denominator (``tokens``): the module divides by the count of the whole accumulation window over all ranks. Never
    divide by a count of the micro-batch: the gradient would then depend on how the batch is cut, and the invariance
    tests would say so.
    """

    needs_statistics: bool = False
    """Whether the scores must hold the log-normalizer and the mean log-probability (costs memory and time)."""

    uniform: bool = False
    """Whether every token gets the same gradient, so that the head may make it in the forward pass (faster)."""

    def __call__(self, scores: TokenScores) -> ObjectiveOutput:
        """From M tokens' scores to terms.

        Args:
            scores: log-probabilities (M,) fp32 of the trained tokens, and statistics if asked for.
        """
        raise NotImplementedError


class NextToken(LanguageObjective):
    """Next-token prediction: the mean negative log-likelihood of the trained tokens.

    Args:
        label_smoothing: epsilon in [0, 1): the target distribution is (1 - epsilon) on the token and epsilon spread
            evenly over the vocabulary (Szegedy et al. 2016, arXiv 1512.00567, section 7).
        z_loss: coefficient of ``logsumexp(logits)^2`` per token, which keeps the softmax normalizer near 1
            (PaLM, arXiv 2204.02311, section 5: 1e-4).

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(self, label_smoothing: float = 0.0, z_loss: float = 0.0) -> None:
        if not 0.0 <= label_smoothing < 1.0:
            raise ValueError(f"objective.label_smoothing: {label_smoothing} is not in [0, 1)")
        if z_loss < 0.0:
            raise ValueError(f"objective.z_loss: {z_loss} is negative; allowed: 0 (off) or more")
        self.label_smoothing = label_smoothing
        self.z_loss = z_loss
        self.needs_statistics = label_smoothing > 0.0 or z_loss > 0.0
        self.uniform = not self.needs_statistics

    def __call__(self, scores: TokenScores) -> ObjectiveOutput:
        negative = -scores.logprobs.sum()
        loss = negative
        terms = {}
        if self.label_smoothing:
            assert scores.mean_logprob is not None
            smooth = -scores.mean_logprob.sum()
            loss = (1 - self.label_smoothing) * negative + self.label_smoothing * smooth
        terms["loss"] = Term(loss, "tokens")
        if self.z_loss:
            assert scores.log_normalizer is not None
            terms["z_loss"] = Term(scores.log_normalizer.square().sum(), "tokens", weight=self.z_loss)
        return ObjectiveOutput(terms, {"nll": (negative.detach(), "tokens")})
