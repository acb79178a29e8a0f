"""ZeRO's partitions as the state of one process, and back (DeepSpeed's own files are readable by DeepSpeed only)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from llm_modules.strategies.shards import not_mine
from llm_modules.strategies.zero_nvme import SwappedParts, forget_swapped_states, in_memory


def zero_weights(model: nn.Module, in_parts: bool = False) -> dict[str, Tensor]:
    """The whole state dict in the precision that is trained (fp32 where DeepSpeed keeps it); all ranks call it.

    Args:
        in_parts: the parameters are dealt among the ranks, each keeps its own.
    """
    from deepspeed.utils import safe_get_full_fp32_param

    state: dict[str, Tensor] = dict(model.state_dict(keep_vars=True))
    numbers = {name: number for number, name in enumerate(state)}
    with SwappedParts(model) as swapped:
        for name in sorted(state, key=lambda name: swapped.sub_group(state[name])):
            value = state[name]
            if not isinstance(value, nn.Parameter):
                state[name] = value.detach().cpu()
                continue
            whole = None
            if value.requires_grad:
                whole = swapped.whole(value) if swapped.used else safe_get_full_fp32_param(value)
            if whole is None:
                with _gathered(value):
                    whole = value.detach().clone()
            state[name] = _dealt(whole, numbers[name], in_parts)
    return state


def gathered_weights(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter in the precision that forward passes have it in, on every rank; all ranks call it."""
    weights = {}
    for name, parameter in model.named_parameters():
        with _gathered(parameter):
            weights[name] = parameter.detach().clone()
    return weights


def _dealt(whole: Tensor, number: int, in_parts: bool) -> Tensor:
    """A gathered tensor on the CPU; in parts, on one rank only."""
    mine = not in_parts or number % torch.distributed.get_world_size() == torch.distributed.get_rank()
    return whole.cpu() if mine else not_mine(whole)


def load_zero_weights(model: nn.Module, weights: Mapping[str, Tensor], strict: bool) -> None:
    """Each rank takes its part of the whole state dict, which every rank has.

    Raises:
        ValueError: names are missing or unknown.
    """
    own = model.state_dict(keep_vars=True)
    if strict and set(own) != set(weights):
        missing, unknown = sorted(set(own) - set(weights)), sorted(set(weights) - set(own))
        raise ValueError(f"ckpt_path: weights of another model: missing {missing[:3]}, unknown {unknown[:3]}")
    with torch.no_grad(), SwappedParts(model, changed=True) as swapped:
        for name in sorted(own, key=lambda name: swapped.sub_group(own[name])):
            if name not in weights:
                continue
            target = own[name]
            with _gathered(target, modify=True):
                target.data.copy_(weights[name])
            stepped = not hasattr(target, "ds_id") or hasattr(target, "_z3_optimizer")  # not to validate or predict
            if isinstance(target, nn.Parameter) and target.requires_grad and stepped:
                _set_part(target, weights[name], None, swapped)


def zero_optimizer_state(
    model: nn.Module, zero: Any, groups: list[list[str]], in_parts: bool = False
) -> dict[str, Any]:
    """What the optimizer's own ``state_dict`` would be in one process; all ranks call it.

    Args:
        zero: DeepSpeed's optimizer.
        groups: names of the parameters of each of the optimizer's groups.
        in_parts: the parameters' states are dealt among the ranks, each keeps its own.
    """
    parameters = dict(model.named_parameters())
    base = zero.optimizer
    _link(zero)
    state: dict[int, dict[str, Any]] = {}
    described = []
    number = 0
    with SwappedParts(model) as swapped:
        for group, names in zip(base.param_groups, groups, strict=True):
            kept: dict[str, Any] = next((base.state[p] for p in _partitions(zero, base, group) if p in base.state), {})
            for position, name in enumerate(names, number):
                if not kept:
                    continue
                state[position] = {
                    key: _dealt(_whole_state(parameters[name], key, swapped), position, in_parts)
                    if isinstance(value, Tensor) and value.ndim > 0
                    else deepcopy(value)  # the step: torch counts each parameter's by itself
                    for key, value in kept.items()
                }
            settings = {key: value for key, value in group.items() if key != "params"}
            described.append({**settings, "params": list(range(number, number + len(names)))})
            number += len(names)
    return {"state": state, "param_groups": described}


