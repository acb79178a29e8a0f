"""Whether this machine, and the processes that a launcher has started, can run what a recipe asks of the Trainer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from recipes.cluster_world import find_world
from recipes.compose import Composed
from recipes.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

_GPU = ("gpu", "cuda")


def check_gpus(composed: Composed, accelerator: Any, devices: Any) -> None:
    """Before the Trainer is built: are there the GPUs that it is to take?

    Args:
        accelerator: ``trainer.accelerator``.
        devices: ``trainer.devices``: how many, or a list of their numbers, or ``auto``.

    Raises:
        UserError: there are not.
    """
    if accelerator not in _GPU or (accelerator == "gpu" and torch.backends.mps.is_available()):
        return
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if count == 0:
        place = composed.origin(("trainer", "accelerator"))
        raise UserError(
            f"{place}: `trainer.accelerator` is {accelerator}, but torch {torch.__version__} sees no GPU on this "
            "machine (`nvidia-smi` shows whether there is one); write auto or cpu"
        )
    numbers = devices if isinstance(devices, list) else [devices - 1] if isinstance(devices, int) else []
    if numbers and max(numbers) >= count:
        place = composed.origin(("trainer", "devices"))
        raise UserError(
            f"{place}: `trainer.devices` is {devices}, but this machine has {count} GPU{'s' * (count > 1)}, numbered "
            f"from 0; write {count} or auto"
        )


def check_strategy(composed: Composed, trainer: Trainer) -> None:
    """When the Trainer is built: do its strategy, its devices and the launcher's processes go together?

    Raises:
        UserError: they do not.
    """
    size = trainer.num_devices * trainer.num_nodes
    started = find_world().size
    if started > 1 and not started == size == trainer.world_size:  # on one device each would train alone
        place = composed.origin(("trainer", "devices"))
        raise UserError(
            f"{place}: a launcher started {started} processes, but trainer.devices x trainer.num_nodes is {size}; set "
            "both to what was started (recipes launch torchrun does), and take a strategy for several processes"
        )
    _check_kind(composed, trainer)
    _check_sides(composed, trainer.strategy, size)


def _check_kind(composed: Composed, trainer: Trainer) -> None:
    from lightning.pytorch.accelerators import CPUAccelerator
    from lightning.pytorch.strategies import DeepSpeedStrategy
    from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

    from llm_modules.strategies import ZeroStrategy

    place, strategy = composed.origin(("trainer", "strategy")), trainer.strategy
    if isinstance(getattr(strategy, "launcher", None), _MultiProcessingLauncher):
        raise UserError(
            f"{place}: `trainer.strategy`: strategies that spawn or fork from a process cannot hand a run's "
            "checkpoints back to it; use -c strategies/ddp"
        )
    if "HYBRID" in str(getattr(strategy, "sharding_strategy", "")) and isinstance(trainer.accelerator, CPUAccelerator):
        raise UserError(f"{place}: `trainer.strategy`: HYBRID_SHARD is for machines with GPUs; write FULL_SHARD")
    lightnings = isinstance(strategy, DeepSpeedStrategy) and not isinstance(strategy, ZeroStrategy)
    if lightnings and isinstance(trainer.accelerator, CPUAccelerator):
        raise UserError(f"{place}: `trainer.strategy`: Lightning's DeepSpeed needs a GPU; -c strategies/zero2 does not")


def _check_sides(composed: Composed, strategy: Any, size: int) -> None:
    """The sides of a mesh of devices must multiply to their number."""
    place = composed.origin(("trainer", "strategy", "init_args"))
    tensor, data = getattr(strategy, "_tensor_parallel_size", 1), getattr(strategy, "_data_parallel_size", 1)
    ours, sharing = getattr(strategy, "tensor_parallel", None), 1  # of ours the other side follows
    for name in ("tensor_parallel", "context_parallel"):
        side = getattr(strategy, name, 1)
        sharing *= side if isinstance(side, int) else 1
        if size % sharing:
            what = f"is {side}" if side == sharing else f"makes groups of {sharing} devices"
            raise UserError(
                f"{place}: `strategy.{name}` {what}, which does not divide the number of devices, {size}; set "
                "trainer.devices to a multiple of it"
            )
    if ours is None and isinstance(tensor, int) and isinstance(data, int) and tensor * data not in (1, size):
        raise UserError(
            f"{place}: `data_parallel_size` {data} x `tensor_parallel_size` {tensor} is {data * tensor}, but there are "
            f"{size} devices (trainer.devices x trainer.num_nodes)"
        )
