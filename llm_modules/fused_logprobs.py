"""Floor 0: what a head does to a chunk of logits beside its matrix products, each as one compiled kernel.

Read in bf16, once or twice, and nothing of the logits' size is written but the gradient; operator by operator the same
takes some ten passes over fp32. For GPUs: a CPU has its own way (``logprobs._scores_and_gradient``).

Shape legend: M target tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llm_modules.head_transform import HeadTransform


def chunk_scores(
    product_MV: Tensor, bias_V: Tensor | None, targets_M: Tensor, transform: HeadTransform, statistics: bool
) -> Tensor:
    """(3, M) fp32 log-probabilities, log-normalizers, and mean log-probabilities (without ``statistics``: zero)."""
    logits = _logits(product_MV, bias_V, transform)
    log_normalizer = logits.logsumexp(-1)
    of_target = logits.gather(-1, targets_M[:, None]).squeeze(-1)
    mean = logits.mean(-1) - log_normalizer if statistics else torch.zeros_like(log_normalizer)
    return torch.stack([of_target - log_normalizer, log_normalizer, mean])


def chunk_gradient(
    product_MV: Tensor,
    bias_V: Tensor | None,
    targets_M: Tensor,
    log_normalizer_M: Tensor,
    upstream: tuple[Tensor, Tensor, Tensor],
    transform: HeadTransform,
) -> Tensor:
    """(M, V) the gradient on the product, in its dtype.

    Args:
        upstream: of each (M,) that ``chunk_scores`` returns.
    """
    on_logprob, on_normalizer, on_mean = (gradient[:, None] for gradient in upstream)
    logits = _logits(product_MV, bias_V, transform)
    probabilities = (logits - log_normalizer_M[:, None]).exp()
    grad = probabilities * (on_normalizer - on_logprob - on_mean) + on_mean / logits.shape[-1]
    is_target = torch.arange(logits.shape[-1], device=logits.device) == targets_M[:, None]
    grad = torch.where(is_target, grad + on_logprob, grad)
    return transform.backward_(grad, logits).to(product_MV.dtype)


def _logits(product_MV: Tensor, bias_V: Tensor | None, transform: HeadTransform) -> Tensor:
    logits = product_MV.float()
    return transform(logits if bias_V is None else logits + bias_V.float())


@cache
def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The function compiled for chunks of any length of one vocabulary."""
    inner = torch.compile(function, dynamic=True)

    def call(product_MV: Tensor, *arguments: Any) -> Tensor:
        torch._dynamo.mark_static(product_MV, 1)  # a known width lets kernels read several values at once
        return inner(product_MV, *arguments)

    return call
