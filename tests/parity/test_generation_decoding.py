"""Decoding against transformers' own ``generate`` of one unpadded prompt at a time, in fp32."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, RepetitionPenaltyLogitsProcessor

from llm_modules.generation import Generator
from llm_modules.generation.processors import RepetitionPenalty
from llm_modules.tokenizer import byte_tokenizer

PROMPTS = ["a", "The capital of France is", "", "def f(x):\n    return", "zz zz zz", "One, two, three, four, five, six"]
MODELS = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
    ),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=260, n_embd=32, n_layer=2, n_head=4, n_positions=128)),
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module", params=list(MODELS))
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]()
    with torch.no_grad():  # far from uniform, so that greedy text is not one repeated token and no score is a tie
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
    return model.eval()


def alone(model, tokenizer, prompt, **options):
    """transformers' answer to one prompt, cut after the first end token."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id]])
    end = options.pop("eos_token_id", tokenizer.eos_token_id)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), eos_token_id=end, pad_token_id=tokenizer.pad_token_id, **options
    )[0, ids.shape[1] :].tolist()
    return out[: out.index(end) + 1] if end in out else out


def test_greedy_of_a_padded_batch_is_that_of_each_prompt_alone(model, tokenizer):
    generator = Generator(max_new_tokens=24, batch_size=4)
    got = generator.generate(model, tokenizer, PROMPTS)
    for completion, prompt in zip(got, PROMPTS, strict=True):
        assert completion.token_ids == alone(model, tokenizer, prompt, do_sample=False, max_new_tokens=24)
    assert len({tuple(c.token_ids) for c in got}) == len(PROMPTS)


@pytest.mark.parametrize("family", ["llama", "gemma2", "mistral", "qwen3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_backbone_with_packed_attention_generates_as_transformers_alone(family, cache, tokenizer):
    """Left padding, caches, soft-caps and sliding windows go through the attention that training uses."""
    from llm_modules.zoo import Backbone

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    preset = {"model_type": family, **sizes, "num_key_value_heads": 2, "max_position_embeddings": 128}
    preset |= {"head_dim": 8} | ({"sliding_window": 16} if family in ("gemma2", "mistral") else {})
    model = Backbone(config=preset).build(tokenizer=tokenizer, sequence_length=128, seed=1)
    assert model.hf.config._attn_implementation == "packed"
    with torch.no_grad():
        for parameter in model.hf.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    generator = Generator(max_new_tokens=24, batch_size=4, cache=cache)
    got = generator.generate(model, tokenizer, PROMPTS)
    model.hf.set_attn_implementation("eager")
    model.hf.eval()
    expected = [alone(model.hf, tokenizer, prompt, do_sample=False, max_new_tokens=24) for prompt in PROMPTS]
    assert [completion.token_ids for completion in got] == expected
    assert len(set(map(tuple, expected))) > 3


def test_blocks_compiled_for_training_are_not_compiled_for_generation(tokenizer):
    """Each length and cache would be one more compilation, and the limit of these is shared with training."""
    from torch._dynamo.utils import counters

    from llm_modules.zoo import Backbone

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    backbone = Backbone(config={"model_type": "llama", **sizes}, compile=True)
    model = backbone.build(tokenizer=tokenizer, sequence_length=64, seed=1)
    counters.clear()
    Generator(max_new_tokens=8).generate(model, tokenizer, PROMPTS)
    assert not counters["frames"]
    assert torch._dynamo.eval_frame._stance.stance == "default"  # put back


@pytest.mark.gpu
def test_a_gpu_generates_the_same_with_a_static_cache(tokenizer):
    torch.manual_seed(0)
    model = MODELS["llama"]().eval().cuda()
    for settings in ({}, {"strategy": "sample", "seed": 3}):
        dynamic, static = (
            Generator(cache=cache, max_new_tokens=20, batch_size=4, **settings).generate(model, tokenizer, PROMPTS)
            for cache in ("dynamic", "static")
        )
        assert [c.token_ids for c in dynamic] == [c.token_ids for c in static]


def test_beam_of_a_padded_batch_is_that_of_each_prompt_alone(model, tokenizer):
    for penalty in (1.0, 0.0, 2.0):
        generator = Generator(strategy="beam", num_beams=3, length_penalty=penalty, max_new_tokens=12, batch_size=4)
        for completion, prompt in zip(generator.generate(model, tokenizer, PROMPTS), PROMPTS, strict=True):
            expected = alone(model, tokenizer, prompt, num_beams=3, length_penalty=penalty, max_new_tokens=12)
            assert completion.token_ids == expected


def test_beam_finds_a_likelier_text_than_greedy(model, tokenizer):
    settings = {"max_new_tokens": 8, "logprobs": True}
    greedy = Generator(**settings).generate(model, tokenizer, PROMPTS)
    beam = Generator(strategy="beam", num_beams=8, length_penalty=0.0, **settings).generate(model, tokenizer, PROMPTS)
    assert sum(b.logprob - g.logprob for b, g in zip(beam, greedy, strict=True)) > 0.1


def test_static_cache_is_the_dynamic_one(model, tokenizer):
    for settings in ({}, {"strategy": "sample", "seed": 3}, {"strategy": "beam", "num_beams": 2}):
        dynamic, static = (
            Generator(cache=cache, max_new_tokens=20, batch_size=4, **settings).generate(model, tokenizer, PROMPTS)
            for cache in ("dynamic", "static")
        )
        assert [c.token_ids for c in dynamic] == [c.token_ids for c in static]


def test_sampling_with_one_candidate_is_greedy(model, tokenizer):
    greedy = Generator(max_new_tokens=20).generate(model, tokenizer, PROMPTS)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}, {"temperature": 1e-4}):
        sampled = Generator(strategy="sample", max_new_tokens=20, seed=5, **settings).generate(
            model, tokenizer, PROMPTS
        )
        assert [c.token_ids for c in sampled] == [c.token_ids for c in greedy], settings


