"""What a frozen model is: the base or a copy; a copy under autocast: smaller, and the same to the last bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from llm_modules.batch import IGNORE_INDEX
from llm_modules.tokenizer import load_tokenizer
from llm_modules.zoo import Backbone, CausalLM
from llm_modules.zoo.reference import needs_copy, place_frozen
from recipes.preview import frozen_bytes

CONFIG = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 264,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "gemma2": {"model_type": "gemma2", "head_dim": 16},
    "mixtral": {"model_type": "mixtral", "num_local_experts": 4},
}


def backbone(family: str) -> Backbone:
    return Backbone(config=CONFIG | FAMILIES[family])


def built(family: str) -> CausalLM:
    tokenizer = load_tokenizer("builtin:bytes")
    model: CausalLM = backbone(family).build(tokenizer=tokenizer, sequence_length=64, seed=0)
    return model.requires_grad_(False).eval()


def scores(model: CausalLM) -> torch.Tensor:
    ids = torch.arange(40)[None] * 5 % 250
    targets = torch.cat([ids[:, 1:], torch.full((1, 1), IGNORE_INDEX)], 1)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        logprobs: torch.Tensor = model(ids, torch.arange(40)[None], targets).logprobs
    return logprobs


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_sees_the_same(family: str) -> None:
    model = built(family)
    known, before = scores(model), sum(p.nbytes for p in model.parameters())
    mixed = SimpleNamespace(precision_plugin=MixedPrecision("bf16-mixed", "cpu"))
    place_frozen(model, mixed, torch.device("cpu"))
    assert torch.equal(scores(model), known)
    after = sum(p.nbytes for p in model.parameters())
    assert after < (0.96 if family == "mixtral" else 0.8) * before  # experts are no linear layers
    own = backbone(family)
    summary = own.summary(vocabulary=264, sequence_length=64, tokens=64, precision="bf16-mixed")
    assert (frozen_bytes(summary, own, True), frozen_bytes(summary, own, False)) == (after, before)
    place_frozen(model, mixed, torch.device("cpu"))  # again: nothing more
    assert torch.equal(scores(model), known)
    with pytest.raises(ValueError, match=r"precision: 32-true, but the frozen copy .* narrowed to torch\.bfloat16"):
        place_frozen(model, SimpleNamespace(precision_plugin=Precision()), torch.device("cpu"))


def test_a_copy_with_an_adapter_is_left() -> None:
    """Adapters of tied heads and DoRA read weights of the base by other ways."""
    tokenizer, own = load_tokenizer("builtin:bytes"), backbone("llama")
    own.adapter = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": "all-linear"}}
    model: CausalLM = own.build(tokenizer=tokenizer, sequence_length=64, seed=0)
    mixed = SimpleNamespace(precision_plugin=MixedPrecision("bf16-mixed", "cpu"))
    place_frozen(model, mixed, torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_without_autocast_nothing_is_narrowed() -> None:
    model = built("llama")
    place_frozen(model, SimpleNamespace(precision_plugin=Precision()), torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}


LORA: dict[str, Any] = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": "all-linear"}}


@pytest.mark.parametrize(
    ("adapter", "copied"),
    [
        (None, True),
        (LORA, False),
        ("LoraConfig", False),  # a class's name is no folder
        ({"class_path": "peft.LoraConfig", "init_args": {"bias": "all"}}, True),
        ({"class_path": "peft.LoraConfig", "init_args": {"init_lora_weights": "pissa"}}, True),
        ("trained", True),  # its base is not what it begins as
    ],
)
def test_what_is_compared_with(adapter: Any, copied: bool, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    pytest.importorskip("peft")
    if adapter == "trained":
        own = backbone("llama")
        own.adapter, adapter = LORA, str(tmp_path)
        own.build(tokenizer=load_tokenizer("builtin:bytes"), sequence_length=64, seed=0).save_adapter(tmp_path)
    assert needs_copy(adapter, "auto") == copied
    assert needs_copy(adapter, "copy")
    assert needs_copy(adapter, "cached")
    assert not recwarn.list
    if copied and adapter != str(tmp_path):
        with pytest.raises(ValueError, match=r"model\.reference: base, but .*; allowed: copy, auto"):
            needs_copy(adapter, "base")
    else:
        assert not needs_copy(adapter, "base")
        assert len(recwarn.list) == (adapter == str(tmp_path))
