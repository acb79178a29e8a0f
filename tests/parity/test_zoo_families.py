"""Every family that the zoo vouches for, against transformers' own eager attention, logits, loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_modules.logprobs import next_token_targets
from llm_modules.zoo.attention import register
from llm_modules.zoo.causal_lm import CausalLM
from llm_modules.zoo.probe import PROVED, check_head, packing_problem

transformers = pytest.importorskip("transformers")

LENGTHS = (5, 30, 1, 64)
"""Of the documents: longer than the window of 8, shorter, and a single token."""

COMMON: dict[str, Any] = {
    "vocab_size": 160,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXED = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}
GPT2 = {"vocab_size": 160, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "attn_pdrop": 0.0}
FAMILIES: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.1},
    "cohere2": {"logit_scale": 0.1, **MIXED},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, **MIXED, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 0.5},
    "gemma3_text": {"head_dim": 8, **MIXED, "final_logit_softcapping": 0.5},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "bos_token_id": 1, "eos_token_id": 2},
    "granite": {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3},
    "llama": {},
    "mistral": {"sliding_window": 8},
    "mixtral": {"num_local_experts": 4},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "phi": {},
    "phi3": {},
    "qwen2": {"use_sliding_window": True, **MIXED},
    "qwen3": {"head_dim": 8, "use_sliding_window": True, **MIXED},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {"sliding_window": 8},
}


def config_of(family: str) -> Any:
    values = {**(GPT2 if family == "gpt2" else COMMON), **FAMILIES[family]}
    return transformers.AutoConfig.for_model(family, **values)


def pair(family: str, attention: str = "packed") -> tuple[CausalLM, Any]:
    """Ours, and transformers' with eager attention and the same lively weights."""
    register()
    torch.manual_seed(0)
    load = transformers.AutoModelForCausalLM.from_config
    ours = load(config_of(family), attn_implementation=attention, dtype=torch.float32)
    for parameter in ours.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.1)
    theirs = load(config_of(family), attn_implementation="eager", dtype=torch.float32)
    theirs.load_state_dict(ours.state_dict())
    return CausalLM(ours, head_chunk=32).train(), theirs.train()


def packed() -> tuple[list[Tensor], Tensor, Tensor, Tensor]:
    """Documents, and the packed row: ids, positions, offsets."""
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, 160, (n,), generator=generator) for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    return documents, torch.cat(documents)[None], positions, offsets


def padded(documents: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Rows padded on the right: ids, positions, labels."""
    longest = max(LENGTHS)
    ids, labels = torch.zeros(len(documents), longest, dtype=torch.long), None
    labels = torch.full_like(ids, -100)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = labels[row, : len(document)] = document
    return ids, torch.arange(longest).expand(len(documents), longest), labels


def test_every_family_that_is_vouched_for_is_tested() -> None:
    assert set(FAMILIES) == PROVED


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_and_padded_logits_equal_each_document_alone(family: str) -> None:
    ours, theirs = pair(family)
    documents, ids, positions, offsets = packed()
    with torch.no_grad():
        alone = [theirs(d[None], use_cache=False).logits[0] for d in documents]
        hidden = ours.hidden_states(ids, positions, offsets, max(LENGTHS))
        in_row = logits_of(ours, hidden)[0].split(LENGTHS)
        rows = logits_of(ours, ours.hidden_states(*padded(documents)[:2]))
    for row, (one, other) in enumerate(zip(alone, in_row, strict=True)):
        scale = one.abs().max()
        torch.testing.assert_close(other, one, rtol=0, atol=1e-5 * scale)
        torch.testing.assert_close(rows[row, : len(one)], one, rtol=0, atol=1e-5 * scale)


def logits_of(model: CausalLM, hidden: Tensor) -> Tensor:
    output = model.hf.get_output_embeddings()
    return model.head.transform(nn.functional.linear(hidden, output.weight, getattr(output, "bias", None)))


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_equal_transformers_own(family: str) -> None:
    ours, theirs = pair(family)
    documents, ids, positions, offsets = packed()
    count = sum(n - 1 for n in LENGTHS)
    loss = sum(
        theirs(d[None], labels=d[None], use_cache=False, num_items_in_batch=count).loss for d in documents if len(d) > 1
    )
    loss.backward()
    expected = {name: p.grad for name, p in theirs.named_parameters()}
    padded_ids, padded_positions, labels = padded(documents)
    layouts: list[tuple[Any, ...]] = [
        (ids, positions, next_token_targets(ids, positions), offsets, max(LENGTHS)),
        (padded_ids, padded_positions, next_token_targets(labels, padded_positions)),
    ]
    for layout in layouts:
        ours.zero_grad()
        mean = -ours(*layout, uniform=True).logprobs.sum() / count
        mean.backward()
        torch.testing.assert_close(mean, loss, rtol=1e-5, atol=0)
        assert_gradients_equal({name: p.grad for name, p in ours.hf.named_parameters()}, expected)


def assert_gradients_equal(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """1e-5 over the whole gradient, 1e-4 for each parameter that has one to speak of."""
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    difference = torch.cat([(got[name] - g).flatten() for name, g in expected.items()]).norm()
    assert difference <= 1e-5 * whole
    for name, gradient in expected.items():
        assert (got[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7 * whole, name


@pytest.mark.parametrize("family", FAMILIES)
def test_our_head_computes_the_models_own_logits(family: str) -> None:
    ours, _ = pair(family)
    check_head(ours)
    ours.head.transform = type(ours.head.transform)(scale=ours.head.transform.scale * 1.1)
    with pytest.raises(ValueError, match="does something to its logits"):
        check_head(ours)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "qwen3"])
def test_transformers_own_attention_keeps_packed_documents_apart_too(family: str, attention: str) -> None:
    ours, theirs = pair(family, attention)
    documents, ids, positions, offsets = packed()
    with torch.no_grad():
        alone = torch.cat([theirs.base_model(d[None], use_cache=False).last_hidden_state for d in documents], 1)
        in_row = ours.hidden_states(ids, positions, offsets, max(LENGTHS))
    torch.testing.assert_close(in_row, alone, rtol=0, atol=1e-5 * alone.abs().max())


@pytest.mark.parametrize(
    ("family", "changes", "problem"),
    [
        ("glm4", {"head_dim": 8}, None),
        ("stablelm", {}, "let documents of one row see each other"),
        ("nemotron", {}, "let documents of one row see each other"),
    ],
)
def test_other_families_are_tried(family: str, changes: dict[str, Any], problem: str | None) -> None:
    config = transformers.AutoConfig.for_model(family, **COMMON, **changes)
    found = packing_problem(config, "packed")
    assert found == problem or (problem is not None and problem in str(found))


def test_attention_that_is_not_the_families_own_is_refused() -> None:
    values = {"vocab_size": 160, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    config = transformers.AutoConfig.for_model("bloom", **values)
    with pytest.raises(ValueError, match="'packed' does not compute what 'bloom' does; set attention: eager"):
        packing_problem(config, "packed")


def test_a_family_that_mixes_documents_refuses_packed_rows() -> None:
    config = transformers.AutoConfig.for_model("stablelm", **COMMON)
    register()
    hf = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="packed")
    model = CausalLM(hf, packing_problem=packing_problem(config, "packed"))
    _, ids, positions, offsets = packed()
    with pytest.raises(ValueError, match=r"packing: not for 'stablelm' .* set packing: none"):
        model.hidden_states(ids, positions, offsets, max(LENGTHS))
