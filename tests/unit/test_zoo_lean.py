"""Lean norms and MLPs give transformers' own gradients, keep less, and leave alone what they do not understand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from llm_modules.zoo.lean import make_lean

SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 1,
}  # fmt: skip
FAMILIES = {"llama": 7, "qwen3": 11, "gemma2": 11, "gemma3_text": 15, "olmo2": 11, "granite": 7, "mistral": 7}
"""Family -> replaced modules: norms (with a scale of weight or 1 + weight) and MLPs."""


def models(family: str) -> tuple[nn.Module, nn.Module, int]:
    """Two copies with uneven weights, the second one lean."""
    config = AutoConfig.for_model(family, **SMALL)
    torch.manual_seed(0)
    one = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    two = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    two.load_state_dict(one.state_dict())
    return one.train(), two.train(), make_lean(two)


def gradients(model: nn.Module, bf16: bool) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, 61, (2, 16), generator=torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def distance(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    assert one.keys() == two.keys()
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (one, two))
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_transformers_own(family: str) -> None:
    plain, lean, count = models(family)
    assert count == FAMILIES[family]
    loss, exact = gradients(plain, bf16=False)
    lean_loss, lean_exact = gradients(lean, bf16=False)
    assert lean_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert distance(lean_exact, exact) < 1e-5
    for model in (plain, lean):
        model.zero_grad()
    _, rounded = gradients(plain, bf16=True)
    _, lean_rounded = gradients(lean, bf16=True)
    assert distance(lean_rounded, exact) < 1.3 * distance(rounded, exact)  # no less exact than transformers' under bf16


def test_less_is_kept() -> None:
    plain, lean, _ = models("llama")

    def kept(model: nn.Module) -> int:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        alive: dict[int, Tensor] = {}

        def keep(tensor: Tensor) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                alive[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        model.set_attn_implementation("sdpa")  # eager's scores would dwarf all else
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16):
            model.model(input_ids=torch.zeros(4, 64, dtype=torch.long))
        return sum(t.untyped_storage().nbytes() for t in alive.values())

    assert kept(lean) < 0.75 * kept(plain)


def test_what_computes_something_else_is_left_alone() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, hidden: Tensor) -> Tensor:
            return self.weight * hidden * torch.rsqrt(hidden.abs().mean(-1, keepdim=True) + self.variance_epsilon)

    class OddMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 9), nn.Linear(8, 9), nn.Linear(9, 8)
            self.act_fn = nn.SiLU()

        def forward(self, hidden: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(hidden)) + self.up_proj(hidden))

    assert make_lean(nn.ModuleList([OddRMSNorm(), OddMLP()])) == 0


def test_activation_checkpointing_recomputes_through_it() -> None:
    plain, lean, _ = models("llama")
    loss, expected = gradients(plain, bf16=False)
    lean.gradient_checkpointing_enable({"use_reentrant": False})
    lean_loss, actual = gradients(lean, bf16=False)
    assert lean_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert distance(actual, expected) < 1e-5


def test_a_copy_is_its_own(tmp_path: Any) -> None:
    import copy

    _, lean, _ = models("llama")
    other = copy.deepcopy(lean)
    with torch.no_grad():
        lean.model.norm.weight.zero_()
    assert other.model.norm(torch.ones(1, 32)).abs().sum() > 0


@pytest.mark.parametrize("mode", [True, False])
def test_dropout_inside_of_an_mlp_is_not_lost(mode: bool) -> None:
    """Seed-OSS has it; a model read from a folder is in evaluation mode when it is made lean."""
    counts = []
    for dropout in (0.1, 0.0):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("seed_oss", **SMALL, residual_dropout=dropout))
        counts.append(make_lean(model.train(mode)))
        assert all(module.training == mode for module in model.modules())
    assert counts == [5, 7]  # the norms alone, and with the two MLPs
