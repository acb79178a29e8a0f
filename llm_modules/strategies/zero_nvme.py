"""What ZeRO-3 keeps on an NVMe drive (ZeRO-Infinity, arXiv 2104.07857): files, buffers, and what is in memory when."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn

OPTIMIZER_BUFFERS = 5
"""Of a sub-group's size each: weights, gradients and up to three states (AdamW has two, with amsgrad three)."""


def check_request(stage: int, optimizer: bool | str, parameters: bool | str, path: str | None, elements: int) -> None:
    """Whether what is asked for can be done at all.

    Args:
        stage, optimizer, parameters, path, elements: ``ZeroStrategy``'s arguments.

    Raises:
        ValueError: it cannot.
    """
    for name, value in (("offload_optimizer", optimizer), ("offload_parameters", parameters)):
        if value not in (False, True, "nvme"):
            raise ValueError(f"strategy.{name}: {value!r} is not allowed; true (host memory), false or nvme")
    if "nvme" not in (optimizer, parameters):
        if path is not None:
            raise ValueError("strategy.nvme_path: nothing is kept there; set offload_optimizer to nvme")
        return
    if stage != 3:
        raise ValueError("strategy.offload_optimizer: nvme needs stage 3; in the others true (host memory) is allowed")
    if optimizer != "nvme":
        raise ValueError(
            "strategy.offload_parameters: nvme needs offload_optimizer nvme, too; the optimizer's state is larger"
        )
    if path is None:
        raise ValueError("strategy.nvme_path: is needed with nvme: a folder on such a drive, on each machine")
    if elements < 1:
        raise ValueError(f"strategy.swap_elements: {elements} is not allowed; 1 or more")


def refuse_without_libaio() -> None:
    """DeepSpeed compiles its operator when it is first used, and says little if it cannot.

    Raises:
        ValueError: what it is compiled with is not there.
    """
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    if installed_ops.get(AsyncIOBuilder.NAME):
        return
    found = {
        "libaio-dev": AsyncIOBuilder().is_compatible(verbose=False),
        "g++": shutil.which(os.environ.get("CXX", "c++")),
        "ninja-build": cpp_extension.is_ninja_available(),
    }
    if missing := [package for package, there in found.items() if not there]:
        raise ValueError(
            "strategy.offload_optimizer: nvme compiles DeepSpeed's async_io operator, for which something is missing: "
            f"apt install {' '.join(missing)}"
        )
    if torch.cuda.is_available() and cpp_extension.CUDA_HOME is None:
        raise ValueError(
            "strategy.offload_optimizer: nvme compiles against the CUDA toolkit; set CUDA_HOME to its folder"
        )


def swap_folder(owner: Any, path: str, rank: int) -> str:
    """A folder that no other rank or run has, removed with its owner or when the process ends (not when it is killed).

    Args:
        owner: whose end is the folder's.
        path: where it is made.
        rank: for its name.

    Raises:
        ValueError: nothing can be written there, or not past the page cache, as DeepSpeed writes.
    """
    try:
        folder = tempfile.mkdtemp(prefix=f"litrecipes-rank{rank}-", dir=path)
        weakref.finalize(owner, _remove, folder, os.getpid())
        os.close(os.open(os.path.join(folder, "try"), os.O_CREAT | os.O_WRONLY | os.O_DIRECT))
    except OSError as error:
        raise ValueError(
            f"strategy.nvme_path: {path!r}: {error.strerror}; a folder that can be written to is needed, on a file "
            "system with direct input and output (O_DIRECT)"
        ) from error
    return folder


def _remove(folder: str, pid: int) -> None:
    if os.getpid() == pid:  # a forked worker has the owner, too
        shutil.rmtree(folder, ignore_errors=True)


