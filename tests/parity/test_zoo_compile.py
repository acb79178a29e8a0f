"""Compiled blocks compute what eager ones do, and are not compiled again for other document lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_modules.logprobs import next_token_targets
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone, CausalLM

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
}
WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}


def batch(lengths: list[int]) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(sum(lengths))
    ids = torch.randint(0, 256, (1, sum(lengths)), generator=generator)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return ids, positions, next_token_targets(ids, positions), offsets, 512


def gradient(model: CausalLM, inputs: tuple[Any, ...]) -> torch.Tensor:
    model.zero_grad()
    model(*inputs, uniform=True).logprobs.sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "changes", "checkpointing", "graphs"),
    [("llama", {}, False, 1), ("gemma2", WINDOWS, False, 2), ("llama", {}, True, 1)],
)
def test_compiled_is_eager(family: str, changes: dict[str, Any], checkpointing: bool, graphs: int) -> None:
    torch._dynamo.reset()
    config = {"model_type": family, **SIZES, **changes}
    eager, compiled = (
        Backbone(config=config, compile=on, activation_checkpointing=on and checkpointing)
        .build(tokenizer=byte_tokenizer(), sequence_length=256, seed=0)
        .train()
        for on in (False, True)
    )
    assert list(eager.state_dict()) == list(compiled.state_dict())
    counted = torch._dynamo.utils.counters
    counted.clear()
    for lengths in ([40, 3, 100], [200, 7, 30, 64], [9, 9]):
        expected = gradient(eager, batch(lengths))
        assert (gradient(compiled, batch(lengths)) - expected).norm() <= 1e-5 * expected.norm()
        assert counted["stats"]["unique_graphs"] == graphs, "compiled once for each kind of block"
    assert not counted["graph_break"]
    ids = torch.arange(96).view(2, 48)
    rows = (ids, torch.arange(48).expand(2, 48), next_token_targets(ids, torch.arange(48).expand(2, 48)))
    expected = gradient(eager, rows)
    assert (gradient(compiled, rows) - expected).norm() <= 1e-5 * expected.norm()
