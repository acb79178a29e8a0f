"""Log-likelihoods of many texts: transformers' own loss, whatever the batches; plain models and those of the zoo."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from llm_modules.evaluation.likelihood import continuation, encode, likeliest, token_logprobs
from llm_modules.generation import Generator
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone

TEXTS = [
    "a",
    "Bias is a lean to one side.",
    "",
    "short",
    "Ein längerer Satz, in dem auch ein Umlaut steht.",
    "ab",
    "abc",
]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "max_position_embeddings": 128},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    # A scale and a soft-cap of the logits, and keys and values of a window.
    "gemma2": {**SIZES, "head_dim": 8, "num_key_value_heads": 2, "final_logit_softcapping": 2.0, "sliding_window": 8},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 32,
    },
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def plain(kind: str) -> Any:
    torch.manual_seed(0)
    options = {"vocab_size": 260, "pad_token_id": 257, "bos_token_id": 256, "eos_token_id": 256}
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, **CONFIGS[kind], **options, initializer_range=0.3)
    )


def zoo(adapter: Any = None, **fields: Any) -> Any:
    backbone = Backbone(
        config={"model_type": "llama", **CONFIGS["llama"], "initializer_range": 0.3}, adapter=adapter, **fields
    )
    return backbone.build(tokenizer=byte_tokenizer(), sequence_length=64, seed=0)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("batch_tokens", [1, 80, 4096])
def test_sums_are_the_loss_of_transformers_times_its_tokens(kind, batch_tokens, tokenizer):
    model = plain(kind)
    rows = [encode(tokenizer, text) for text in TEXTS]
    scores = token_logprobs(model, rows, batch_tokens=batch_tokens)
    model.eval()
    for row, values in zip(rows, scores, strict=True):
        assert len(values) == len(row) - 1
        if len(values):
            ids = torch.tensor([row])
            loss = float(model(input_ids=ids, labels=ids).loss.detach())
            assert float(values.sum()) == pytest.approx(-loss * len(values), rel=1e-6, abs=1e-5)


@pytest.mark.parametrize("adapter", [None, "PromptTuningConfig", "LoraConfig"])
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_a_model_of_the_zoo(adapter, batch_tokens, tokenizer):
    if adapter is not None:
        pytest.importorskip("peft")
        adapter = {
            "class_path": f"peft.{adapter}",
            "init_args": {"num_virtual_tokens": 3} if adapter == "PromptTuningConfig" else {"init_lora_weights": False},
        }
    model = zoo(adapter)
    rows = [encode(tokenizer, text) for text in TEXTS]
    first = [max(1, len(row) - 3) for row in rows]
    ours = token_logprobs(model, rows, first, batch_tokens)
    theirs = token_logprobs(model.generation_model, rows, first, batch_tokens)
    for row, a, b, start in zip(rows, ours, theirs, first, strict=True):
        assert len(a) == len(row) - start
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_only_the_needed_places_are_scored_and_modes_are_kept(tokenizer):
    model = plain("gpt2").train()  # with dropout, which would change the numbers
    model.transformer.h[0].eval()
    rows = [encode(tokenizer, text) for text in TEXTS[:2]]
    asked = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: asked.append(output.shape[1]))
    whole = token_logprobs(model, rows)
    part = token_logprobs(model, rows, [1, 20])
    again = token_logprobs(model, rows[1:], 20)
    assert asked == [28, 28, 9]  # one of the first row's places is at 0
    assert part[1].tolist() == pytest.approx(whole[1][19:].tolist(), abs=1e-5)
    assert again[0].tolist() == pytest.approx(whole[1][19:].tolist(), abs=1e-5)
    assert model.training
    assert not model.transformer.h[0].training


@pytest.mark.parametrize("build", [lambda: plain("llama"), zoo])
def test_likeliest_is_what_greedy_decoding_says(build, tokenizer):
    model, prompts = build(), ["One", "Another prompt", "x"]
    said = Generator(max_new_tokens=5).generate(model, tokenizer, prompts)
    before = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    right = [ids + completion.token_ids for ids, completion in zip(before, said, strict=True)]
    wrong = [[*row[:-1], (row[-1] + 1) % 256] for row in right]
    first = [len(ids) for ids in before]
    assert likeliest(model, right, first) == [True] * 3
    assert likeliest(model, right, first, batch_tokens=1) == [True] * 3
    assert likeliest(model, wrong + right, first * 2) == [False] * 3 + [True] * 3


def test_a_continuation_begins_where_the_texts_part(tokenizer):
    ids, first = continuation(tokenizer, "Q: who?\nA:", " me")
    assert tokenizer.decode(ids[first:]) == " me"
    assert ids[0] == tokenizer.bos_token_id


def test_rows_that_the_model_cannot_take(tokenizer):
    rows = [encode(tokenizer, "a"), encode(tokenizer, "b" * 128)]
    with pytest.raises(ValueError, match=r"text 1: 129 tokens, but the model has 128 positions"):
        token_logprobs(plain("llama"), rows)
    with pytest.raises(
        ValueError, match=r"text 1: token id 260 is outside the model's vocabulary of 260; the tokenizer"
    ):
        token_logprobs(plain("llama"), [[1, 2], [1, 260]])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("build", [lambda: plain("llama"), zoo])
def test_a_model_that_diverged_has_no_numbers(build, value, tokenizer):
    model, rows = build(), [encode(tokenizer, "aa"), encode(tokenizer, "zz")]
    embedding = model.generation_model.get_input_embeddings() if hasattr(model, "hf") else model.get_input_embeddings()
    assert all(values.isfinite().all() for values in token_logprobs(model, rows))
    with torch.no_grad():
        embedding.weight[rows[1][1]] = value
    assert len(token_logprobs(model, rows[:1])) == len(likeliest(model, rows[:1], [1])) == 1
    with pytest.raises(ValueError, match=r"text 1: the model gives nan where a log-probability is needed"):
        token_logprobs(model, rows)
    with pytest.raises(ValueError, match=r"text 1: the model gives nan where a log-probability is needed"):
        likeliest(model, rows, [1, 2])


def test_a_tokenizer_without_a_beginning():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"tokenizer: it has no bos_token and no eos_token"):
        encode(tokenizer, "a")
