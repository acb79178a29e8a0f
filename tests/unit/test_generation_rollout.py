"""Answers sampled in groups: those that the Generator draws one by one, with the log-probabilities of training."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

from llm_modules.generation import Generator
from llm_modules.generation.rollout import GroupSampler
from llm_modules.generation.steps import BLOCK, FixedSteps, GrowingSteps, fixed_problem, read
from llm_modules.rollouts import Rollouts, policy_batch
from llm_modules.tokenizer import load_tokenizer
from llm_modules.zoo import Backbone

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "vocab_size": 264,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "mistral": {"sliding_window": None},
    "gemma2": {"sliding_window": 16, "attn_logit_softcapping": 20.0, "final_logit_softcapping": 1.0},
}
PROMPTS = ["hello", "a much longer prompt than the other two", "x y z"]


def built(family: str, **arguments: Any) -> tuple[Any, Any]:
    tokenizer = load_tokenizer("builtin:bytes")
    config = TINY | {"model_type": family} | FAMILIES.get(family, {})
    model = Backbone(config=config, **arguments).build(tokenizer=tokenizer, sequence_length=96, seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model, tokenizer


def sample(model: Any, tokenizer: Any, settings: Generator, size: int = 4) -> Any:
    with GroupSampler(settings, model, tokenizer) as sampler:
        ids = [sampler.encode(prompt, place)[0] for place, prompt in enumerate(PROMPTS)]
        return ids, sampler.sample(ids, [[size * i + j for j in range(size)] for i in range(len(PROMPTS))])


@pytest.mark.parametrize(
    ("family", "cache"),
    [*((family, "dynamic") for family in FAMILIES), ("llama", "static"), ("qwen3", "static"), ("mistral", "static")],
)
@pytest.mark.parametrize(
    "settings",
    [{}, {"top_p": 0.9, "repetition_penalty": 1.1, "temperature": 0.7}, {"stop": ["a"], "batch_size": 4}],
    ids=["plain", "warped", "stop"],
)
def test_a_group_is_what_the_generator_draws(family: str, cache: Any, settings: dict[str, Any]) -> None:
    model, tokenizer = built(family)
    generator = Generator(**{"strategy": "sample", "max_new_tokens": 40, "seed": 3, "batch_size": 12} | settings)
    _, groups = sample(model, tokenizer, replace(generator, cache=cache))
    ended = set()
    for place, (prompt, group) in enumerate(zip(PROMPTS, groups, strict=True)):
        rows = [4 * place + number for number in range(4)]
        for expected, found in zip(generator.generate(model, tokenizer, [prompt] * 4, rows), group, strict=True):
            assert found.token_ids == expected.token_ids
            assert found.text == expected.text
            assert found.finished == (expected.finish_reason == "stop")
            assert len(found.logprobs) == len(found.token_ids)
            ended.add(len(found.token_ids))
    assert len(ended) > 1  # rows left the batch before others


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("layout", ["shared", "packed", "padded"])
def test_log_probabilities_are_those_that_training_computes(family: str, temperature: float, layout: str) -> None:
    from llm_modules.logprobs import next_token_targets

    model, tokenizer = built(family)
    settings = Generator(strategy="sample", max_new_tokens=24, seed=1, batch_size=12, temperature=temperature)
    ids, groups = sample(model, tokenizer, settings)
    answers = [answer for group in groups for answer in group]
    rollouts = Rollouts(
        prompts=[torch.tensor(prompt) for prompt in ids],
        rows=torch.arange(3),
        prompt_of=torch.arange(3).repeat_interleave(4),
        answer_ids=torch.tensor([token for answer in answers for token in answer.token_ids]),
        offsets=torch.tensor([0, *(len(answer.token_ids) for answer in answers)]).cumsum(0),
        finished=torch.ones(12, dtype=torch.bool),
        rewards=torch.zeros(12, 1),
        reward=torch.zeros(12),
        sampled_logprobs=torch.tensor([value for answer in answers for value in answer.logprobs]),
    )
    model.head.transform = replace(model.head.transform, temperature=temperature)
    chosen = torch.tensor([0, 1, 3, 5, 6, 8, 9])
    batch = policy_batch(rollouts, chosen, layout, 96)
    scores = model(
        batch.input_ids, batch.position_ids, next_token_targets(batch.labels, batch.position_ids),
        batch.document_offsets, batch.max_document, lengths=batch.lengths,
        shared_keys=batch.shared_keys, key_offsets=batch.key_offsets,
    )  # fmt: skip
    assert batch.sampled_logprobs is not None
    torch.testing.assert_close(scores.logprobs, batch.sampled_logprobs, atol=2e-5, rtol=1e-5)
    assert batch.counts()["answers"] == 7
    assert batch.counts()["groups"] == 3
    assert batch.counts()["tokens"] == len(rollouts.tokens_of(chosen))
    if layout == "shared":
        prompts = sum(len(prompt) - 1 for prompt in ids)
        assert batch.input_ids.numel() == prompts + int(batch.counts()["tokens"]) + 7
    # The gradient through the temperature (and a soft-cap) is that of the plain logits.
    scores.logprobs.sum().backward()
    weight = model.hf.get_input_embeddings().weight
    found, weight.grad = weight.grad.clone(), None
    total = torch.zeros(())
    for number in chosen.tolist():
        prompt = ids[int(rollouts.prompt_of[number])]
        row = torch.tensor(prompt + answers[number].token_ids)
        logits = model.hf(row[None], use_cache=False).logits[0, len(prompt) - 1 : -1].float() / temperature
        total = total + logits.log_softmax(-1).gather(-1, row[len(prompt) :, None]).sum()
    total.backward()
    torch.testing.assert_close(found, weight.grad, atol=3e-4, rtol=1e-3)


def test_rows_of_no_answers_say_nothing() -> None:
    model, tokenizer = built("llama")
    with GroupSampler(Generator(strategy="sample", max_new_tokens=4), model, tokenizer) as sampler:
        assert sampler.sample([], []) == []


def test_beams_do_not_sample() -> None:
    model, tokenizer = built("llama")
    with pytest.raises(ValueError, match="strategy: beam finds"):
        GroupSampler(Generator(max_new_tokens=4, strategy="beam"), model, tokenizer)


@pytest.mark.parametrize(
    ("family", "attention", "said"),
    [
        ("gemma2", "packed", "does not keep the keys and values"),
        ("llama", "eager", "attention 'eager' takes other masks"),
    ],
)
def test_models_without_a_fixed_cache(family: str, attention: str, said: str) -> None:
    model, tokenizer = built(family, attention=attention)
    with pytest.raises(ValueError, match=f"cache: static: .*{said}.*use dynamic"):
        sample(model, tokenizer, Generator(strategy="sample", max_new_tokens=4, cache="static"))


def test_what_keeps_more_than_keys_and_values_is_refused() -> None:
    config = {name: value for name, value in TINY.items() if name != "head_dim"}
    config |= {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
    tokenizer = load_tokenizer("builtin:bytes")
    model = Backbone(config=config).build(tokenizer=tokenizer, sequence_length=96, seed=0)
    with pytest.raises(ValueError, match="Lfm2ForCausalLM keeps a state that is no cache of keys and values"):
        sample(model, tokenizer, Generator(strategy="sample", max_new_tokens=4))


def test_alibi_is_made_of_another_mask() -> None:
    from transformers import FalconConfig, FalconForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 264}
    for alibi in (True, False):
        config = FalconConfig(**sizes, alibi=alibi, attn_implementation="sdpa")
        found = fixed_problem(FalconForCausalLM(config))
        assert found == ("FalconForCausalLM makes its positions (alibi) of another mask" if alibi else None)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "packed"), ("llama", "eager"), ("gemma2", "packed"), ("gemma2", "eager")]
)
def test_a_growing_cache_is_as_transformers_own(family: str, attention: str, mixed: bool) -> None:
    """Over more positions than it grows by at once, with rows that leave on the way; in bf16 it holds no fp32."""
    model, _ = built(family, attention=attention)
    ids, mask, kept = torch.arange(4, 14).view(2, 5), torch.ones(2, 5, dtype=torch.int64), torch.tensor([0, 1, 3])
    mask[1, :2] = 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        steps = GrowingSteps(model.hf, read(model.hf, ids, mask)[0], mask, 2, 2 * BLOCK + 4)
        own, mask = read(model.hf, ids, mask)[0], mask.repeat_interleave(2, 0)
        own.batch_repeat_interleave(2)
        for step in range(2 * BLOCK + 4):
            if step in (3, BLOCK + 2):
                rows = kept[: len(mask) - 1]
                steps.keep(rows)
                own.batch_select_indices(rows)
                mask = mask[rows]
            token = torch.arange(len(mask)) + step
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            positions = mask.sum(-1, keepdim=True) - 1
            wanted = model.hf(
                token[:, None], attention_mask=mask, position_ids=positions, past_key_values=own, use_cache=True
            )
            found = steps(token)
            assert torch.equal(found, wanted.logits[:, -1]), step
    if attention == "packed":
        layers = [layer for layer in steps.cache.layers if not layer.is_sliding]
        assert layers
        assert {layer.keys.dtype for layer in layers} == {torch.bfloat16 if mixed else torch.float32}


def test_steps_are_gone_when_they_are_over() -> None:
    """Nothing waits for a collector of cycles with all keys and values."""
    model, _ = built("llama")
    ids = torch.arange(6)[None]
    with torch.no_grad():
        cache, _ = read(model.hf, ids, torch.ones_like(ids))
        steps = FixedSteps(model.hf, cache, torch.ones_like(ids), 2, 4)
        steps(torch.tensor([1, 2]))
    gone = weakref.ref(steps)
    gc.disable()
    try:
        del steps
        assert gone() is None
    finally:
        gc.enable()
