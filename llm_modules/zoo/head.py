"""The last step of a causal model: from hidden states to the log-probabilities of target tokens.

Shape legend: M trained positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from llm_modules.logprobs import DEFAULT_CHUNK, HeadTransform, linear_logprobs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HeadKind = Literal["chunked", "plain", "liger"]


def head_transform(config: PretrainedConfig) -> HeadTransform:
    """What the model of this config does to its logits; ``checks.check_head`` proves it for each model built."""
    config = config.get_text_config()
    scale = 1.0
    for key, inverse in (("logits_scaling", True), ("logit_scale", False), ("lm_head_multiplier", False)):
        value = getattr(config, key, None)
        if value is not None:
            scale *= 1 / value if inverse else value
    return HeadTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def check_head_kind(kind: str, chunk: int) -> None:
    """Raise a ValueError for a head that there is not, or not here."""
    if kind not in get_args(HeadKind):
        raise ValueError(f"backbone.head: unknown value {kind!r}; allowed: {', '.join(get_args(HeadKind))}")
    if chunk < 1:
        raise ValueError(f"backbone.head_chunk: {chunk} tokens; must be at least 1")
    if kind == "liger" and (find_spec("liger_kernel") is None or not torch.cuda.is_available()):
        raise ValueError("backbone.head: liger needs a CUDA device and `pip install liger-kernel`; set head: chunked")


class ScoringHead(nn.Module):
    """Log-probabilities under a linear head whose weight is given at the call (it is the model's own, maybe tied).

    Args:
        transform: what the model does to its logits.
        kind: ``chunked`` never holds all the logits; ``plain`` does (slow and large, for comparison); ``liger`` uses
            liger-kernel's fused kernels (CUDA).
        chunk: targets scored at once.
    """

    def __init__(self, transform: HeadTransform, *, kind: HeadKind, chunk: int = DEFAULT_CHUNK) -> None:
        super().__init__()
        check_head_kind(kind, chunk)
        self.transform, self.kind, self.chunk = transform, kind, chunk

    def forward(
        self,
        hidden_MH: Tensor,
        weight_VH: Tensor,
        targets_M: Tensor,
        bias_V: Tensor | None = None,
        *,
        statistics: bool = False,
        uniform: bool = False,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As ``logprobs.linear_logprobs``."""
        if self.kind == "plain":
            return self._plain(hidden_MH, weight_VH, targets_M, bias_V, statistics)
        return linear_logprobs(
            hidden_MH,
            weight_VH,
            targets_M,
            bias_V,
            transform=self.transform,
            uniform=uniform,
            statistics=statistics,
            chunk=self.chunk,
        )

    def _plain(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, statistics: bool) -> Any:
        logits = self.transform(nn.functional.linear(hidden, weight, bias).float())
        log_normalizer = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_normalizer
        return (logprobs, log_normalizer, logits.mean(-1) - log_normalizer) if statistics else (logprobs, None, None)