def _whole_state(parameter: nn.Parameter, key: str, swapped: SwappedParts) -> Tensor:
    from deepspeed.utils import safe_get_full_optimizer_state

    return swapped.whole(parameter, key) if swapped.used else safe_get_full_optimizer_state(parameter, key)


def load_zero_optimizer_state(model: nn.Module, zero: Any, groups: list[list[str]], saved: Mapping[str, Any]) -> None:
    """Each rank takes its part of an optimizer's whole state, which every rank has.

    Raises:
        ValueError: the state is of other groups of parameters.
    """
    sizes, own = [len(group["params"]) for group in saved["param_groups"]], [len(names) for names in groups]
    if sizes != own:
        raise ValueError(f"ckpt_path: the checkpoint's optimizer has groups of {sizes} parameters, this run's of {own}")
    parameters = dict(model.named_parameters())
    base = zero.optimizer
    forget_swapped_states(zero)
    for group, names, from_file in zip(base.param_groups, groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in from_file.items() if key != "params"})
        states = [saved["state"][position] for position in from_file["params"] if position in saved["state"]]
        if not states:
            continue
        for partition in _partitions(zero, base, group):
            with in_memory(zero, partition):
                base.state[partition] = {
                    key: torch.zeros_like(partition)
                    if isinstance(value, Tensor) and value.ndim > 0
                    else deepcopy(value)
                    for key, value in states[0].items()
                }
        _link(zero)
        with SwappedParts(model, changed=True) as swapped:
            for name, values in zip(names, states, strict=True):
                for key, value in values.items():
                    if isinstance(value, Tensor) and value.ndim > 0:
                        _set_part(parameters[name], value, key, swapped)


def _partitions(zero: Any, base: Any, group: dict[str, Any]) -> list[Tensor]:
    """The flat fp32 parts of a group that this rank steps."""
    if group["params"]:
        return list(group["params"])
    index = base.param_groups.index(group)  # stage 3 puts them there for the time of a step
    return [
        part
        for sub_group, part in enumerate(zero.fp32_partitioned_groups_flat)
        if zero.sub_group_to_group_id[sub_group] == index
    ]


def _link(zero: Any) -> None:
    """Lets DeepSpeed find each parameter's part of the optimizer's state (stages 1 and 2 do so at some steps only)."""
    if hasattr(zero, "_hp_optimizer_states_linked"):
        for index, lp_params in enumerate(zero.bit16_groups):
            partition = zero.single_partition_of_fp32_groups[index]
            if partition not in zero.optimizer.state:
                continue
            for parameter in lp_params:
                if parameter._hp_mapping is not None:
                    parameter._hp_mapping.set_optim_state_fragment(partition, zero.optimizer.state[partition])


def _set_part(parameter: nn.Parameter, value: Tensor, key: str | None, swapped: SwappedParts) -> None:
    """This rank's part of the fp32 parameter, or of a state of it."""
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if not hasattr(parameter, "ds_id"):
        value = value.to(parameter.device)
        safe_set_full_fp32_param(parameter, value) if key is None else safe_set_full_optimizer_state(
            parameter, value, key
        )
        return
    # DeepSpeed's own function for the whole parameter forgets the padding of the last rank's part.
    size, rank = parameter.ds_tensor.ds_numel, torch.distributed.get_rank()  # type: ignore[attr-defined]
    flat = value.to(parameter.ds_tensor.device).flatten()  # type: ignore[attr-defined]
    part = torch.zeros(size, dtype=flat.dtype, device=flat.device)
    mine = flat[size * rank : size * (rank + 1)]
    part[: len(mine)] = mine
    if swapped.used:
        swapped.part(parameter, key).copy_(part)
    elif key is None:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, key)


@contextmanager
def _gathered(parameter: Tensor, modify: bool = False) -> Iterator[None]:
    """Inside, a parameter that stage 3 has spread is whole."""
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0 if modify else None):
        yield
