"""From a name to a model: what ``backbone:`` in a recipe says."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from llm_modules.logprobs import DEFAULT_CHUNK
from llm_modules.zoo.activations import Checkpointing, check_checkpointing, checkpoint_activations
from llm_modules.zoo.attention import NAME
from llm_modules.zoo.causal_lm import CausalLM
from llm_modules.zoo.configuration import (
    attention_dropout,
    check_sizes,
    check_weights,
    config_of_preset,
    config_of_source,
    local_folder,
    nearest,
    with_room,
)
from llm_modules.zoo.float8 import Float8, check_float8, use_float8
from llm_modules.zoo.head import HeadKind, check_head_kind
from llm_modules.zoo.quantization import Quantization, check_quantization
from llm_modules.zoo.routing import check_routing

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llm_modules.zoo.estimate import ModelSummary

Dtype = Literal["float32", "bfloat16", "float16", "float64"]

TRUE_PRECISION = {"bf16-true": "bfloat16", "16-true": "float16", "64-true": "float64"}


@dataclass
class Backbone:
    """A causal language model of transformers: where it comes from and how it is built.

    Args:
        source: local Hugging Face folder or hub id (``org/name``) that gives the config and the weights; leave out
            for a preset that ``config`` describes.
        config: a transformers config with its ``model_type`` (a preset); with ``source``: overrides of the source's
            config. Without ``vocab_size``, a preset's is the tokenizer's size, rounded up to a multiple of 64.
        init: ``pretrained`` reads the source's weights, ``random`` makes them from the seed. Default: pretrained where
            there is a source.
        dtype: of the weights. Default: float32, or what a ``*-true`` precision of the trainer says.
        attention: ``packed`` (ours: packed documents are kept apart, without masks), ``sdpa``, ``eager``,
            ``flash_attention_2``, ... as transformers names them.
        activation_checkpointing: keep only each decoder block's input and compute the block again in the backward pass:
            less memory, about a third more time; a number n: only every n-th block; ``selective``: keep the outputs of
            matrix products and attention too: less saved, hardly more time.
        activation_offload: keep what the backward pass needs in host memory, for GPUs (on a CPU it only costs).
        compile: compile each decoder block (on a GPU the head as well) with torch.compile: about a minute at the start,
            then faster.
        head: ``chunked`` scores the trained tokens without ever holding all the logits; ``plain`` holds them (for
            comparison); ``liger`` uses liger-kernel (CUDA).
        head_chunk: tokens that the chunked head scores at once.
        lean: norms and gated MLPs keep less for the backward pass (on a CPU, not compiled); the same numbers.
        adapter: what is trained instead of the model: ``class_path`` and ``init_args`` of a config of peft
            (peft.LoraConfig, ...) or of ``llm_modules.zoo.bottleneck.BottleneckConfig``, or the folder of a trained
            adapter to go on with.
        quantization: the frozen base in 4 or 8 bits (bitsandbytes); to train, it takes an adapter.
        fp8: matrix products of the blocks' linear layers in fp8 (torchao; Hopper GPUs or later), weights and optimizer
            in fp32; ``emulated``: the same rounding on any device, slowly.
        trust_remote_code: run Python code that the source brings.
    """

    source: str | None = None
    config: dict[str, Any] | None = None
    init: Literal["pretrained", "random"] | None = None
    dtype: Dtype | None = None
    attention: str = NAME
    activation_checkpointing: Checkpointing = False
    activation_offload: bool = False
    compile: bool = False
    head: HeadKind = "chunked"
    head_chunk: int = DEFAULT_CHUNK
    lean: bool = True
    adapter: dict[str, Any] | str | None = None
    quantization: Quantization | None = None
    fp8: Float8 = False
    trust_remote_code: bool = False

    @property
    def pretrained(self) -> bool:
        return self.init == "pretrained" or (self.init is None and self.source is not None)

    def model_config(self, *, vocabulary: int) -> PretrainedConfig:
        """The transformers config for a tokenizer of ``vocabulary`` tokens.

        Raises:
            ValueError: see ``configuration``.
        """
        if self.source is None:
            if not self.config:
                raise ValueError(
                    "backbone: neither source nor config; name a folder or hub id (source), or a preset of "
                    "configs/models (backbone: ../models/llama-1m.yaml)"
                )
            return config_of_preset(self.config, vocabulary)
        return config_of_source(self.source, self.config or {}, self.trust_remote_code)

    def check(self, *, vocabulary: int, sequence_length: int, precision: str = "32-true") -> PretrainedConfig:
        """Find every mistake that can be found without weights.

        Args:
            vocabulary: number of the tokenizer's tokens.
            sequence_length: longest row in tokens.
            precision: the trainer's.

        Returns:
            The checked config.

        Raises:
            ValueError: one line with every problem.
        """
        self._check_choices(precision)
        config = self.model_config(vocabulary=vocabulary)
        problems = check_sizes(
            config,
            vocabulary=vocabulary,
            sequence_length=sequence_length,
            resizable=self.source is not None,
        )
        problems += check_routing(config)
        dropout = attention_dropout(config)
        if self.attention == NAME and dropout:
            problems.append(
                f"backbone.config.{dropout}: {getattr(config.get_text_config(), dropout)}, but attention {NAME!r} has "
                "no dropout; set it to 0.0"
            )
        if self.adapter is not None or self.quantization is not None:
            from llm_modules.zoo.adapted import check_adapted

            problems += check_adapted(self, config, vocabulary, sequence_length, precision)
        if self.pretrained and self.source is not None:
            check_weights(self.source)
        if problems:
            raise ValueError("; ".join(problems))
        return config

    def build(
        self,
        *,
        tokenizer: PreTrainedTokenizerBase,
        sequence_length: int,
        seed: int,
        precision: str = "32-true",
        dequantize: bool = False,
        scalar: bool = False,
    ) -> CausalLM:
        """The model, on the CPU; weights depend on ``seed`` (or the source) only, and no random state is touched.

        Args:
            tokenizer: decides the vocabulary's size and the special tokens.
            sequence_length: longest row in tokens.
            seed: of random weights.
            precision: the trainer's; decides the dtype if ``dtype`` does not.
            dequantize: ordinary layers with the values of the quantized ones, to merge an adapter into.
            scalar: with a head of one number in the place of the vocabulary's: a ``RewardModel``.

        Raises:
            ValueError: what ``check`` finds, weights that cannot be loaded, a family that our head does not know.
        """
        from llm_modules.zoo.attention import register
        from llm_modules.zoo.lean import make_lean
        from llm_modules.zoo.probe import packing_problem
        from llm_modules.zoo.vocabulary import set_generation_ids, set_special_ids, unlock_padding
        from llm_modules.zoo.weights import fixed_seed

        register()
        config = self.check(vocabulary=len(tokenizer), sequence_length=sequence_length, precision=precision)
        set_special_ids(config, tokenizer)
        dtype = getattr(torch, self.dtype or TRUE_PRECISION.get(precision, "float32"))
        with fixed_seed(seed):
            problem = packing_problem(config, self.attention)
            hf = self._weights(config, len(tokenizer), dtype, seed, scalar)
            unlock_padding(hf)
            set_generation_ids(hf, tokenizer)
            base = None
            if self.adapter is not None or self.quantization is not None:
                from llm_modules.zoo.adapted import adapt, base_of

                base = base_of(self, hf, seed=seed)  # before a scalar head, which is trained
            model = self._with_score(hf, config, problem) if scalar else self._with_head(hf, problem)
        if self.lean and not self.compile:
            make_lean(hf)
        if self.fp8:
            use_float8(model, emulated=self.fp8 == "emulated")
        if base is not None:
            adapt(self, model, base, seed=seed, precision=precision, dequantize=dequantize)
        if self.activation_checkpointing:
            checkpoint_activations(hf, self.activation_checkpointing)
        if self.activation_offload:
            model.offload_activations()
        if self.compile:
            model.compile_blocks()
        # from_pretrained gives a model in evaluation mode, which would train without dropout.
        return model.train()

    def final_config(self, *, vocabulary: int, sequence_length: int, precision: str = "32-true") -> PretrainedConfig:
        """The checked config with the vocabulary that the built model will have. Arguments and errors: ``check``."""
        config = self.check(vocabulary=vocabulary, sequence_length=sequence_length, precision=precision)
        return with_room(config, vocabulary)

    def check_packing(self, config: PretrainedConfig) -> None:
        """Raises ValueError where documents of one packed row would see each other."""
        from llm_modules.zoo.attention import register
        from llm_modules.zoo.probe import packing_problem

        register()
        if problem := packing_problem(config, self.attention):
            raise ValueError(
                f"data.packing: not for {config.model_type!r} with attention {self.attention!r}: {problem}; set "
                "packing: none"
            )

    def summary(
        self,
        *,
        vocabulary: int,
        sequence_length: int,
        tokens: int,
        precision: str = "32-true",
        optimizer: Callable[[Iterable[Any]], Optimizer] | None = None,
        trained_share: float = 1.0,
        accumulate: int = 1,
        device: str = "cpu",
        scalar: bool = False,
    ) -> ModelSummary:
        """Parameters, FLOPs and peak memory of training, without making a weight.

        Args:
            vocabulary: number of the tokenizer's tokens.
            sequence_length: longest row in tokens.
            tokens: positions of a micro-batch of one device, padding included.
            precision: the trainer's.
            optimizer: makes the optimizer of parameters; None: AdamW.
            trained_share: share of the positions whose next token is trained.
            accumulate: micro-batches in an optimizer step.
            device: ``cpu`` or ``cuda``.
            scalar: as of ``build``.

        Raises:
            ValueError: what ``check`` finds.
        """
        from llm_modules.zoo.adapted import memory_of_base
        from llm_modules.zoo.memory import peak_memory

        config = self.final_config(vocabulary=vocabulary, sequence_length=sequence_length, precision=precision)
        summary = self._sizes(config, sequence_length, scalar)
        trained = summary.trained
        memory = peak_memory(
            config,
            parameters=summary.parameters,
            trainable=trained,
            weights=None if trained is None else memory_of_base(self, config, summary.parameters, trained, precision),
            tokens=tokens,
            precision=precision,
            optimizer=optimizer,
            trained_share=0.0 if scalar else trained_share,
            activation_checkpointing=self.activation_checkpointing,
            activation_offload=self.activation_offload,
            attention=self.attention,
            head=self.head,
            head_chunk=self.head_chunk,
            accumulate=accumulate,
            lean=self.lean,
            device=device,
        )
        return replace(summary, memory=memory)

    def _sizes(self, config: PretrainedConfig, sequence_length: int, scalar: bool) -> ModelSummary:
        from llm_modules.zoo.adapted import adapted_sizes
        from llm_modules.zoo.estimate import summarize

        summary = summarize(config, sequence_length=sequence_length)
        parameters, trained = summary.parameters, summary.trained
        if self.adapter is not None or self.quantization is not None:
            parameters, trained = adapted_sizes(self, config)
        if scalar:
            rows = summary.vocabulary * summary.hidden
            parameters += summary.hidden - (summary.embedding - rows)  # which is none where the head is tied
            trained = None if trained is None else trained + summary.hidden * (self.adapter is not None)
            summary = replace(summary, embedding=rows)
        if trained is not None:
            summary = replace(summary, flops=replace(summary.flops, trained=min(1.0, trained / summary.parameters)))
        return replace(summary, parameters=parameters, trained=trained)

    def _with_head(self, hf: PreTrainedModel, problem: str | None) -> CausalLM:
        from llm_modules.zoo.probe import check_head

        model = CausalLM(hf, head=self.head, head_chunk=self.head_chunk, packing_problem=problem)
        check_head(model)
        return model

    def _with_score(self, hf: PreTrainedModel, config: PretrainedConfig, problem: str | None) -> CausalLM:
        from llm_modules.zoo.reward_model import RewardModel, is_classifier, stored_score

        score = (
            stored_score(self.source) if self.source is not None and self.pretrained and is_classifier(config) else None
        )
        return RewardModel(hf, score, packing_problem=problem)

    def _weights(
        self, config: PretrainedConfig, tokens: int, dtype: torch.dtype, seed: int, headless: bool
    ) -> PreTrainedModel:
        from llm_modules.zoo.reward_model import check_family
        from llm_modules.zoo.vocabulary import grow_embeddings
        from llm_modules.zoo.weights import pretrained_model, random_model

        if headless:
            check_family(config)
        if self.pretrained:
            assert self.source is not None
            hf = pretrained_model(
                str(local_folder(self.source) or self.source),
                config,
                dtype=dtype,
                attention=self.attention,
                seed=seed,
                trust_remote_code=self.trust_remote_code,
                headless=headless,
            )
        else:
            hf = random_model(
                with_room(config, tokens),
                attention=self.attention,
                seed=seed,
                trust_remote_code=self.trust_remote_code,
                dtype=dtype,
            )
        grow_embeddings(hf, tokens)
        return hf

    def _check_choices(self, precision: str) -> None:
        from transformers import AttentionInterface

        from llm_modules.zoo.attention import register

        register()
        if self.init not in (None, "pretrained", "random"):
            raise ValueError(f"backbone.init: unknown value {self.init!r}; allowed: pretrained, random")
        if self.init == "pretrained" and self.source is None:
            raise ValueError(
                "backbone.init: pretrained, but there is no source to read weights from; set backbone.source"
            )
        if self.dtype is not None and self.dtype not in get_args(Dtype):
            raise ValueError(
                f"backbone.dtype: unknown value {self.dtype!r}{nearest(self.dtype, list(get_args(Dtype)))}"
            )
        wanted = TRUE_PRECISION.get(precision)  # 32-true is what a trainer says by default, and casts nothing
        if self.dtype is not None and wanted is not None and self.dtype != wanted:
            raise ValueError(
                f"backbone.dtype: {self.dtype}, but trainer.precision {precision} means {wanted}; leave one out"
            )
        kinds = ["eager", *AttentionInterface().valid_keys()]
        if self.attention not in kinds:
            raise ValueError(f"backbone.attention: unknown value {self.attention!r}{nearest(self.attention, kinds)}")
        check_head_kind(self.head, self.head_chunk)
        check_checkpointing(self.activation_checkpointing, self.compile)
        if self.quantization is not None:
            check_quantization(self.quantization)
        check_float8(self.fp8, frozen=self.adapter is not None or self.quantization is not None)
