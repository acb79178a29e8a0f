"""A causal language model that scores target tokens: transformers' base model and our head.

Shape legend: B rows, T positions, N = B * T, M trained positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_modules.batch import IGNORE_INDEX, TokenScores
from llm_modules.logprobs import DEFAULT_CHUNK
from llm_modules.zoo.attention import training_layout
from llm_modules.zoo.description import describe
from llm_modules.zoo.estimate import token_flops
from llm_modules.zoo.head import HeadKind, ScoringHead, head_transform

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class CausalLM(nn.Module):
    """One forward pass from token ids to the log-probabilities of the trained tokens.

    All weights are touched inside ``forward``, so that DDP, FSDP and tensor parallelism see every use of them.

    Attributes:
        hf: transformers' ``...ForCausalLM``; for generation, adapters and export.
        head: scores hidden states under the model's own output weights.
        flops: what a token costs.
        packing_problem: why packed documents would see each other in this model; None where they do not.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        *,
        head: HeadKind = "chunked",
        head_chunk: int = DEFAULT_CHUNK,
        packing_problem: str | None = None,
    ) -> None:
        super().__init__()
        if hf.base_model is hf:
            raise ValueError(f"backbone: {type(hf).__name__} has no base model apart from its head; not supported")
        self.hf = hf
        self.head = ScoringHead(head_transform(hf.config), kind=head, chunk=head_chunk)
        self.packing_problem = packing_problem
        # Now: a sharded model no longer knows its own size.
        self._description = describe(hf)
        self.flops = token_flops(hf)

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets: Tensor,
        document_offsets: Tensor | None = None,
        max_document: int = 0,
        *,
        statistics: bool = False,
        uniform: bool = False,
    ) -> TokenScores:
        """Score the targets that are not ``IGNORE_INDEX``.

        Args:
            input_ids: (B, T) int64, packed (B = 1) or padded on the right.
            position_ids: (B, T) int64.
            targets: (B, T) int64, what each position is to predict (already shifted).
            document_offsets: (documents + 1,) int32 cumulative lengths of a packed row; None for padded rows.
            max_document: upper bound of a document's length in tokens (packed rows).
            statistics: also return the log-normalizer and the mean log-probability.
            uniform: the caller will give every log-probability the same gradient (see ``linear_logprobs``).

        Raises:
            ValueError: ``document_offsets`` for a model whose attention does not keep documents apart.
        """
        hidden_BTH = self.hidden_states(input_ids, position_ids, document_offsets, max_document)
        index = (targets.flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
        hidden_MH = hidden_BTH.flatten(0, 1).index_select(0, index)
        output = self.hf.get_output_embeddings()
        logprobs, log_normalizer, mean_logprob = self.head(
            hidden_MH,
            output.weight,
            targets.flatten().index_select(0, index),
            getattr(output, "bias", None),
            statistics=statistics,
            uniform=uniform,
        )
        return TokenScores(logprobs, index, log_normalizer, mean_logprob)

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, document_offsets: Tensor | None = None, max_document: int = 0
    ) -> Tensor:
        """(B, T, H) final hidden states, after the last norm."""
        layout: dict[str, Any] = {}
        if document_offsets is not None:
            if self.packing_problem:
                raise ValueError(
                    f"packing: not for {self.hf.config.model_type!r} with attention "
                    f"{self.hf.config._attn_implementation!r}: {self.packing_problem}; set packing: none"
                )
            longest = max_document or input_ids.shape[1]
            layout = {
                "cu_seq_lens_q": document_offsets,
                "cu_seq_lens_k": document_offsets,
                "max_length_q": longest,
                "max_length_k": longest,
            }
        with training_layout():
            return self.hf.base_model(
                input_ids=input_ids, position_ids=position_ids, use_cache=False, **layout
            ).last_hidden_state

    def compile_blocks(self) -> None:
        """Compile each decoder block in place; names of parameters stay as they are.

        Raises:
            ValueError: the family has no decoder blocks that transformers marks as such.
        """
        blocks = self.blocks()
        if not blocks:
            raise ValueError(f"backbone.compile: {type(self.hf).__name__} has no decoder blocks; set it to false")
        for block in blocks:
            block.compile(dynamic=True)

    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.hf.modules() if isinstance(module, GradientCheckpointingLayer)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLM:
        """A change of dtype leaves fp32 buffers: rotary frequencies in bf16 would put tokens at wrong positions."""
        kept = {name: buffer for name, buffer in self.named_buffers() if buffer.dtype == torch.float32}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            owner, _, leaf = name.rpartition(".")
            now = getattr(self.get_submodule(owner), leaf)
            if now.dtype != before.dtype and now.is_floating_point():
                setattr(self.get_submodule(owner), leaf, before.to(now.device))
        return self

    def description(self) -> dict[str, Any]:
        """What this model is, in plain values, for checkpoints (see ``describe_difference``)."""
        return self._description

    def flops_per_token(self, sequence_length: int) -> float:
        """FLOPs of training on a token of a document of ``sequence_length`` tokens (see ``estimate.TokenFlops``)."""
        return self.flops.training(sequence_length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face folder (config, generation config, safetensors)."""
        self.hf.save_pretrained(folder)
