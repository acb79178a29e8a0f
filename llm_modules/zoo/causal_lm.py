"""A causal language model that scores target tokens: transformers' base model and our head.

Shape legend: B rows, T positions, N = B * T, M trained positions, H hidden size, V vocabulary.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llm_modules.batch import PreferenceBatch, TaughtScores, Teaching, TokenScores
from llm_modules.logprobs import DEFAULT_CHUNK, linear_logits
from llm_modules.zoo.activations import ActivationOffload
from llm_modules.zoo.attention import NAME, training_layout
from llm_modules.zoo.context_parallel import ContextParallel, Slice, check_context_parallel
from llm_modules.zoo.description import describe
from llm_modules.zoo.estimate import token_flops
from llm_modules.zoo.head import HeadKind, ScoringHead, head_transform, predicting
from llm_modules.zoo.routing import router_statistics, routing_of
from llm_modules.zoo.trained_state import keep_trained_only

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llm_modules.zoo.adapters import Adapter
    from llm_modules.zoo.virtual_tokens import VirtualTokens

logger = logging.getLogger(__name__)

BASE_FILE, BASE_FOLDER = "base.json", "base"
"""In an adapter's folder: what base it is for, and that base where it is nowhere else."""


class CausalLM(nn.Module):
    """One forward pass from token ids to the log-probabilities of the trained tokens.

    All weights are touched inside ``forward``, so that DDP, FSDP and tensor parallelism see every use of them.

    Attributes:
        hf: transformers' ``...ForCausalLM``; for generation, adapters and export.
        head: scores hidden states under the model's own output weights.
        flops: what a token costs.
        packing_problem: why packed documents would see each other in this model; None where they do not.
        adapter: what is trained of it; None: the model itself.
        virtual: virtual tokens before each document; None for most adapters.
        base: what the weights under an adapter are (see ``weights.base_description``).
        context: the ranks that each compute some positions of the same rows; None: this one computes all.
        routing: of a mixture of experts whose routers are trained; None for others.
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
        self.adapter: Adapter | None = None
        self.virtual: VirtualTokens | None = None
        self.base: dict[str, Any] | None = None
        self._offload: ActivationOffload | None = None
        self.context: ContextParallel | None = None
        self._head_type, self._head_is_adapted = type(hf.get_output_embeddings()), False
        # Now: a sharded model no longer knows its own size.
        self._description = describe(hf)
        self.flops = token_flops(hf)
        self.routing = routing_of(hf)
        self._sharing: str | None = None
        self._said_apart = False

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        targets: Tensor,
        document_offsets: Tensor | None = None,
        max_document: int = 0,
        *,
        lengths: Tensor | None = None,
        shared_keys: Tensor | None = None,
        key_offsets: Tensor | None = None,
        statistics: bool = False,
        uniform: bool = False,
        entropy: bool = False,
        states: bool = False,
        teaching: Teaching | None = None,
    ) -> TokenScores | TaughtScores | Tensor:
        """Score the targets that are not ``IGNORE_INDEX``.

        Args:
            input_ids: (B, T) int64, packed (B = 1) or padded on the right.
            position_ids: (B, T) int64.
            targets: (B, T) int64, what each position is to predict (already shifted).
            document_offsets: (documents + 1,) int32 cumulative lengths of a packed row; None for padded rows.
            max_document: upper bound of a document's length in tokens (packed rows).
            lengths: (B,) int64 positions of each row before its padding; None: there is none.
            shared_keys, key_offsets: as of ``PreferenceBatch``, where ``sharing_problem`` is None.
            statistics: also return the log-normalizer and the mean log-probability.
            uniform: the caller will give every log-probability the same gradient (see ``linear_logprobs``).
            states: return the (M, H) hidden states that the targets are predicted from, before the head: a teacher's.
            teaching: a teacher to be compared with: return ``TaughtScores``.
            entropy: also return the entropies.

        Raises:
            ValueError: ``document_offsets`` for a model whose attention does not keep documents apart; experts whose
                routers were not seen.
        """
        if states or teaching is not None:
            assert self.context is None
            return self._taught(Slice(input_ids, position_ids, targets, document_offsets), max_document, teaching)
        if self.context is None:
            part = Slice(input_ids, position_ids, targets, document_offsets)
            keys = {} if shared_keys is None else {"shared_keys": shared_keys, "cu_seq_lens_k": key_offsets}
            return self._scores(part, max_document, statistics, uniform, lengths, keys, entropy=entropy)
        part = self.context.slice(input_ids, position_ids, targets, document_offsets)
        with self.context.own_random_numbers(input_ids.device) if self.training else nullcontext():
            longest = max_document or input_ids.shape[1]
            scores = self._scores(part, longest, statistics, uniform, None, entropy=entropy)
        return self.context.share(scores, targets)

    def _scores(
        self,
        part: Slice,
        max_document: int,
        statistics: bool,
        uniform: bool,
        lengths: Tensor | None,
        keys: dict[str, Any] | None = None,
        entropy: bool = False,
    ) -> TokenScores:
        index, targets_M = predicting(part.targets)
        outputs = self._decode(part.input_ids, part.position_ids, part.document_offsets, max_document, keys)
        router: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.routing is not None and self._watches_router:
            router = router_statistics(outputs.router_logits, self.routing.top_k, lengths, part.input_ids.shape[1])
        hidden_MH = outputs.last_hidden_state.flatten(0, 1).index_select(0, index)
        output = self.hf.get_output_embeddings()
        measured = self.head.entropies(output, hidden_MH, self._head_is_adapted) if entropy else None
        if self._head_is_adapted:
            found = self.head.through(output, hidden_MH, targets_M, statistics)
        else:
            how = {"statistics": statistics, "uniform": uniform}
            found = self.head(hidden_MH, output.weight, targets_M, getattr(output, "bias", None), **how)
        logprobs, log_normalizer, mean_logprob = found
        return TokenScores(logprobs, index, log_normalizer, mean_logprob, *router, measured)

    def _taught(self, part: Slice, max_document: int, teaching: Teaching | None) -> TaughtScores | Tensor:
        index, targets_M = predicting(part.targets)
        hidden = self._decode(part.input_ids, part.position_ids, part.document_offsets, max_document).last_hidden_state
        hidden_MH = hidden.flatten(0, 1).index_select(0, index)
        if teaching is None:
            return hidden_MH
        return self.head.taught(self.logits, hidden_MH, targets_M, teaching)

    def logits(self, hidden_CH: Tensor) -> Tensor:
        """(C, V) fp32 logits of final hidden states, after the model's own transform."""
        output = self.hf.get_output_embeddings()
        if self._head_is_adapted:
            return self.head.transform(output(hidden_CH).float())
        return self.head.transform(linear_logits(hidden_CH, output.weight, getattr(output, "bias", None)))

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, document_offsets: Tensor | None = None, max_document: int = 0
    ) -> Tensor:
        """(B, T, H) final hidden states, after the last norm."""
        return self._decode(input_ids, position_ids, document_offsets, max_document).last_hidden_state

    @property
    def _watches_router(self) -> bool:
        watched = self.routing is not None and self.context is None
        return watched and self.training and torch.is_grad_enabled()

    def _decode(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        document_offsets: Tensor | None,
        max_document: int,
        keys: dict[str, Any] | None = None,
    ) -> Any:
        """The base model's output: ``last_hidden_state``; ``router_logits`` in training of a mixture of experts."""
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
            } | (keys or {})
        if self.context is not None:
            layout["context_parallel"] = self.context
        if self._watches_router:
            layout["output_router_logits"] = True
        if self.virtual is not None:
            return self._with_virtual_tokens(self.virtual, input_ids, position_ids, document_offsets, layout)
        with training_layout(), self._offload or nullcontext():
            return self.hf.base_model(input_ids=input_ids, position_ids=position_ids, use_cache=False, **layout)

    def _with_virtual_tokens(
        self, virtual: VirtualTokens, input_ids: Tensor, position_ids: Tensor, offsets: Tensor | None, layout: Any
    ) -> Any:
        """The base model's output, with the hidden states of the real tokens."""
        laid = virtual.layout(self.hf.get_input_embeddings(), input_ids, position_ids, offsets)
        if laid.offsets is not None:
            longest = layout["max_length_q"] + virtual.count
            layout = {"cu_seq_lens_q": laid.offsets, "cu_seq_lens_k": laid.offsets}
            layout |= {"max_length_q": longest, "max_length_k": longest}
        if laid.prefix is not None:
            layout = {**layout, "key_value_prefix": laid.prefix}
        with training_layout(), self._offload or nullcontext():
            outputs = self.hf.base_model(
                inputs_embeds=laid.embeddings, position_ids=laid.positions, use_cache=False, **layout
            )
        outputs.last_hidden_state = outputs.last_hidden_state.index_select(1, laid.real)
        return outputs

    def adapt(self, adapter: Adapter, base: dict[str, Any]) -> None:
        """Take an adapter that was put into ``hf``: from now on it alone is trained, saved and loaded.

        Args:
            base: what the weights under it are.
        """
        from llm_modules.zoo.virtual_tokens import VirtualTokens

        self.adapter, self.base = adapter, base
        if adapter.prompt_encoder is not None:
            self.virtual = VirtualTokens(adapter.prompt_encoder, adapter.config)
        head: Any = self.hf.get_output_embeddings()
        # Of a wrapped head `weight` is the base's, except where a copy of the whole module is trained.
        self._head_is_adapted = type(head) is not self._head_type and type(head).__name__ != "ModulesToSaveWrapper"
        self._description |= {"adapter": adapter.description, "base": base}
        trained = sum(p.numel() for p in adapter.parameters())
        self.flops = replace(self.flops, trained=min(1.0, trained / self._description["parameters"]))
        self.routing = routing_of(self.hf)
        keep_trained_only(self)

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Inside, the model is what it was before its adapter, if that leaves the base as it is (see ``keeps_base``).

        peft's own ``disable_adapter`` also changes what is trainable, which wrappers of the model rely on.
        """
        layers: list[Any] = [module for module in self.hf.modules() if hasattr(module, "_disable_adapters")]
        before = [layer._disable_adapters for layer in layers]
        virtual, self.virtual = self.virtual, None
        try:
            for layer in layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer, disabled in zip(layers, before, strict=True):
                layer._disable_adapters = disabled
            self.virtual = virtual

    def computable(self, batch: PreferenceBatch) -> PreferenceBatch:
        """The batch, each prompt once for each of its answers where this model cannot share it; said once.

        Raises:
            ValueError: it is no batch of pairs.
        """
        if not isinstance(batch, PreferenceBatch):
            raise ValueError("data: this model learns from pairs of answers; use llm_modules.data.PreferenceDataModule")
        if batch.shared_keys is None or (problem := self.sharing_problem) is None:
            return batch
        if not self._said_apart:
            logger.warning("data.share_prompts: each prompt is computed for both of its answers: %s", problem)
            self._said_apart = True
        return batch.apart()

    @property
    def sharing_problem(self) -> str | None:
        """Why documents cannot share what they begin with in this model, or None."""
        if self.virtual is not None:
            return "virtual tokens stand before each of them"
        if self.context is not None:
            return "context parallelism deals out the positions of whole documents"
        if self.hf.config._attn_implementation != NAME:
            return f"attention {self.hf.config._attn_implementation!r} has nothing for that"
        if self._sharing is None:
            from llm_modules.zoo.probe import sharing_problem

            self._sharing = self.packing_problem or sharing_problem(self.hf.config) or ""
        return self._sharing or None

    def split_positions(self, group: Any, tensor: int = 1) -> None:
        """From now on each rank of a process group computes a slice of the same rows (see ``ContextParallel``).

        Args:
            group: the process group.
            tensor: devices that share each matrix.

        Raises:
            ValueError: this model cannot be computed in slices.
        """
        context = ContextParallel(group)
        check_context_parallel(self, context.size, tensor)
        self.context = context

    @property
    def generation_model(self) -> Any:
        """What transformers' ``generate`` is called on: peft's model where there are virtual tokens."""
        return self.hf if self.adapter is None or self.virtual is None else self.adapter.peft_model

    def compile_blocks(self) -> None:
        """Compile each decoder block in place, and the head (on a GPU); names of parameters stay as they are.

        Raises:
            ValueError: the family has no decoder blocks that transformers marks as such.
        """
        blocks = self.blocks()
        if not blocks:
            raise ValueError(f"backbone.compile: {type(self.hf).__name__} has no decoder blocks; set it to false")
        for block in blocks:
            block.compile(dynamic=True)
        self.head.fused = True

    def offload_activations(self) -> None:
        """Keep what the decoder's backward pass needs in host memory."""
        self._offload = ActivationOffload(self.blocks())

    def blocks(self) -> list[nn.Module]:
        """The decoder blocks, in order."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        return [module for module in self.hf.modules() if isinstance(module, GradientCheckpointingLayer)]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CausalLM:
        """A change of dtype leaves fp32 buffers: rotary frequencies in bf16 would put tokens at wrong positions."""
        kept = {
            f"{owner}.{name}": buffer
            for owner, module in self.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            # peft's are factors of matrix products, in the dtype of the others.
            if buffer.dtype == torch.float32 and not type(module).__module__.startswith("peft.")
        }
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
        """FLOPs of training on a token of a document of so many tokens (see ``estimate.TokenFlops``)."""
        return self.flops.training(sequence_length)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write an ordinary Hugging Face folder (config, generation config, safetensors)."""
        self.hf.save_pretrained(folder)

    @property
    def base_name(self) -> str | None:
        """What the weights under an adapter are, in words."""
        if self.base is None or self.base["seed"] is None:
            return None if self.base is None else str(self.base["source"])
        return f"random weights of seed {self.base['seed']}"

    def save_adapter(self, folder: str | Path, place: str | Path | None = None) -> None:
        """Write a folder that peft opens, and ``base.json``, which says what base it is for.

        A base that is nowhere else (made from a seed, or with rows added for new tokens) is written into ``base/``.

        Args:
            folder: made if missing.
            place: where the folder will lie in the end, if it is renamed.
        """
        assert self.adapter is not None
        assert self.base is not None
        folder = Path(folder)
        source = self.base["source"] if self.base["as_it_is"] else str(Path(place or folder).absolute() / BASE_FOLDER)
        self.adapter.save(folder, source)
        (folder / BASE_FILE).write_text(json.dumps(self.base, indent=2) + "\n", encoding="utf-8")