def prepare_weights(config: dict[str, Any], model: nn.Module, world: int) -> None:
    """Sets DeepSpeed up for weights that are kept in files, where the config asks for it.

    Args:
        config: DeepSpeed's, changed in place.
        model: with whole weights.
        world: how many ranks share each weight.

    Raises:
        ValueError: a weight is of a kind that cannot be swapped.
    """
    settings = config["zero_optimization"]
    offload = settings.get("offload_param", {})
    if offload.get("device") != "nvme":
        return
    if any(not parameter.is_floating_point() for parameter in model.parameters()):
        raise ValueError("strategy.offload_parameters: nvme keeps no quantized weights; true (host memory) is allowed")
    offload["buffer_size"] = max(-(-parameter.numel() // world) for parameter in model.parameters())
    offload["max_in_cpu"] = 0  # else all weights stay in host memory up to a billion
    settings["stage3_max_reuse_distance"] = 0  # a weight that waits for its next use keeps its buffer
    if not any(config.get(kind, {}).get("enabled") for kind in ("bf16", "fp16")):
        import deepspeed

        # DeepSpeed would do so itself, with buffers of bf16 for weights of fp32 where a CPU has no fp16.
        deepspeed.zero.Init(module=model, config_dict_or_path=config)


def refuse_optimizer(optimizer: Any) -> None:
    """DeepSpeed swaps states of fp32, of the partition's size, that the first step makes, through a few buffers.

    Raises:
        ValueError: the optimizer is not known to have no others.
    """
    kind = type(optimizer)
    if not kind.__module__.startswith("torch.optim.") or isinstance(optimizer, torch.optim.Adagrad):
        raise ValueError(
            f"strategy.offload_optimizer: nvme swaps the states of torch.optim's optimizers (Adagrad's apart), not of "
            f"{kind.__name__}; true (host memory) is allowed"
        )


def warn_if_nothing_is_swapped(zero: Any, model: nn.Module) -> None:
    """DeepSpeed leaves in memory what is smaller than a block of 1 MiB."""
    swapped = any(zero._swappable_optimizer_subgroup(number) for number in range(len(zero.fp16_groups)))
    parts = (parameter.ds_tensor for parameter in model.parameters())  # type: ignore[attr-defined]
    if not swapped and not any(part.final_location == "nvme" for part in parts):
        rank_zero_warn("strategy.offload_optimizer: nvme: each device's parts are below 1 MiB, so all stay in memory")


class SwappedParts:
    """This rank's parts of fp32 weights and of their states, of one sub-group at a time in memory.

    DeepSpeed's own functions read the whole sub-group from the drive for each tensor of each parameter, and write it
    anew for each that is set: parameters should come in the order of their sub-groups.

    Args:
        model: trained by DeepSpeed.
        changed: parts are written to the drive when the next sub-group comes.

    Attributes:
        used: there is something that is swapped; if not, nothing here has to be called.
    """

    def __init__(self, model: nn.Module, changed: bool = False) -> None:
        linked = (getattr(parameter, "_z3_optimizer", None) for parameter in model.parameters())
        self._zero: Any = next((zero for zero in linked if zero is not None), None)
        self.used = getattr(self._zero, "optimizer_swapper", None) is not None
        self._changed = changed
        self._present: int | None = None

    def __enter__(self) -> SwappedParts:
        return self

    def __exit__(self, *error: Any) -> None:
        self._bring(None)

    def sub_group(self, value: Any) -> int:
        """The number of a trained parameter's; -1 for others."""
        if not self.used or not isinstance(value, nn.Parameter) or not value.requires_grad:
            return -1
        return int(self._zero.grad_position[self._zero.get_param_id(value)][0])

    def part(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """The weight's part, or that of a state of it; to be read or set before the next sub-group comes."""
        number, offset, count = self._zero.grad_position[self._zero.get_param_id(parameter)]
        self._bring(number)
        partition = self._zero.fp32_partitioned_groups_flat[number]
        flat: Tensor = partition if key is None else self._zero.optimizer.state[partition][key]
        return flat.detach().narrow(0, offset, count)

    def whole(self, parameter: nn.Parameter, key: str | None = None) -> Tensor:
        """Gathered from all ranks, which all call it."""
        from deepspeed.accelerator import get_accelerator

        part = self.part(parameter, key).to(get_accelerator().current_device_name())
        whole: Tensor = self._zero._fp32_state_allgather(parameter, part)
        return whole

    def _bring(self, number: int | None) -> None:
        if number == self._present:
            return
        if self._present is not None:
            _put_away(self._zero, self._present, self._changed)
        self._present = number
        if number is not None and self._zero._swappable_optimizer_subgroup(number):
            self._zero._optimizer_states_and_gradient_swap_in(number)


def _put_away(zero: Any, number: int, changed: bool) -> None:
    if not zero._swappable_optimizer_subgroup(number):
        return
    if changed:
        zero._optimizer_states_and_gradient_swap_out(number)
    else:
        zero._release_swap_buffers(number)


@contextmanager
def in_memory(zero: Any, partition: Tensor) -> Iterator[None]:
    """Inside, a partition of ZeRO's is in memory with its states; afterwards on the drive, with states that are new."""
    if getattr(zero, "optimizer_swapper", None) is None:
        yield
        return
    number = next(i for i, flat in enumerate(zero.fp32_partitioned_groups_flat) if flat is partition)
    if zero._swappable_optimizer_subgroup(number):
        zero._optimizer_states_and_gradient_swap_in(number)
    yield
    _put_away(zero, number, changed=True)


def forget_swapped_states(zero: Any) -> None:
    """Before states are replaced: DeepSpeed would go on with the tensors that it has listed."""
    if getattr(zero, "optimizer_swapper", None) is not None:
        zero.optimizer_swapper.purge_state()
