"""Decoding against transformers' own ``generate`` of one unpadded prompt at a time, in fp32."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llm_modules.generation import Generator
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
