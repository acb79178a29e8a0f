"""Whole copies of models that a strategy spreads: filled with its weights, in their place, and gone afterwards."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llm_modules.strategies.whole import WholeModels


class Tied(nn.Module):
    """Two matrices that are one, a frozen vector, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("shift", torch.zeros(3), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids) * self.frozen + self.shift)


class Owner(nn.Module):
    """A stand-in for a module under a strategy that leaves a rank nothing of its weights but zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.critics = Tied(), nn.ModuleList([Tied()])
        self.weights: dict[str, Tensor] = {}
        self.trainer = SimpleNamespace(strategy=SimpleNamespace(whole_weights=lambda: dict(self.weights)))

    def spread(self) -> None:
        self.weights = {name: value.detach().clone() for name, value in self.named_parameters()}
        for value in self.parameters():
            value.data.zero_()


def test_inside_the_models_are_whole_and_afterwards_as_they_were() -> None:
    owner: Any = Owner()
    whole, ids = WholeModels("model", "critics"), torch.arange(5)
    expected, of_critic = owner.model(ids), owner.critics[0](ids)
    whole.before_spreading(owner)
    kept: Any = whole._empty
    assert all(parameter.is_meta for parameter in kept.parameters())
    owner.spread()
    model, critics = owner.model, owner.critics
    assert not owner.model(ids).any()
    with whole.in_place(owner):
        assert torch.equal(owner.model(ids), expected)
        assert torch.equal(owner.critics[0](ids), of_critic)
        assert owner.model.head.weight is owner.model.embedding.weight
        assert not any(parameter.requires_grad for parameter in owner.parameters())
    assert owner.model is model
    assert owner.critics is critics
    assert whole._filled is None


def test_they_are_those_of_now() -> None:
    owner: Any = Owner()
    whole, ids = WholeModels("model", "critics"), torch.arange(5)
    whole.before_spreading(owner)
    owner.spread()
    owner.weights["model.frozen"] = torch.zeros(3)
    owner.model.shift = torch.ones(3)
    with whole.in_place(owner):
        assert torch.equal(owner.model(ids)[0], owner.weights["model.embedding.weight"].sum(1))


def test_filled_they_stay_and_are_filled_once() -> None:
    owner: Any = Owner()
    whole = WholeModels("model", "critics")
    whole.before_spreading(owner)
    owner.spread()
    whole.fill(owner)
    owner.weights = {}  # a second filling would fail
    model, seen = owner.model, []

    def answer() -> None:
        with whole.in_place(owner):
            seen.append(owner.model)
            raise KeyError("of a reward")

    for _ in range(2):
        with pytest.raises(KeyError, match="of a reward"):
            answer()
        assert owner.model is model
    assert seen[0] is seen[1] is not model
    whole.free()
    assert whole._filled is None


def test_where_nothing_is_spread_nothing_is_done() -> None:
    owner: Any = Owner()
    whole, model = WholeModels("model", "critics"), owner.model
    whole.fill(owner)
    with whole.in_place(owner):
        assert owner.model is model
