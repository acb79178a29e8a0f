"""Weights and optimizer state of a model that is spread over ranks, as those of one process, and back.

A checkpoint has one form whatever the strategy: the whole state dict by parameter name, and the optimizer's state by
position in the optimizer's groups, as `torch.optim.Optimizer.state_dict` has it. So what was saved under one strategy
and number of processes is resumed under any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from llm_modules.strategies.shards import ShardedOptimizerState, ShardedWeights, read_parts

_WRAPPERS = ("_fsdp_wrapped_module.", "_orig_mod.", "_checkpoint_wrapped_module.")


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in _WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def full_weights(model: nn.Module, device: torch.device, in_parts: bool = False) -> dict[str, Tensor]:
    """The whole state dict, on the CPU; all ranks call it, rank 0 has the result.

    Args:
        in_parts: as it is spread, each rank its part.
    """
    return get_model_state_dict(model, options=None if in_parts else _options(device))  # type: ignore[return-value]


def full_optimizer_state(
    model: nn.Module, optimizer: Optimizer, device: torch.device, in_parts: bool = False
) -> dict[str, Any]:
    """What the optimizer's own ``state_dict`` would be in one process; all ranks call it, rank 0 has the result.

    Args:
        in_parts: as it is spread, each rank its part.
    """
    options = None if in_parts else _options(device)
    by_name: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    if not by_name:
        return {}
    number = {name: i for i, name in enumerate(_names(model, optimizer))}
    state = {number[clean_name(name)]: values for name, values in by_name["state"].items()}
    groups: list[dict[str, Any]] = []
    for group in optimizer.param_groups:
        start = sum(len(earlier["params"]) for earlier in groups)
        positions = list(range(start, start + len(group["params"])))
        groups.append({**{key: value for key, value in group.items() if key != "params"}, "params": positions})
    return {"state": dict(sorted(state.items())), "param_groups": groups}


def load_weights_from_shards(model: nn.Module, saved: ShardedWeights, strict: bool) -> None:
    """Each rank reads its part from a checkpoint in shards.

    Raises:
        ValueError: names are missing or unknown.
    """
    state: dict[str, Any] = get_model_state_dict(model)
    if strict and set(state) != set(saved):
        missing, unknown = sorted(set(state) - set(saved)), sorted(set(saved) - set(state))
        raise ValueError(f"ckpt_path: weights of another model: missing {missing[:3]}, unknown {unknown[:3]}")
    read_parts(saved.reader, [(saved.key(name), value) for name, value in state.items() if name in saved])
    set_model_state_dict(model, state, options=StateDictOptions(strict=strict))


def load_full_weights(model: nn.Module, weights: Mapping[str, Any], strict: bool) -> None:
    """Each rank takes its part of the whole state dict, which every rank has."""
    options = StateDictOptions(full_state_dict=True, strict=strict)
    set_model_state_dict(model, dict(weights), options=options)


def load_full_optimizer_state(model: nn.Module, optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Each rank takes its part of an optimizer's whole state, which every rank has.

    Raises:
        ValueError: the state is of other groups of parameters.
    """
    names = _names(model, optimizer)
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        raise ValueError(
            f"ckpt_path: the checkpoint's optimizer has groups of {sizes} parameters, this run's of "
            f"{[len(group['params']) for group in optimizer.param_groups]}"
        )
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in saved["param_groups"]]
    shards = saved["state"] if isinstance(saved["state"], ShardedOptimizerState) else None
    if shards is None:
        state: dict[str, Any] = {names[number]: values for number, values in saved["state"].items()}
    else:
        state = _own_part(get_optimizer_state_dict(model, optimizer)["state"], shards, names)
    options = StateDictOptions(full_state_dict=shards is None)
    set_optimizer_state_dict(model, optimizer, {"state": state, "param_groups": groups}, options=options)


def _own_part(empty: Any, shards: ShardedOptimizerState, names: list[str]) -> dict[str, Any]:
    """This rank's part of an optimizer's state, by name, read from shards into the ``empty`` one."""
    state: dict[str, Any] = {}
    wanted: list[tuple[str, Any]] = []
    for position, small in shards.small.items():
        values = {key: empty[names[position]][key] for key in shards.keys_of[position]}
        wanted += [(shards.keys_of[position][key], value) for key, value in values.items()]
        state[names[position]] = {**small, **values}
    read_parts(shards.reader, wanted)
    return state


def _names(model: nn.Module, optimizer: Optimizer) -> list[str]:
    """Names of the optimizer's parameters, in the order of its groups."""
    of_parameter = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    return [of_parameter[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _options(device: torch.device) -> StateDictOptions:
    # FSDP1 crashes the process when it is to move to a CPU what is on one.
    return StateDictOptions(full_state_dict=True, cpu_offload=device.type != "cpu")


@contextmanager
def nothing_left_out(model: nn.Module) -> Iterator[None]:
    """Inside, models that keep only what is trained give every parameter (see ``zoo.trained_state``)."""
    owners: list[Any] = [module for module in model.modules() if hasattr(module, "whole_state")]
    for owner in owners:
        owner.whole_state = True
    try:
        yield
    finally:
        for owner in owners:
            owner.whole_state = False


class WholeCheckpoints:
    """The part of a strategy that makes its checkpoints whole; written and read by the run's CheckpointIO plugin."""

    model: Any
    root_device: Any
    optimizers: Any
    in_parts = False  # see shards.states_in_parts

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return full_weights(self.model, self.root_device, self.in_parts)

    def whole_weights(self) -> dict[str, Tensor]:
        """Every parameter, by name, on every rank and its device; all ranks call it."""
        with nothing_left_out(self.model):
            return get_model_state_dict(self.model, options=StateDictOptions(full_state_dict=True))  # type: ignore[return-value]

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        own = getattr(optimizer, "_optimizer", optimizer)
        return full_optimizer_state(self.model, own, self.root_device, self.in_parts)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)  # type: ignore[arg-type]

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)  # type: ignore[arg-type]

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        weights = checkpoint["state_dict"]
        if isinstance(weights, ShardedWeights):
            load_weights_from_shards(self.model, weights, strict)
        else:
            load_full_weights(self.model, weights, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            load_full_optimizer_state(self.model, optimizer, state)
