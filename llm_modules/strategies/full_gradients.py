"""The whole gradient of each trained parameter, gathered from wherever a strategy keeps its parts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from llm_modules.strategies.full_state import clean_name


def full_gradients(strategy: Any, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and whole gradient of each trained parameter, as this rank has it; zeros where it has none.

    Between the last backward pass of an optimizer step and the step. All ranks iterate to the end: gathering is
    collective. What a strategy keeps whole on every rank (ddp, replicas) comes as it is on this rank, unchecked.

    Args:
        strategy: Lightning's or ours.
        module: the LightningModule.

    Raises:
        ValueError: the strategy gives no gradients out.
    """
    if isinstance(strategy, FSDPStrategy):
        yield from _of_flat_shards(strategy.model)
        return
    gradient = _of_zero if isinstance(strategy, DeepSpeedStrategy) else _of_tensor
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            yield clean_name(name), gradient(clean_name(name), parameter)


def _of_tensor(name: str, parameter: Tensor) -> Tensor:
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(parameter.shape, device=parameter.device)
    # Of a norm under tensor parallelism each rank has a summand; `full_tensor` adds them.
    return gradient.full_tensor() if isinstance(gradient, DTensor) else gradient


def _of_zero(name: str, parameter: Tensor) -> Tensor:
    from deepspeed.utils import safe_get_full_grad

    # What is left in `grad` is this rank's own, and DeepSpeed would return it unreduced.
    staged, parameter.grad = parameter.grad, None
    try:
        gradient = safe_get_full_grad(parameter)
    finally:
        parameter.grad = staged
    if gradient is None:
        raise ValueError(f"strategy: DeepSpeed gives no gradient of {name} out in this configuration")
    return gradient


def _of_flat_shards(model: Any) -> Iterator[tuple[str, Tensor]]:
    """FSDP1's, unit by unit, so that no more than a unit is whole at a time."""
    from torch.distributed.fsdp import FullyShardedDataParallel as FSDP

    units = FSDP.fsdp_modules(model)
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    seen: set[int] = set()
    for unit in reversed(units):  # inner ones first: an outer one then has left what is its own
        with FSDP.summon_full_params(unit, recurse=False, writeback=False, with_grads=True):
            for parameter in unit.parameters():
                key = id(parameter)
                if key in seen or key not in trained:
                    continue
                seen.add(key)
                yield names[key], _of_tensor(names[key], parameter)
