"""A base in 4 and 8 bits: bitsandbytes' numbers, the same in training and evaluation, and what leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_modules.logprobs import next_token_targets
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone, CausalLM
from llm_modules.zoo.quantization import dequantized, quantizable, quantized_bytes

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

KINDS = ("nf4", "nf4-double", "fp4", "int8")
WIDE: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4}}


def build(kind: str | None, adapter: Any = LORA, precision: str = "32-true", **fields: Any) -> CausalLM:
    backbone = Backbone(config=WIDE, quantization=kind, adapter=adapter, **fields)
    model = backbone.build(tokenizer=byte_tokenizer(), sequence_length=16, seed=3, precision=precision)
    if model.adapter is not None:
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for p in model.adapter.parameters():
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def loss(model: CausalLM, precision: str = "32-true") -> torch.Tensor:
    ids = torch.arange(24)[None] * 7 % 60 + 1
    positions = torch.cat([torch.arange(10), torch.arange(14)])[None]
    ends = torch.tensor([0, 10, 24], dtype=torch.int32)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
        return -model(ids, positions, next_token_targets(ids, positions), ends, 14, uniform=True).logprobs.sum()


def weights_as_trained(kind: str) -> dict[str, torch.Tensor]:
    """Each layer's weight after quantization, by bitsandbytes' own functions."""
    hf = build(None, adapter=None).hf
    found = {}
    for name, linear in quantizable(hf).items():
        if kind == "int8":
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(linear.weight.data.half())
            found[name] = codes.float() * scales[:, None] / 127
        else:
            double, form = kind == "nf4-double", "fp4" if kind == "fp4" else "nf4"
            codes, state = bnb.functional.quantize_4bit(linear.weight.data, compress_statistics=double, quant_type=form)
            found[name] = bnb.functional.dequantize_4bit(codes, state)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_are_those_of_the_rounded_weights(kind: str) -> None:
    """Against an ordinary model whose weights are bitsandbytes' rounded ones."""
    model, plain = build(kind), build(None)
    exact = loss(plain).item()
    for name, weight in weights_as_trained(kind).items():
        layer: Any = plain.hf.get_submodule(name)
        layer.get_base_layer().weight.data = weight
        torch.testing.assert_close(dequantized(model.hf.get_submodule(name).get_base_layer()).float(), weight)
    for one in (model, plain):
        loss(one).backward()
    torch.testing.assert_close(loss(model), loss(plain), rtol=1e-5, atol=1e-5)
    assert abs(loss(model).item() - exact) > 1e-4  # it is rounded
    for p, q in zip(model.adapter.parameters(), plain.adapter.parameters(), strict=True):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5 * q.grad.abs().max().item())


@pytest.mark.parametrize("kind", KINDS)
def test_validation_between_steps_changes_nothing(kind: str) -> None:
    """bitsandbytes repacks weights of some CPUs in evaluation, after which training has no gradient."""
    model = build(kind)
    before = loss(model.train()).item()
    with torch.no_grad():
        assert loss(model.eval()).item() == pytest.approx(before, rel=1e-6)
    again = loss(model.train())
    assert again.item() == before
    again.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.adapter.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_mixed_precision(kind: str) -> None:
    exact, mixed = build(kind), build(kind, precision="bf16-mixed", dtype="bfloat16")
    expected, got = loss(exact), loss(mixed, "bf16-mixed")
    assert got.item() == pytest.approx(expected.item(), rel=2e-2)
    got.backward()
    assert {p.dtype for p in mixed.adapter.parameters()} == {torch.float32}
    assert all(p.grad.abs().sum() > 0 for p in mixed.adapter.parameters())
    frozen = {p.dtype for p in mixed.hf.parameters() if not p.requires_grad}
    assert frozen == {torch.bfloat16, torch.int8 if kind == "int8" else torch.uint8}


@pytest.mark.parametrize("kind", KINDS)
def test_to_merge_into_ordinary_layers_compute_the_same(kind: str) -> None:
    backbone = Backbone(config=WIDE, quantization=kind, adapter=LORA)  # type: ignore[arg-type]
    made = backbone.build(tokenizer=byte_tokenizer(), sequence_length=16, seed=3, dequantize=True).eval()
    trained = build(kind).eval()
    made.load_state_dict(trained.state_dict())
    ids = torch.arange(20)[None]
    with torch.no_grad():
        expected = trained.hf(ids).logits
        made.adapter.merge()
        torch.testing.assert_close(made.hf(ids).logits, expected, rtol=1e-5, atol=2e-6)
    assert type(made.hf.model.layers[0].self_attn.q_proj) is torch.nn.Linear


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("LoraConfig", {"r": 4, "use_dora": True}),
        ("AdaLoraConfig", {"init_r": 4, "target_r": 2}),
        ("IA3Config", {}),
        ("LNTuningConfig", {}),
        ("OFTConfig", {"oft_block_size": 8}),
        ("VeraConfig", {"r": 8}),
        ("PrefixTuningConfig", {"num_virtual_tokens": 4}),
        ("PromptTuningConfig", {"num_virtual_tokens": 4}),
    ],
)
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_other_methods_train_on_a_quantized_base(kind: str, name: str, arguments: dict[str, Any]) -> None:
    """Against the same method on ordinary layers with the rounded weights."""
    adapter = {"class_path": f"peft.{name}", "init_args": arguments}
    model, plain = build(kind, adapter), build(None, adapter)
    for layer_name, weight in weights_as_trained(kind).items():
        layer: Any = plain.hf.get_submodule(layer_name)
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        layer.weight.data = weight
    plain.adapter.hf.load_state_dict({n: p for n, p in model.hf.named_parameters() if p.requires_grad}, strict=False)
    one, other = loss(model), loss(plain)
    torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-4)
    one.backward()
    other.backward()
    for p, q in zip(model.adapter.parameters(), plain.adapter.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4 * q.grad.abs().max().item() + 1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_are_those_that_are_held(kind: str) -> None:
    layer: Any = build(kind, adapter=None).hf.model.layers[0].mlp.down_proj
    weight = build(None, adapter=None).hf.model.layers[0].mlp.down_proj.weight
    held = layer.weight.numel()
    if kind == "int8":
        held += layer.weight.SCB.nbytes
    else:
        state = layer.weight.quant_state
        held += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    assert quantized_bytes(kind, weight) == held


def test_a_quantized_model_without_an_adapter_is_for_evaluation() -> None:
    model = build("nf4", adapter=None)
    assert not [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        assert loss(model) > 0


def test_checkpointed_activations(tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build("nf4", activation_checkpointing=checkpointing).train()
        loss(model).backward()
        gradients.append([p.grad for p in model.adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"quantization": "nf5"}, "backbone.quantization: unknown value 'nf5'; did you mean 'nf4'?"),
        (
            {
                "quantization": "nf4",
                "adapter": {"class_path": "peft.LoraConfig", "init_args": {"init_lora_weights": "pissa"}},
            },
            "init_lora_weights 'pissa' changes the base's weights",
        ),
        (
            {
                "quantization": "nf4",
                "config": {
                    "model_type": "gpt2",
                    "n_embd": 32,
                    "n_layer": 1,
                    "n_head": 2,
                    "n_positions": 64,
                    "attn_pdrop": 0,
                },
            },
            "has no torch.nn.Linear to quantize",
        ),
    ],
)
def test_mistakes_are_one_line(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="backbone") as caught:
        Backbone(**{"config": WIDE, **fields}).check(vocabulary=260, sequence_length=16)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
