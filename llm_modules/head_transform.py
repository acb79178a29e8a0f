"""Floor 0: what models do to their logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadTransform:
    """What is done to ``hidden @ weight.T + bias`` before the softmax: the scale, then the soft-cap, both of the model,
    then the temperature that was asked for.

    Attributes:
        scale: logits are multiplied by it (Cohere's ``logit_scale``, 1 / Granite's ``logits_scaling``).
        softcap: logits become ``softcap * tanh(logits / softcap)`` (Gemma 2, arXiv 2408.00118, section 2).
        temperature: logits are divided by it at last: log-probabilities of what is sampled at it.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits / self.temperature if self.temperature != 1.0 else logits

    def backward_(self, grad: Tensor, logits: Tensor) -> Tensor:
        """Gradient before the transform, in place, of ``grad`` after it; ``logits`` are those after it."""
        if self.softcap is not None:
            grad.mul_(1 - (logits * (self.temperature / self.softcap)).square_())
        factor = self.scale / self.temperature
        return grad.mul_(factor) if factor != 1.0 else grad
