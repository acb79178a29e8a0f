"""A model with packed attention generates like the same model with transformers' own attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.parity.test_zoo_families import LENGTHS, packed, pair


@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}, {"use_cache": False}])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "qwen3", "gpt2"])
def test_left_padded_prompts(family: str, cache: dict[str, Any]) -> None:
    """Prompts shorter and longer than the sliding window of 8."""
    ours, theirs = pair(family)
    documents = [d for d in packed()[0] if len(d) < 64]
    longest = max(len(d) for d in documents)
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, longest - len(document) :] = document
        mask[row, longest - len(document) :] = 1
    options: dict[str, Any] = {
        "attention_mask": mask,
        "max_new_tokens": 20,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": 0,
        "disable_compile": True,
        "return_dict_in_generate": True,
        "output_logits": True,
        **cache,
    }
    expected = theirs.eval().generate(ids, **options)
    got = ours.hf.eval().generate(ids, **options)
    assert torch.equal(got.sequences, expected.sequences)
    for one, other in zip(got.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * other.abs().max())


def test_the_whole_model_isolates_restarting_positions_by_itself() -> None:
    """Called as transformers call it, without our layout's arguments, positions that restart still make a mask."""
    ours, theirs = pair("llama")
    documents, ids, positions, _ = packed()
    with torch.no_grad():
        got = ours.hf(ids, position_ids=positions, use_cache=False).logits[0].split(LENGTHS)
        for document, logits in zip(documents, got, strict=True):
            expected = theirs(document[None], use_cache=False).logits[0]
            torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * expected.abs().max())
