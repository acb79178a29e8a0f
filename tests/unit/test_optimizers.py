"""Parameter groups, and MuonAdamW against torch's own Muon and AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from llm_modules.optimizers import MuonAdamW, parameter_groups


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.hidden = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)
        self.lm_head = nn.Linear(8, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.lm_head(self.norm(torch.tanh(self.hidden(self.embed(ids)))))


def test_norms_and_biases_are_not_decayed() -> None:
    model = Model()
    groups = {group["kind"]: group for group in parameter_groups(model)}
    assert {id(p) for p in groups["matrix"]["params"]} == {id(model.hidden.weight)}
    assert {id(p) for p in groups["embedding"]["params"]} == {id(model.embed.weight), id(model.lm_head.weight)}
    assert len(groups["vector"]["params"]) == 3
    assert groups["vector"]["weight_decay"] == 0.0
    assert "weight_decay" not in groups["matrix"]


def test_frozen_parameters_are_left_out() -> None:
    model = Model().requires_grad_(False)
    model.hidden.weight.requires_grad_(True)
    assert [group["kind"] for group in parameter_groups(model)] == ["matrix"]


def step(model: Model, optimizers: list[torch.optim.Optimizer], seed: int) -> None:
    ids = torch.randint(11, (16,), generator=torch.Generator().manual_seed(seed))
    for optimizer in optimizers:
        optimizer.zero_grad()
    nn.functional.cross_entropy(model(ids), ids.roll(1)).backward()
    for optimizer in optimizers:
        optimizer.step()


def test_equals_torch_muon_and_adamw(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_modules.optimizers.multiplies_bfloat16", lambda: True)  # else in fp32, see below
    torch.manual_seed(0)
    ours = Model()
    theirs = copy.deepcopy(ours)
    both = MuonAdamW(parameter_groups(ours), lr=0.01, weight_decay=0.1)
    rest = [p for name, p in theirs.named_parameters() if name != "hidden.weight"]
    adamw = torch.optim.AdamW(
        [
            {"params": [p for p in rest if p.ndim == 2]},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=0.01, weight_decay=0.1, betas=(0.9, 0.95),
    )  # fmt: skip
    muon = torch.optim.Muon([theirs.hidden.weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for seed in range(5):
        step(ours, [both], seed)
        step(theirs, [adamw, muon], seed)
    for (name, got), want in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-7, msg=name)


def test_state_survives_a_round_trip() -> None:
    torch.manual_seed(0)
    first = Model()
    optimizer = MuonAdamW(parameter_groups(first), lr=0.01)
    step(first, [optimizer], 0)
    second = copy.deepcopy(first)
    resumed = MuonAdamW(parameter_groups(second), lr=0.5)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for model, one in ((first, optimizer), (second, resumed)):
        step(model, [one], 1)
    for got, want in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(got, want)


def test_negative_rate_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.lr: -1"):
        MuonAdamW(Model().parameters(), lr=-1)


def test_muon_without_bf16_is_the_polynomial_of_the_singular_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32, where the processor multiplies bf16 element by element; and near what torch does in bf16."""
    from llm_modules import optimizers

    generator = torch.Generator().manual_seed(3)
    for shape in ((24, 16), (16, 24)):
        start, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
        weights = {}
        for native in (False, True):
            monkeypatch.setattr(optimizers, "multiplies_bfloat16", lambda native=native: native)
            parameter = torch.nn.Parameter(start.clone())
            parameter.grad = gradient.clone()
            MuonAdamW([parameter], lr=0.1, weight_decay=0.01).step()
            weights[native] = parameter.detach()
        # Nesterov's step from a momentum of zero: g + 0.95 * (0.05 g - g) is 0.0975 g, and only its direction counts.
        u, values, v = torch.linalg.svd(gradient.double(), full_matrices=False)
        values = values / gradient.double().norm()
        for _ in range(5):
            values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
        expected = start.double() * (1 - 0.1 * 0.01) - 0.1 * 0.2 * 24**0.5 * (u @ torch.diag(values) @ v)
        torch.testing.assert_close(weights[False].double(), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(weights[True].double(), expected, rtol=0, atol=5e-3)
        assert (weights[True] - weights[False]).abs().max() > 0