def test_what_is_sampled_does_not_depend_on_the_batch(model, tokenizer):
    def sample(prompts, rows=None, **settings):
        generator = Generator(strategy="sample", max_new_tokens=20, seed=1, **settings)
        return [c.token_ids for c in generator.generate(model, tokenizer, prompts, rows)]

    together = sample(PROMPTS, batch_size=6)
    assert sample(PROMPTS, batch_size=1) == together
    assert sample(PROMPTS[::-1], rows=range(5, -1, -1), batch_size=4) == together[::-1]
    assert sample([PROMPTS[3]], rows=[3]) == [together[3]]
    assert sample([PROMPTS[3]], rows=[4]) != [together[3]]  # the row decides
    assert (
        Generator(strategy="sample", max_new_tokens=20, seed=2).generate(model, tokenizer, PROMPTS[:1])[0].token_ids
        != (together[0])
    )


def test_sampled_frequencies_are_the_filtered_distribution(model, tokenizer):
    """The first token of 4000 rows, against the distribution worked out here from the logits."""
    prompt, count = "The capital of France is", 4000
    generator = Generator(
        strategy="sample", temperature=0.7, top_k=30, top_p=0.9, min_p=0.01, max_new_tokens=1, batch_size=500
    )
    drawn = torch.tensor([c.token_ids[0] for c in generator.generate(model, tokenizer, [prompt] * count)])

    logits = model(torch.tensor([tokenizer(prompt)["input_ids"]])).logits[0, -1].detach().double() / 0.7
    order = logits.argsort(descending=True)[:30]
    p = logits[order].softmax(-1)
    keep = p.cumsum(-1) - p < 0.9  # a token stays while what is likelier does not yet reach top_p
    p = p.masked_fill(~keep, 0) / p[keep].sum()
    p = p.masked_fill(p < 0.01 * p.max(), 0)
    p = p / p.sum()
    assert 3 <= (p > 0).sum() < 30
    frequencies = torch.bincount(drawn, minlength=len(logits))[order].double()
    assert frequencies[p == 0].sum() == 0
    assert frequencies.sum() == count
    likely = p * count > 5
    expected = p[likely] * count
    chi_squared, freedom = float(((frequencies[likely] - expected) ** 2 / expected).sum()), int(likely.sum()) - 1
    assert chi_squared < freedom + 5 * (2 * freedom) ** 0.5  # mean and standard deviation of chi squared


def test_repetition_penalty_by_hand(model, tokenizer):
    """Greedy decoding with the penalty, done here step by step without cache or padding."""

    def by_hand(ids, penalty):
        ids, prompt = list(ids), len(ids)
        while len(ids) - prompt < 15:
            logits = model(torch.tensor([ids])).logits[0, -1].tolist()
            for token in set(ids):
                logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
            ids.append(max(range(len(logits)), key=logits.__getitem__))
            if ids[-1] == tokenizer.eos_token_id:
                break
        return ids[prompt:]

    prompts = [prompt for prompt in PROMPTS if prompt]
    got = Generator(repetition_penalty=1.7, max_new_tokens=15).generate(model, tokenizer, prompts)
    plain = Generator(max_new_tokens=15).generate(model, tokenizer, prompts)
    with torch.no_grad():
        expected = [by_hand(tokenizer(prompt)["input_ids"], 1.7) for prompt in prompts]
    assert [c.token_ids for c in got] == expected
    assert expected != [c.token_ids for c in plain]


def test_repetition_penalty_spares_padding():
    """The scores of a padded row are those of transformers' own penalty for the same row alone."""
    pad = 3
    rows = [[5, 7, 5], [9]]
    padded = torch.tensor([[5, 7, 5], [pad, pad, 9]])
    scores = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    after = torch.tensor([[2], [4]])  # one more token was generated
    got = RepetitionPenalty(1.5, torch.tensor([[1, 1, 1], [0, 0, 1]]))(torch.cat([padded, after], 1), scores)
    for place, row in enumerate(rows):
        ids = torch.tensor([[*row, int(after[place])]])
        expected = RepetitionPenaltyLogitsProcessor(1.5)(ids, scores[place : place + 1])
        torch.testing.assert_close(got[place : place + 1], expected)
    assert got[1, pad] == scores[1, pad]


def test_logprob_is_that_of_the_model(model, tokenizer):
    settings = {"strategy": "sample", "temperature": 2.0, "repetition_penalty": 1.2, "max_new_tokens": 10}
    for prompt, completion in zip(
        PROMPTS, Generator(logprobs=True, **settings).generate(model, tokenizer, PROMPTS), strict=True
    ):
        ids = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id]
        expected = 0.0
        for token in completion.token_ids:
            with torch.no_grad():
                expected += model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)[token].item()
            ids = [*ids, token]
        assert completion.logprob == pytest.approx(expected, abs=1e-3)
