"""Every method of peft that is listed trains what plain peft trains: loss and gradients on the same batch, fp32."""

from __future__ import annotations

import copy
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_modules.logprobs import next_token_targets
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone, CausalLM

peft = pytest.importorskip("peft")

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}

METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("LoraConfig", {"r": 4}),
    "lora-modules-to-save": ("LoraConfig", {"r": 4, "modules_to_save": ["lm_head", "embed_tokens"]}),
    "lora-head": ("LoraConfig", {"r": 4, "target_modules": ["q_proj", "lm_head", "embed_tokens"]}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True}),
    "rslora": ("LoraConfig", {"r": 4, "use_rslora": True}),
    "pissa": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa"}),
    "pissa-niter": ("LoraConfig", {"r": 4, "init_lora_weights": "pissa_niter_4"}),
    "olora": ("LoraConfig", {"r": 4, "init_lora_weights": "olora"}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2}),
    "ia3": ("IA3Config", {}),
    "ln": ("LNTuningConfig", {}),
    "oft": ("OFTConfig", {"oft_block_size": 8}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "vera": ("VeraConfig", {"r": 8}),
    "loha": ("LoHaConfig", {"r": 4}),
    "lokr": ("LoKrConfig", {"r": 4}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 50}),
    "hra": ("HRAConfig", {"r": 4}),
    "vblora": ("VBLoRAConfig", {"r": 4, "num_vectors": 16, "vector_length": 8, "topk": 2}),
    "miss": ("MissConfig", {"r": 4}),
    "randlora": ("RandLoraConfig", {"r": 4}),
    "c3a": ("C3AConfig", {"block_size": 8}),
    "trainable-tokens": ("TrainableTokensConfig", {"token_indices": [8, 15]}),
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 5}),
    "p-tuning": ("PromptEncoderConfig", {"num_virtual_tokens": 5, "encoder_hidden_size": 16}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "prefix-projection": (
        "PrefixTuningConfig",
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 16},
    ),
}
UNMERGED = {"prompt", "p-tuning", "prefix", "prefix-projection"}

DOCUMENTS = (7, 12, 5)


def adapter(method: str) -> dict[str, Any]:
    name, arguments = METHODS[method]
    return {"class_path": f"peft.{name}", "init_args": dict(arguments)}


def build(method: str, family: dict[str, Any] = TINY, **fields: Any) -> CausalLM:
    backbone = Backbone(config=family, adapter=adapter(method), **fields)
    model = backbone.build(tokenizer=byte_tokenizer(), sequence_length=16, seed=3)
    stir(model)
    return model


