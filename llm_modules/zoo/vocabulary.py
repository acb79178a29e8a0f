"""A model's vocabulary is made to fit the tokenizer: embedding rows, and the special tokens' ids in the configs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from llm_modules.zoo.configuration import rounded_vocabulary

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)


def set_special_ids(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer's special ids, in the model's config.

    An embedding gives its padding token no gradient, so a padding token that is also the end of text or the beginning
    would never be learnt: then the config gets none. (Labels hide padding by position.)
    """
    text = config.get_text_config()
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is not None:
            setattr(text, name, getattr(tokenizer, name))
    shared = tokenizer.pad_token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    text.pad_token_id = None if shared else tokenizer.pad_token_id


def set_generation_ids(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The tokenizer's special ids, in the generation config; other ends that the model has (end of turn) stay."""
    generation: Any = hf.generation_config
    ends = generation.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    ends = [end for end in ends if end < len(tokenizer)]
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in ends:
        ends.insert(0, tokenizer.eos_token_id)
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    generation.pad_token_id = tokenizer.pad_token_id
    if tokenizer.bos_token_id is not None:
        generation.bos_token_id = tokenizer.bos_token_id


def grow_embeddings(hf: PreTrainedModel, tokens: int) -> None:
    """Enough rows for ``tokens`` ids; new ones start at the mean of the old ones (Hewitt, 2021). Said in one line."""
    old = len(hf.get_input_embeddings().weight)  # type: ignore[arg-type]
    if tokens <= old:
        return
    new = rounded_vocabulary(tokens)
    hf.resize_token_embeddings(new, mean_resizing=False)
    rows = {
        id(parameter): parameter  # tied ones once
        for module in (hf.get_input_embeddings(), hf.get_output_embeddings())
        for parameter in module.parameters(recurse=False)
    }
    with torch.no_grad():
        for parameter in rows.values():
            parameter[old:] = parameter[:old].float().mean(0).to(parameter.dtype)
    logger.warning("backbone: %d embedding rows for %d tokens grew to %d, new ones at the mean", old, tokens, new)


def unlock_padding(hf: PreTrainedModel) -> None:
    """An embedding whose padding row is a real token's learns that row too (see ``set_special_ids``)."""
    embeddings = hf.get_input_embeddings()
    if getattr(embeddings, "padding_idx", None) is not None and hf.config.get_text_config().pad_token_id is None:
        embeddings.padding_idx = None  # type: ignore[assignment]
