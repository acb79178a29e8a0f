"""Distillation objectives: how far a student's distribution over the vocabulary is from its teacher's.

Shape legend: C tokens of a chunk, M all trained tokens, V vocabulary. s and t are the log-probabilities of the student
and of the teacher.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from llm_modules.batch import ObjectiveOutput, TaughtScores, Term


class DistillationObjective:
    """What a step of ``DistillationModule`` minimizes: over the trained tokens the sum of
    (1 - w) T^2 D(student, teacher) + w (-log p(token)).

    An objective of your own is a subclass with ``divergence``, which the model's head calls with some tokens at a time,
    so that never all of both distributions are there.

    Args:
        temperature: T; both distributions are taken at logits / T. D is multiplied by T^2, so that its gradient keeps
            its size (Hinton et al. 2015, arXiv 1503.02531, section 2; GKD leaves that out).
        cross_entropy: w in [0, 1], the share of the cross-entropy on the tokens that the data have.
    """

    def __init__(self, temperature: float = 1.0, cross_entropy: float = 0.0) -> None:
        if not temperature > 0:
            raise ValueError(f"objective.temperature: {temperature} is not allowed; above 0")
        if not 0 <= cross_entropy <= 1:
            raise ValueError(f"objective.cross_entropy: {cross_entropy} is not in [0, 1]")
        self.temperature, self.cross_entropy = temperature, cross_entropy

    def divergence(self, student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        """(C,) of each token, from log-probabilities; the teacher's have no graph."""
        raise NotImplementedError

    def compare(self, student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        """(C,) the divergence at the temperature, from log-probabilities without one."""
        if self.temperature != 1:
            student_CV, teacher_CV = ((x / self.temperature).log_softmax(-1) for x in (student_CV, teacher_CV))
        return self.divergence(student_CV, teacher_CV)

    def __call__(self, scores: TaughtScores) -> ObjectiveOutput:
        """From M tokens' scores to the term and what is logged: ``kl`` is KL(teacher || student) at temperature 1."""
        negative = -scores.logprobs.sum()
        loss = (1 - self.cross_entropy) * self.temperature**2 * scores.divergence.sum()
        if self.cross_entropy:
            loss = loss + self.cross_entropy * negative
        measured = {"kl": scores.kl, "nll": -scores.logprobs, "teacher_nll": -scores.teacher_logprobs}
        metrics = {name: (values.detach().sum(), "tokens") for name, values in measured.items()}
        return ObjectiveOutput({"loss": Term(loss, "tokens")}, metrics)


class ForwardKL(DistillationObjective):
    """KL(teacher || student) = sum over V of exp(t) (t - s): the student covers all that the teacher may say (Hinton et
    al. 2015, arXiv 1503.02531; context distillation: Askell et al. 2021, arXiv 2112.00861, section 2.2)."""

    def divergence(self, student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        return (teacher_CV.exp() * (teacher_CV - student_CV)).sum(-1)


class ReverseKL(DistillationObjective):
    """KL(student || teacher) = sum over V of exp(s) (s - t): the student says nothing that the teacher would not
    (MiniLLM, arXiv 2306.08543, equation 1, here by token)."""

    def divergence(self, student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        return (student_CV.exp() * (student_CV - teacher_CV)).sum(-1)


class GeneralizedJSD(DistillationObjective):
    """The generalized Jensen-Shannon divergence (GKD, arXiv 2306.13649, equation 1): with the mixture
    m = b teacher + (1 - b) student, b KL(teacher || m) + (1 - b) KL(student || m).

    Near b = 0 it is b times the forward KL, near 1 it is (1 - b) times the reverse one.

    Args:
        beta: b in (0, 1).
        temperature: see ``DistillationObjective``.
        cross_entropy: see ``DistillationObjective``.
    """

    def __init__(self, beta: float = 0.5, temperature: float = 1.0, cross_entropy: float = 0.0) -> None:
        super().__init__(temperature, cross_entropy)
        if not 0 < beta < 1:
            raise ValueError(f"objective.beta: {beta} is not in (0, 1); the limits are ForwardKL and ReverseKL")
        self.beta = beta

    def divergence(self, student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        mixture = torch.logaddexp(student_CV + math.log1p(-self.beta), teacher_CV + math.log(self.beta))
        of_teacher = (teacher_CV.exp() * (teacher_CV - mixture)).sum(-1)
        of_student = (student_CV.exp() * (student_CV - mixture)).sum(-1)
        return self.beta * of_teacher + (1 - self.beta) * of_student