def stir(model: CausalLM) -> None:
    """Weights as after some training: what begins at zero would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))


def packed() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.arange(sum(DOCUMENTS))[None] * 7 % 60 + 1
    positions = torch.cat([torch.arange(n) for n in DOCUMENTS])[None]
    return ids, positions, torch.tensor([0, *DOCUMENTS]).cumsum(0).int()


def our_loss(model: CausalLM) -> Tensor:
    ids, positions, ends = packed()
    targets = next_token_targets(ids, positions)
    scores = model(ids, positions, targets, ends, max(DOCUMENTS), uniform=True)
    loss = -scores.logprobs.sum()
    penalty = model.adapter.penalty()
    return loss if penalty is None else loss + penalty


def peft_loss(model: Any) -> Tensor:
    """Plain peft, each document by itself. (With virtual tokens peft's own loss has the first token, too.)"""
    ids, _, ends = packed()
    total = torch.zeros(())
    for a, b in pairwise(ends.tolist()):
        output = model(input_ids=ids[:, a:b], labels=ids[:, a:b])
        logits = output.logits[0, a - b : -1]
        own = torch.nn.functional.cross_entropy(logits, ids[0, a + 1 : b])
        total = total + own * (b - a - 1)
        if model.active_peft_config.peft_type.value == "ADALORA":
            total = total + (output.loss - own) / len(DOCUMENTS)  # its penalty, once
    return total


def plain_peft(model: CausalLM, method: str, family: dict[str, Any] = TINY) -> Any:
    """The same base in transformers' own attention, adapted by peft alone, with our adapter's weights."""
    name, arguments = METHODS[method]
    base = Backbone(config=family, attention="eager", lean=False)
    hf = base.build(tokenizer=byte_tokenizer(), sequence_length=16, seed=3).hf
    arguments = {"task_type": "CAUSAL_LM", **copy.deepcopy(arguments)}
    if name not in ("IA3Config", "TrainableTokensConfig") and "target_modules" in vars(
        getattr(peft, name)(**({"total_step": 9} if name == "AdaLoraConfig" else {}))
    ):
        arguments.setdefault("target_modules", "all-linear")
    if name == "LNTuningConfig":
        arguments["target_modules"] = ["input_layernorm", "post_attention_layernorm", "norm"]
    if name == "AdaLoraConfig":
        arguments["total_step"] = 100
    if name in ("LoraConfig",) and str(arguments.get("init_lora_weights", "")).startswith(("pissa", "olora")):
        torch.manual_seed(3)
    plain = peft.get_peft_model(hf, getattr(peft, name)(**arguments))
    ours = {n: p for n, p in model.hf.named_parameters() if p.requires_grad}
    theirs = {n: p for n, p in hf.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for n, p in theirs.items():
            p.copy_(ours[n])
        if model.virtual is not None:
            plain.prompt_encoder["default"].load_state_dict(model.virtual.encoder.state_dict())
    return plain.train()


def trained(model: Any) -> dict[str, Tensor]:
    encoder = model.virtual.encoder if isinstance(model, CausalLM) and model.virtual is not None else None
    hf = model.hf if isinstance(model, CausalLM) else model.get_base_model()
    if not isinstance(model, CausalLM) and hasattr(model, "prompt_encoder"):
        encoder = model.prompt_encoder["default"]
    found = {n: p for n, p in hf.named_parameters() if p.requires_grad}
    if encoder is not None:
        found |= {f"encoder.{n}": p for n, p in encoder.named_parameters()}
    return found


@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_of_packed_rows_are_those_of_plain_peft(method: str) -> None:
    model = build(method)
    plain = plain_peft(model, method)
    ours, theirs = our_loss(model), peft_loss(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    got, expected = trained(model), trained(plain)
    assert got.keys() == expected.keys()
    assert got
    assert sum(p.grad.abs().sum() for p in got.values()) > 0
    for name, p in expected.items():
        scale = p.grad.abs().max().item()
        torch.testing.assert_close(got[name].grad, p.grad, rtol=1e-4, atol=1e-5 * scale + 1e-7, msg=name)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in UNMERGED])
def test_unmerged_and_merged_say_what_was_trained(method: str, tmp_path: Path) -> None:
    """The folder opened by plain peft on the base's folder, and the merged model, against the trained one."""
    from transformers import AutoModelForCausalLM

    Backbone(config=TINY).build(tokenizer=byte_tokenizer(), sequence_length=16, seed=3).save_pretrained(
        tmp_path / "base"
    )
    model = build(method).eval()
    ids = packed()[0]
    with torch.no_grad():
        expected = model.hf(ids).logits
        model.save_adapter(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        plain = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        rounding = {"rtol": 1e-6, "atol": 1e-5 if method == "randlora" else 2e-6}  # its random factors are large
        torch.testing.assert_close(plain(ids).logits, expected, **rounding)
        model.adapter.merge()
        assert not [m for m in model.hf.modules() if "peft" in type(m).__module__]
        torch.testing.assert_close(model.hf(ids).logits, expected, **rounding)


@pytest.mark.parametrize("method", sorted(UNMERGED))
def test_virtual_tokens_leave_and_come_back(method: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    Backbone(config=TINY).build(tokenizer=byte_tokenizer(), sequence_length=16, seed=3).save_pretrained(
        tmp_path / "base"
    )
    model = build(method).eval()
    ids, positions = torch.arange(1, 13)[None], torch.arange(12)[None]
    with torch.no_grad():
        expected = model.hf.lm_head(model.hidden_states(ids, positions))
        model.save_adapter(tmp_path / "adapter")
        base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        plain = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(plain(input_ids=ids).logits[:, -12:], expected, rtol=1e-6, atol=2e-6)
    with pytest.raises(ValueError, match="cannot be merged: its virtual tokens are no weights of the base"):
        model.adapter.merge()


@pytest.mark.parametrize("method", ["prompt", "prefix", "lora"])
@pytest.mark.parametrize("kind", ["gemma2", "qwen3", "gpt2"])
def test_other_families(method: str, kind: str) -> None:
    family = {**TINY, "model_type": kind}
    if kind == "gemma2":
        family |= {"head_dim": 8, "sliding_window": 8}
    if kind == "gpt2":
        family = {"model_type": kind, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        family |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    model = build(method, family)
    plain = plain_peft(model, method, family)
    ours, theirs = our_loss(model), peft_loss(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    expected = trained(plain)
    for name, p in trained(model).items():
        torch.testing.assert_close(
            p.grad, expected[name].grad, rtol=1e-4, atol=1e-5 * p.grad.abs().max().item() + 1e-7, msg=name
        )


@pytest.mark.parametrize("method", ["lora", "dora", "prefix", "prompt", "adalora"])
def test_checkpointed_activations_give_the_same_gradient(method: str) -> None:
    """A frozen base has no input that wants a gradient; what is checkpointed must not lose it."""
    gradients = []
    for checkpointing in (False, True):
        model = build(method, activation_checkpointing=checkpointing).train()
        our_loss(model).backward()
        gradients.append([p.grad for p in model.adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_compiled_blocks_give_the_same_gradient(method: str) -> None:
    gradients = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = build(method, compile=compiled).train()
        our_loss(model).backward()
        gradients.append([p.grad for p in model.adapter.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
