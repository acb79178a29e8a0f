"""How a model is spread over a mesh of devices: tensor parallelism by transformers' own plan, and FSDP2's shards."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

_UNTOUCHED = ("replicate", "embedding_rowwise", "embedding_colwise")
"""Entries of plans that are left whole on every rank: correct, and small beside the blocks."""


def spread(model: Any, mesh: DeviceMesh, strategy: Any) -> None:
    """Split a built model over a mesh of devices: tensor parallelism within, FSDP2 across.

    Args:
        model: a ``CausalLM``.
        mesh: with the dimensions ``data_parallel`` (over which weights are sharded) and ``tensor_parallel``.
        strategy: says how to shard (see ``ShardedStrategy``).
    """
    tensor, data = mesh["tensor_parallel"], mesh["data_parallel"]
    if (context := getattr(strategy, "context_mesh", None)) is not None:
        model.split_positions(context.get_group(), tensor.size())
    if tensor.size() > 1:
        if model.virtual is not None and model.virtual.is_prefix:
            raise ValueError(
                "strategy: prefix tuning makes keys and values of all heads, which tensor parallelism splits; use "
                "adapters/prompt, or strategies/fsdp2"
            )
        parallelize(model.hf, tensor)
    if data.size() > 1 or tensor.size() == 1:
        reshard, offload = getattr(strategy, "reshard_after_forward", True), getattr(strategy, "offload", False)
        shard(model, model.blocks(), data, reshard=reshard, offload=offload)
        prefetch(model.blocks(), getattr(strategy, "prefetch", 0))


def shard(
    model: nn.Module, blocks: Iterable[nn.Module], mesh: DeviceMesh, *, reshard: bool = True, offload: bool = False
) -> None:
    """FSDP2 (arXiv 2304.11277, per-parameter): each block a unit, the rest of the model one more.

    Args:
        model: the root; all weights are used inside its forward.
        blocks: decoder blocks, in order.
        mesh: the data-parallel dimension.
        reshard: free a block's whole weights after its forward (ZeRO-3); False keeps them until the backward (ZeRO-2).
        offload: keep shards and optimizer state in host memory.
    """
    policy: OffloadPolicy = CPUOffloadPolicy() if offload else OffloadPolicy()
    for block in blocks:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard, offload_policy=policy)


def prefetch(blocks: Sequence[Any], count: int) -> None:
    """Gather the weights of the next ``count`` FSDP2 blocks while one computes; 0: leave it to torch.

    By itself torch gathers the next block early in the backward pass, and in the forward pass when the CPU comes to it,
    which is early enough only where the CPU is far ahead of the device.
    """
    if count == 0:
        return
    for number, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(list(blocks[number + 1 : number + 1 + count]))
        block.set_modules_to_backward_prefetch(list(reversed(blocks[max(0, number - count) : number])))


def parallelize(hf: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism (Megatron-LM, arXiv 1909.08053) by the family's own plan, LoRA's A and B included.

    A bottleneck behind a projection is whole on every rank.
    Embeddings, the head, and routers with their experts stay whole on every rank: each rank computes all experts on the
    same hidden states, so that their gradients are equal without communication. (FSDP2 spreads them.)

    Args:
        hf: transformers' ``...ForCausalLM``.
        mesh: the tensor-parallel dimension.

    Raises:
        ValueError: the family has no plan, one with styles that are not known here, or sizes that do not divide.
    """
    check_tensor_parallel(hf.config, hf.tp_plan, mesh.size())
    if any(not parameter.is_floating_point() for parameter in hf.parameters()):
        raise ValueError(
            "strategy: a quantized base cannot be split by tensor parallelism, its packed weights have no columns; use "
            "strategies/fsdp2, or leave backbone.quantization out"
        )
    plan = hf.tp_plan
    head = hf.get_output_embeddings()
    for name, module in hf.named_modules():
        style = plan.get(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name))
        if style is None or style in _UNTOUCHED or module is head or _of_experts(name):
            continue
        for part, how in _parts(name, module, style).items():
            parallelize_module(hf.get_submodule(part), mesh, how)


def check_tensor_parallel(config: Any, plan: dict[str, str] | None, size: int) -> None:
    """Find out before any weight is made whether a model can be split over ``size`` devices.

    Raises:
        ValueError: one line that says why not.
    """
    if size == 1:
        return
    kind = config.model_type
    inside = {name: style for name, style in (plan or {}).items() if "layers" in name.split(".")}
    if not inside:
        raise ValueError(
            f"strategy: {kind!r} has no tensor-parallel plan in transformers; use strategies/fsdp2 (tensor_parallel: 1)"
        )
    split = [style for name, style in inside.items() if style not in _UNTOUCHED and not _of_experts(name)]
    unknown = sorted({style for style in split if style not in _STYLES})
    if unknown:
        raise ValueError(
            f"strategy: the tensor-parallel plan of {kind!r} has {', '.join(unknown)}, which is not supported; use "
            "strategies/fsdp2 (tensor_parallel: 1)"
        )
    text = config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads", "intermediate_size"):
        value = getattr(text, name, None)
        if isinstance(value, int) and value % size:
            raise ValueError(
                f"strategy: tensor_parallel {size} does not divide the model's {name} {value}; allowed: its divisors"
            )


_STYLES: dict[str, Any] = {
    "colwise": ColwiseParallel,
    "rowwise": RowwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    # A norm over each head's dimension: its input is split by heads, its weight is whole, its gradient to be summed.
    "replicated_with_grad_allreduce": lambda: SequenceParallel(sequence_dim=2, use_local_output=True),
}


def _of_experts(name: str) -> bool:
    """Whether a plan's entry is about the stacked experts: parameters of three dimensions, left whole."""
    return "experts" in name.split(".")


def _parts(name: str, module: nn.Module, style: str) -> dict[str, ParallelStyle]:
    """Which modules are split how: the planned one, or the parts of an adapter around it."""
    if not hasattr(module, "base_layer"):
        return {name: _STYLES[style]()}
    if hasattr(module, "adapter_down") and style == "rowwise":
        return {f"{name}.base_layer": _STYLES[style]()}  # a bottleneck acts on the whole output: whole on every rank
    kinds = {kind for kind in ("lora_A", "lora_B") if getattr(module, kind, None)}
    others = [
        part for part, child in module.named_children() if part not in _LORA and any(True for _ in child.parameters())
    ]
    if kinds != {"lora_A", "lora_B"} or others or style not in ("colwise", "rowwise"):
        raise ValueError(
            f"strategy: adapter {type(module).__name__} with {', '.join(others) or style} on {name} cannot be split by "
            "tensor parallelism; use adapters/lora, rslora or pissa, or strategies/fsdp2"
        )
    parts = {f"{name}.base_layer": _STYLES[style]()}
    # A maps into few dimensions and B out of them: B is split like the columns of what it is added to, A like the rows.
    split, how = ("lora_B", ColwiseParallel) if style == "colwise" else ("lora_A", RowwiseParallel)
    for adapter in getattr(module, split):
        parts[f"{name}.{split}.{adapter}"] = how()
    return parts


_LORA = ("base_layer", "lora_A", "lora_B", "lora_dropout")
