"""Slices of rows on two ranks against whole rows on each, family by family: each of two ranks calls
``main``, and rank 0 writes the differences, by case.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from llm_modules.batch import TokenScores
from llm_modules.logprobs import next_token_targets
from llm_modules.zoo.activations import checkpoint_activations
from llm_modules.zoo.causal_lm import CausalLM
from tests.parity.test_zoo_families import FAMILIES, padded, pair

LENGTHS = (5, 30, 1, 63)
"""Of the documents: 99 positions, which two ranks do not divide."""

Layout = tuple[Any, ...]


def layouts() -> dict[str, Layout]:
    generator = torch.Generator().manual_seed(1)
    documents = [torch.randint(3, 160, (n,), generator=generator) for n in LENGTHS]
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    ids, offsets = torch.cat(documents)[None], torch.tensor([0, *LENGTHS]).cumsum(0).int()
    rows, places, labels = (t[:, : max(LENGTHS)] for t in padded(documents))
    late = next_token_targets(ids, positions)
    late[:, :60] = -100  # the first rank's slice has nothing to score
    return {
        "packed": (ids, positions, next_token_targets(ids, positions), offsets, max(LENGTHS)),
        "packed, late targets": (ids, positions, late, offsets, max(LENGTHS)),
        "padded": (rows, places, next_token_targets(labels, places)),
        "nothing to score": (rows, places, torch.full_like(labels, -100)),
    }


def loss_of(scores: TokenScores) -> Tensor:
    """Not uniform, not linear, and of every statistic."""
    assert scores.log_normalizer is not None
    assert scores.mean_logprob is not None
    weights = scores.index.float().cos()
    return (
        50 * (weights * scores.logprobs / 50).sum().tanh()
        + scores.log_normalizer.square().sum()
        - 0.1 * scores.mean_logprob.sum()
    )


def gradients(model: CausalLM, layout: Layout, uniform: bool) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    if uniform:
        loss = -model(*layout, uniform=True).logprobs.sum()
    else:
        loss = loss_of(model(*layout, statistics=True))
    loss.backward()
    return loss.detach(), {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}


def compare(model: CausalLM, layout: Layout, uniform: bool) -> dict[str, float]:
    """Loss and gradient of slices (the mean over ranks, as data-parallel ranks take it) from those of whole rows."""
    model.context = None
    loss, expected = gradients(model, layout, uniform)
    model.split_positions(dist.group.WORLD)
    split_loss, split = gradients(model, layout, uniform)
    assert split_loss.isfinite()
    for gradient in split.values():
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    whole = torch.cat([g.flatten() for g in expected.values()]).norm()
    difference = torch.cat([(split[name] - g).flatten() for name, g in expected.items()]).norm()
    return {
        "loss": float((split_loss - loss).abs() / loss.abs().clamp(min=1)),
        "gradient": float(difference / whole.clamp(min=1e-9)),
        "size": float(whole),
    }


def unbalanced(model: CausalLM) -> CausalLM:
    """Without the load-balancing loss of a mixture of experts, which is refused over slices."""
    if model.routing is not None:
        model.routing = model.routing._replace(coefficient=0.0)
    return model


def dropout_masks(model: CausalLM, layout: Layout) -> dict[str, bool]:
    """What dropout makes of the same row on each rank: other masks, and the same random state afterwards."""
    model.split_positions(dist.group.WORLD)
    drawn: list[Tensor] = []
    model.hf.model.layers[0].register_forward_hook(lambda *_: drawn.append(torch.rand(4)))
    torch.manual_seed(0)
    model(*layout)
    everybody: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, (drawn[0].tolist(), torch.rand(4).tolist()))
    inside, after = zip(*everybody, strict=True)
    return {"inside differs": inside[0] != inside[1], "after is equal": after[0] == after[1]}


def main(out: str) -> None:
    dist.init_process_group("gloo")
    every = layouts()
    differences = {
        f"{family}, {name}, {'uniform' if uniform else 'statistics'}": compare(model, every[name], uniform)
        for family in FAMILIES
        for model in [unbalanced(pair(family)[0])]
        for name, uniform in (("packed", True), ("padded", False))
    }
    llama = pair("llama")[0]
    for name in ("packed, late targets", "nothing to score"):
        differences[f"llama, {name}"] = compare(llama, every[name], uniform=True)
    checkpoint_activations(llama.hf, True)
    differences["llama, packed, blocks computed again"] = compare(llama, every["packed"], uniform=False)
    dropout = dropout_masks(pair("llama")[0], every["packed"])
    if dist.get_rank() == 0:
        result = {"differences": differences, "dropout": dropout}
        (Path(out) / "context.json").write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
