"""Loss and gradients of ours are those of transformers' own model given `labels`, padded and packed, for every head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_modules.batch import IGNORE_INDEX, TokenBatch
from llm_modules.language_model import LanguageModelModule
from llm_modules.zoo import Backbone

SMALL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **SMALL},
    "llama-tied": {"model_type": "llama", **SMALL, "tie_word_embeddings": True},
    "gpt2": {
        "model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    # A window shorter than the rows, and caps low enough to bend these scores and logits.
    "gemma2": {
        "model_type": "gemma2", **SMALL, "head_dim": 8, "sliding_window": 8, "attn_logit_softcapping": 0.5,
        "final_logit_softcapping": 0.5, "query_pre_attn_scalar": 8,
    },
    "qwen3": {"model_type": "qwen3", **SMALL, "head_dim": 8},
    "granite": {
        "model_type": "granite", **SMALL, "logits_scaling": 8.0, "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22, "attention_multiplier": 0.1,
    },
    "cohere": {"model_type": "cohere", **SMALL, "logit_scale": 0.0625, "tie_word_embeddings": True},
}  # fmt: skip
LENGTHS = [21, 5, 13, 30]


def documents(vocabulary: int) -> list[tuple[Tensor, Tensor]]:
    """(tokens, labels) of documents of unequal lengths, of which a first part is not trained."""
    generator = torch.Generator().manual_seed(7)
    found = []
    for i, length in enumerate(LENGTHS):
        ids = torch.randint(0, vocabulary, (length,), generator=generator)
        labels = ids.clone()
        labels[: length // (i + 2)] = IGNORE_INDEX
        found.append((ids, labels))
    return found


def padded(rows: list[tuple[Tensor, Tensor]], pad: int) -> TokenBatch:
    ids = nn.utils.rnn.pad_sequence([ids for ids, _ in rows], batch_first=True, padding_value=pad)
    labels = nn.utils.rnn.pad_sequence([labels for _, labels in rows], batch_first=True, padding_value=IGNORE_INDEX)
    return TokenBatch(ids, labels, torch.arange(ids.shape[1]).expand_as(ids))


def packed(rows: list[tuple[Tensor, Tensor]]) -> TokenBatch:
    lengths = torch.tensor([0] + [len(ids) for ids, _ in rows])
    return TokenBatch(
        torch.cat([ids for ids, _ in rows])[None],
        torch.cat([labels for _, labels in rows])[None],
        torch.cat([torch.arange(len(ids)) for ids, _ in rows])[None],
        document_offsets=lengths.cumsum(0).to(torch.int32),
        max_document=64,
    )


def module(config: dict[str, Any], **arguments: Any) -> LanguageModelModule:
    made = LanguageModelModule(Backbone(config=config, **arguments), sequence_length=64, seed=5)
    made.configure_model()
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in made.parameters():  # norms of exactly 1 and biases of exactly 0 would hide mistakes
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


def ours(made: LanguageModelModule, batch: TokenBatch) -> tuple[float, dict[str, Tensor]]:
    assert made.model is not None
    made.zero_grad()
    loss = made.objective_step(batch).terms["loss"].sum / batch.counts()["tokens"]
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in made.model.hf.named_parameters() if p.grad is not None}


def transformers_own(
    made: LanguageModelModule, rows: list[tuple[Tensor, Tensor]], pad: int
) -> tuple[float, dict[str, Tensor]]:
    """The same weights in a model that transformers builds, with its own attention, loss and right padding."""
    from transformers import AutoModelForCausalLM

    assert made.model is not None
    model = AutoModelForCausalLM.from_config(made.model.hf.config, attn_implementation="eager")
    model.load_state_dict(made.model.hf.state_dict())
    batch = padded(rows, pad)
    mask = torch.arange(batch.input_ids.shape[1])[None] < torch.tensor([len(ids) for ids, _ in rows])[:, None]
    loss = model(input_ids=batch.input_ids, attention_mask=mask.long(), labels=batch.labels).loss
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("name", CONFIGS)
def test_loss_and_gradient_equal_those_of_transformers(name: str, layout: str) -> None:
    made = module(CONFIGS[name])
    pad = made.tokenizer.pad_token_id
    rows = documents(len(made.tokenizer))
    loss, gradients = ours(made, padded(rows, pad) if layout == "padded" else packed(rows))
    expected_loss, expected = transformers_own(made, rows, pad)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    assert gradients.keys() == expected.keys()
    whole = torch.cat([g.flatten() for g in expected.values()])
    difference = torch.cat([(gradients[key] - expected[key]).flatten() for key in expected])
    assert difference.norm() <= 1e-5 * whole.norm()
    for key, gradient in expected.items():
        # Where the true gradient is nothing (a key's bias, say) there is only rounding, held to the whole's size.
        allowed = 1e-4 * gradient.norm() + 1e-7 * whole.norm()
        assert (gradients[key] - gradient).norm() <= allowed, key


def test_a_wrong_head_would_be_seen() -> None:
    """The oracle is no mirror: a scale that our head forgets moves the loss by far more than the tolerance."""
    made = module(CONFIGS["granite"])
    rows = documents(len(made.tokenizer))
    expected, _ = transformers_own(made, rows, made.tokenizer.pad_token_id)
    assert made.model is not None
    made.model.head.transform = type(made.model.head.transform)()
    loss, _ = ours(made, packed(rows))
    assert abs(loss - expected) > 1e-2 * expected


def test_pretrained_weights_are_trained_in_training_mode(tmp_path: Any) -> None:
    """from_pretrained returns a model in evaluation mode, in which dropout is off."""
    made = module(CONFIGS["gpt2"] | {"resid_pdrop": 0.1})
    made.export(tmp_path)
    reloaded = LanguageModelModule(Backbone(source=str(tmp_path)), sequence_length=64)
    reloaded.configure_model()
    assert all(part.training for part in reloaded.model.modules())  # type: ignore[union-attr]
