"""Recomputed, partly recomputed and offloaded activations: the same gradients; what they save."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_zoo_backbone import TINY, build, scores

from llm_modules.zoo import Backbone
from llm_modules.zoo.activations import recomputed
from llm_modules.zoo.memory import activation_bytes

FOUR = {**TINY, "num_hidden_layers": 4}
WAYS: dict[str, dict[str, Any]] = {
    "every second": {"activation_checkpointing": 2},
    "every third": {"activation_checkpointing": 3},
    "selective": {"activation_checkpointing": "selective"},
    "offload": {"activation_offload": True},
    "offload, full": {"activation_offload": True, "activation_checkpointing": True},
    "offload, selective": {"activation_offload": True, "activation_checkpointing": "selective"},
    "offload, sdpa": {"activation_offload": True, "attention": "sdpa"},
    "selective, sdpa": {"activation_checkpointing": "selective", "attention": "sdpa"},
    "selective, not lean": {"activation_checkpointing": "selective", "lean": False},
}


def gradients(**settings: Any) -> list[torch.Tensor]:
    model = build(Backbone(config=FOUR, **settings)).train()
    for _ in range(2):
        model.zero_grad()
        scores(model).logprobs.sum().backward()
    return [parameter.grad for parameter in model.parameters()]  # type: ignore[misc]


@pytest.mark.parametrize("name", WAYS)
def test_changes_nothing_but_memory(name: str) -> None:
    for one, other in zip(gradients(), gradients(**WAYS[name]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


class Products(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self.all = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.all += 1
        self.products += func in (torch.ops.aten.mm.default, torch.ops.litrecipes.document_attention.default)
        return func(*args, **(kwargs or {}))


def backward_work(how: Any) -> tuple[int, int]:
    model = build(Backbone(config=FOUR, activation_checkpointing=how, lean=False)).train()
    total = scores(model).logprobs.sum()
    with Products() as work:
        total.backward()
    return work.products, work.all


def test_selective_computes_no_matrix_product_again_and_n_only_every_nth_block() -> None:
    none, selective, half, full = (backward_work(how) for how in (False, "selective", 2, True))
    assert none[0] == selective[0]
    assert none[1] < selective[1] < full[1]
    assert full[0] - half[0] == half[0] - none[0] > 0


def test_offload_takes_all_but_parameters_to_the_host() -> None:
    model = build(Backbone(config=FOUR, activation_offload=True)).train()
    assert model._offload is not None
    moved: list[torch.Tensor] = []
    original = model._offload.pack_hook

    def pack(tensor: torch.Tensor) -> Any:
        kept = original(tensor)
        if kept[0] is not None:
            moved.append(kept[1])
        elif tensor.nbytes >= 1024:
            own = {p.untyped_storage().data_ptr() for p in model.parameters()}
            assert tensor.untyped_storage().data_ptr() in own
        return kept

    model._offload.pack_hook = pack
    total = scores(model).logprobs.sum()
    assert len(moved) >= 4 * 4
    for tensor in moved:
        tensor.zero_()
    total.backward()
    # Nothing else than what was moved had the activations: with zeros in their place no gradient reaches a projection.
    assert not model.hf.get_submodule("model.layers.1.self_attn.q_proj").weight.grad.any()  # type: ignore[union-attr, operator]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"activation_checkpointing": "half"}, "activation_checkpointing: unknown value 'half'; allowed: true, false"),
        ({"activation_checkpointing": 0}, "activation_checkpointing: 0 is not allowed"),
        ({"activation_checkpointing": -2}, "activation_checkpointing: -2 is not allowed"),
        ({"activation_checkpointing": "selective", "compile": True}, "selective does not go with compile"),
    ],
)
def test_refused_in_one_line(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build(Backbone(config=TINY, **values))
    assert "\n" not in str(caught.value)


def test_which_blocks_are_computed_again() -> None:
    assert [list(recomputed(how, 5)) for how in (False, True, "selective", 1, 2, 3)] == [
        [], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 1, 2, 3, 4], [0, 2, 4], [0, 3],
    ]  # fmt: skip


def test_the_estimate_of_memory_knows_of_them() -> None:
    config = Backbone(config={**FOUR, "num_hidden_layers": 12}).check(vocabulary=260, sequence_length=64)
    sizes = {how: activation_bytes(config, 512, activation_checkpointing=how) for how in (False, 2, "selective", True)}
    assert sizes[False] > sizes[2] > sizes[True]
    assert sizes[False] > sizes["selective"] > sizes[True]
    block = (sizes[False] - activation_bytes(config, 512, offload=True)) / 11
    inputs = 512 * config.hidden_size * 4
    assert sizes[True] == pytest.approx(sizes[False] - 11 * (block - inputs))
    assert sizes[2] == pytest.approx(sizes[False] - 6 * (block - inputs))


def test_the_estimate_of_selective_is_what_torch_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own store of the outputs that are not computed again, block by block."""
    stores: list[Any] = []
    original = torch.utils.checkpoint.create_selective_checkpoint_contexts

    def contexts(operators: Any) -> Any:
        made = original(operators)
        stores.append(made[0].storage)
        return made

    monkeypatch.setattr(torch.utils.checkpoint, "create_selective_checkpoint_contexts", contexts)
    model = build(Backbone(config=FOUR, activation_checkpointing="selective")).train()
    ids = torch.arange(12)[None]
    model.hidden_states(ids, ids)
    kept = [entry for store in stores for calls in store.values() for entry in calls.values()]
    leaves = [leaf.val for entry in kept for leaf in torch.utils._pytree.tree_leaves(entry) if hasattr(leaf, "val")]
    measured = sum(value.nbytes for value in leaves if isinstance(value, torch.Tensor))
    config = Backbone(config=FOUR).check(vocabulary=260, sequence_length=16)
    selective, full = (activation_bytes(config, 12, activation_checkpointing=how) for how in ("selective", True))
    assert selective - full == pytest.approx(3 / 4 * measured)


@pytest.mark.gpu
def test_offload_on_a_gpu_gives_the_same_gradients_in_less_memory() -> None:
    big = {**FOUR, "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8}
    peaks, found = [], []
    for offload in (False, True):
        model = build(Backbone(config=big, activation_offload=offload)).train().cuda()
        ids = torch.arange(16, device="cuda").repeat(64, 1)
        torch.cuda.reset_peak_memory_stats()
        model.hidden_states(ids, ids).square().mean().backward()
        peaks.append(torch.cuda.max_memory_allocated())
        found.append([p.grad.cpu() for p in model.hf.base_model.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert peaks[1] < peaks[0]
