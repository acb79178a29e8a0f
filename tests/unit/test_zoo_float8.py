"""fp8 in the zoo, emulated on a CPU: what is converted, that names stay, and that it learns what bf16 learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_modules.logprobs import next_token_targets
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip


def build(**more: Any) -> Any:
    return Backbone(config=LLAMA, **more).build(tokenizer=byte_tokenizer(), sequence_length=64, seed=3)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ({"fp8": "yes"}, "backbone.fp8: 'yes' is not allowed; true, false or emulated"),
        ({"fp8": True, "adapter": {"class_path": "peft.LoraConfig"}}, "backbone.fp8: not with an adapter"),
    ],
)
def test_it_is_refused(more: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError) as refused:
        Backbone(config=LLAMA, **more).check(vocabulary=260, sequence_length=64)
    assert line in str(refused.value)


def test_without_torchao_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_modules.zoo.float8.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs torchao; pip install 'litrecipes"):
        Backbone(config=LLAMA, fp8="emulated").check(vocabulary=260, sequence_length=64)


def train(model: Any) -> list[float]:
    """Forty steps on repeated text."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    text = "the quick brown fox jumps over the lazy dog and runs on"
    ids = torch.tensor([byte_tokenizer()(text)["input_ids"]])
    positions = torch.arange(ids.shape[1])[None]
    losses = []
    for _ in range(40):
        with torch.autocast("cpu", torch.bfloat16):
            loss = -model(ids, positions, next_token_targets(ids, positions)).logprobs.mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def test_it_learns_what_bf16_learns_and_leaves_as_an_ordinary_model(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.float8.float8_linear import Float8Linear
    from transformers import AutoModelForCausalLM

    plain, eight = build(), build(fp8="emulated")
    names = [name for name, module in eight.named_modules() if isinstance(module, Float8Linear)]
    assert len(names) == 2 * 7
    assert all(".layers." in name for name in names)
    # The same names and the same numbers: a checkpoint of one is a checkpoint of the other.
    assert eight.state_dict().keys() == plain.state_dict().keys()
    for name, value in eight.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=0, atol=0)
    assert all(parameter.dtype == torch.float32 for parameter in eight.parameters())
    expected, actual = train(plain), train(eight)
    assert actual != expected  # it did round
    assert actual[-1] < 0.3 * actual[0]
    assert abs(actual[-1] - expected[-1]) < 0.05 * expected[0]
    eight.save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, value in reloaded.state_dict().items():
        torch.testing.assert_close(value, eight.hf.state_dict()[name], rtol=0, atol=0)
    assert not any(isinstance(module, Float8Linear) for module in reloaded.modules())


def test_a_model_without_such_layers_is_refused() -> None:
    pytest.importorskip("torchao")
    odd = {**LLAMA, "hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 2, "head_dim": 12}
    with pytest.raises(ValueError, match="no linear layer in its blocks whose sizes are multiples of 16"):
        Backbone(config=odd, fp8="emulated").build(tokenizer=byte_tokenizer(), sequence_length=64, seed=3)
