"""From a name to a model: what ``backbone:`` in a recipe says."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from llm_modules.logprobs import DEFAULT_CHUNK
from llm_modules.zoo.causal_lm import CausalLM
from llm_modules.zoo.head import HeadKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Backbone:
    """A causal language model of transformers and how it is built."""

    source: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    init: Literal["pretrained", "random"] | None = None
    dtype: str | None = None
    attention: str = "packed"
    activation_checkpointing: bool = False
    compile: bool = False
    head: HeadKind = "chunked"
    head_chunk: int = DEFAULT_CHUNK
    trust_remote_code: bool = False

    def check(self, *, vocabulary: int, sequence_length: int) -> None:
        """Raise a one-line ValueError for what cannot work, before weights load."""

    def build(
        self, *, tokenizer: PreTrainedTokenizerBase, sequence_length: int, seed: int, precision: str = "32-true"
    ) -> CausalLM:
        """The model, on the CPU, with weights that depend on ``seed`` only."""
        from transformers import AutoConfig, AutoModelForCausalLM

        from llm_modules.zoo.attention import register

        register()
        values = dict(self.config)
        values.setdefault("vocab_size", -(-len(tokenizer) // 64) * 64)
        values |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
        config = AutoConfig.for_model(values.pop("model_type"), **values)
        state = torch.get_rng_state()
        try:
            torch.default_generator.manual_seed(seed)
            with torch.device("cpu"):
                hf = AutoModelForCausalLM.from_config(config, attn_implementation=self.attention, dtype=torch.float32)
        finally:
            torch.set_rng_state(state)
        return CausalLM(hf, head=self.head, head_chunk=self.head_chunk)
