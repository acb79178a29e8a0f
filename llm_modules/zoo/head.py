"""The last step of a causal model: from hidden states to the log-probabilities of target tokens.

Shape legend: M trained positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from packaging.version import Version
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llm_modules.batch import IGNORE_INDEX, TaughtScores, Teaching
from llm_modules.logprobs import DEFAULT_CHUNK, HeadTransform, compared, entropies, linear_entropies, linear_logprobs

if TYPE_CHECKING:
    from transformers import PretrainedConfig

HeadKind = Literal["chunked", "plain", "liger"]

_LIGER = "0.8.5"
"""The first version seen to give each token's loss its own upstream gradient."""


def head_transform(config: PretrainedConfig) -> HeadTransform:
    """What the model of this config does to its logits; ``probe.check_head`` proves it for each model built."""
    config = config.get_text_config()
    scale = 1.0
    for key, inverse in (("logits_scaling", True), ("logit_scale", False), ("lm_head_multiplier", False)):
        value = getattr(config, key, None)
        if value is not None:
            scale *= 1 / value if inverse else value
    return HeadTransform(scale=scale, softcap=getattr(config, "final_logit_softcapping", None))


def predicting(targets_BT: Tensor) -> tuple[Tensor, Tensor]:
    """(M,) places of the positions that have a target, and (M,) the targets.

    To be called before the decoder: a GPU is waited for, to know how many they are.
    """
    index = (targets_BT.flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
    return index, targets_BT.flatten().index_select(0, index)


def check_head_kind(kind: str, chunk: int) -> None:
    """Raise a ValueError for a head that there is not, or not here."""
    if kind not in get_args(HeadKind):
        raise ValueError(f"backbone.head: unknown value {kind!r}; allowed: {', '.join(get_args(HeadKind))}")
    if chunk < 1:
        raise ValueError(f"backbone.head_chunk: {chunk} tokens; must be at least 1")
    if kind != "liger":
        return
    if find_spec("liger_kernel") is None or not torch.cuda.is_available():
        raise ValueError("backbone.head: liger needs a CUDA device and `pip install liger-kernel`; set head: chunked")
    if Version(version("liger-kernel")) < Version(_LIGER):
        raise ValueError(
            f"backbone.head: liger needs liger-kernel >= {_LIGER}, found {version('liger-kernel')}; update it"
        )


class ScoringHead(nn.Module):
    """Log-probabilities under a linear head whose weight is given at the call (it is the model's own, maybe tied).

    Args:
        transform: what the model does to its logits.
        kind: ``chunked`` never holds all the logits; ``plain`` does (slow and large, for comparison); ``liger`` uses
            liger-kernel's fused kernels (CUDA).
        chunk: targets scored at once.

    Attributes:
        fused: of ``linear_logprobs``, on a GPU.
    """

    def __init__(self, transform: HeadTransform, *, kind: HeadKind, chunk: int = DEFAULT_CHUNK) -> None:
        super().__init__()
        check_head_kind(kind, chunk)
        self.transform, self.kind, self.chunk = transform, kind, chunk
        self.fused = False

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
        plain = not statistics and self.transform.temperature == 1.0  # liger-kernel has neither
        if self.kind == "liger" and plain and len(targets_M):
            return self._liger(hidden_MH, weight_VH, targets_M, bias_V), None, None
        return linear_logprobs(
            hidden_MH,
            weight_VH,
            targets_M,
            bias_V,
            transform=self.transform,
            uniform=uniform,
            statistics=statistics,
            chunk=self.chunk,
            fused=self.fused and hidden_MH.is_cuda,
        )

    def through(
        self, module: nn.Module, hidden_MH: Tensor, targets_M: Tensor, statistics: bool = False
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """As ``forward``, under a head that is more than a weight (one with an adapter on it).

        Some targets at a time, whose logits are computed again in the backward pass.
        """

        def scored(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = self.transform(module(hidden).float())
            log_normalizer = logits.logsumexp(-1)
            logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_normalizer
            return logprobs, log_normalizer, logits.mean(-1) - log_normalizer

        parts = zip(hidden_MH.split(self.chunk), targets_M.split(self.chunk), strict=True)
        scores = [checkpoint(scored, hidden, targets, use_reentrant=False) for hidden, targets in parts]
        logprobs, log_normalizer, mean = (torch.cat(column) for column in zip(*scores, strict=True))
        return (logprobs, log_normalizer, mean) if statistics else (logprobs, None, None)

    def taught(
        self, logits: Callable[[Tensor], Tensor], hidden_MH: Tensor, targets_M: Tensor, teaching: Teaching
    ) -> TaughtScores:
        """The targets under a student and its teacher; all the logits of both are never there at once.

        Some targets at a time, whose logits are computed again in the backward pass.

        Args:
            logits: the student's, from hidden states, in fp32 and after its transform.
            teaching: with the teacher's.
        """

        def scored(hidden: Tensor, teacher_hidden: Tensor, targets: Tensor) -> TaughtScores:
            with torch.no_grad():
                teacher = teaching.logits(teacher_hidden)
            return compared(logits(hidden), teacher, targets, teaching.compare)

        if self.kind == "plain":
            return scored(hidden_MH, teaching.hidden, targets_M)
        columns = (part.split(self.chunk) for part in (hidden_MH, teaching.hidden, targets_M))
        scores = [checkpoint(scored, *parts, use_reentrant=False) for parts in zip(*columns, strict=True)]
        return TaughtScores(*(torch.cat(column) for column in zip(*scores, strict=True)))

    @torch.no_grad()
    def entropies(self, module: Any, hidden_MH: Tensor, adapted: bool) -> Tensor:
        """(M,) as ``logprobs.linear_entropies``, under the head ``module``, which may be more than a weight."""
        if not adapted:
            bias = getattr(module, "bias", None)
            return linear_entropies(hidden_MH, module.weight, bias, transform=self.transform, chunk=self.chunk)
        return torch.cat([entropies(self.transform(module(part).float())) for part in hidden_MH.split(self.chunk)])

    def _plain(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, statistics: bool) -> Any:
        logits = self.transform(nn.functional.linear(hidden, weight, bias).float())
        log_normalizer = logits.logsumexp(-1)
        logprobs = logits.gather(-1, targets[:, None]).squeeze(-1) - log_normalizer
        return (logprobs, log_normalizer, logits.mean(-1) - log_normalizer) if statistics else (logprobs, None, None)

    def _liger(self, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> Tensor:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        scale = self.transform.scale
        return -liger_fused_linear_cross_entropy(
            hidden if scale == 1.0 else hidden * scale,
            weight,
            targets,
            bias=bias if bias is None or scale == 1.0 else bias * scale,
            reduction="none",
            softcap=self.transform.softcap,
        )
