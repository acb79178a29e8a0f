"""DeepSpeed ZeRO 1, 2 and 3, also on CPUs; checkpoints of one form."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy
from lightning.pytorch.strategies.ddp import DDPStrategy
from lightning.pytorch.strategies.deepspeed import remove_module_hooks
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.optim import Optimizer

from llm_modules.strategies.zero_nvme import (
    OPTIMIZER_BUFFERS,
    check_request,
    prepare_weights,
    refuse_optimizer,
    refuse_without_libaio,
    swap_folder,
    warn_if_nothing_is_swapped,
)
from llm_modules.strategies.zero_operators import say_who_compiles
from llm_modules.strategies.zero_state import (
    gathered_weights,
    load_zero_optimizer_state,
    load_zero_weights,
    zero_optimizer_state,
    zero_weights,
)


class ZeroStrategy(DeepSpeedStrategy):
    """DeepSpeed's ZeRO (arXiv 1910.02054) in one of its stages.

    Args:
        stage: what is spread over the devices: 1: the optimizer's state; 2: gradients too; 3: weights too.
        offload_optimizer: keep the optimizer's state in host memory, and step there; ``nvme``: keep it in files, and
            have one sub-group of it in host memory at a time (stage 3).
        offload_parameters: keep the weights in host memory between their uses (stage 3); ``nvme``: in files.
        nvme_path: a folder on an NVMe drive, on each machine, for the files of this run; they are removed when it ends.
        swap_elements: weights of a sub-group; with ``nvme``, host memory holds five numbers (fp32) for each.
        bucket_elements: gradients that are reduced together, in elements: larger is faster and takes more memory.
        overlap: reduce gradients while the backward pass goes on (GPUs).
    """

    flattens = True
    in_parts = False  # see shards.states_in_parts

    def __init__(
        self,
        stage: Literal[1, 2, 3] = 2,
        offload_optimizer: bool | Literal["nvme"] = False,
        offload_parameters: bool | Literal["nvme"] = False,
        nvme_path: str | None = None,
        swap_elements: int = 100_000_000,
        bucket_elements: int = 200_000_000,
        overlap: bool = True,
    ) -> None:
        if stage not in (1, 2, 3):
            raise ValueError(f"strategy.stage: {stage!r} is not allowed; 1, 2 or 3")
        if offload_parameters and stage != 3:
            raise ValueError(
                "strategy.offload_parameters: needs stage 3; in the others each device has all the weights"
            )
        check_request(stage, offload_optimizer, offload_parameters, nvme_path, swap_elements)
        find_deepspeed()
        super().__init__(
            stage=stage,
            offload_optimizer=bool(offload_optimizer),
            offload_optimizer_device="nvme" if offload_optimizer == "nvme" else "cpu",
            optimizer_buffer_count=OPTIMIZER_BUFFERS,
            offload_parameters=bool(offload_parameters),
            offload_params_device="nvme" if offload_parameters == "nvme" else "cpu",
            sub_group_size=swap_elements if offload_optimizer == "nvme" else 1_000_000_000_000,
            allgather_bucket_size=bucket_elements,
            reduce_bucket_size=bucket_elements,
            overlap_comm=overlap and torch.cuda.is_available(),
        )
        self.stage = stage
        self.spreads_weights = stage == 3
        self.nvme_path = nvme_path
        assert isinstance(self.config, dict)
        self.config["zero_force_ds_cpu_optimizer"] = False  # the config's own optimizer, whichever it is
        self._groups: list[list[str]] = []

    # --- on a CPU

    def setup_environment(self) -> None:
        if isinstance(self.accelerator, CPUAccelerator):
            DDPStrategy.setup_environment(self)  # Lightning's own refuses a CPU; DeepSpeed does not
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if self.local_rank == 0:
            say_who_compiles()
        if isinstance(self.accelerator, CPUAccelerator):
            self.set_world_ranks()  # Lightning's own asks for indices of devices, which a CPU has not
            self._init_deepspeed_distributed()
        else:
            super().setup_distributed()
        if self.nvme_path is not None:
            self._prepare_swapping(self.nvme_path)

    def _prepare_swapping(self, path: str) -> None:
        refuse_without_libaio()
        assert isinstance(self.config, dict)
        folder = swap_folder(self, path, self.global_rank)
        for part in ("offload_optimizer", "offload_param"):
            if part in self.config["zero_optimization"]:
                self.config["zero_optimization"][part]["nvme_path"] = folder

    def _setup_model_and_optimizer(self, model: nn.Module, optimizer: Any, lr_scheduler: Any = None) -> Any:
        import deepspeed

        names = {id(parameter): name for name, parameter in model.named_parameters()}
        if self.nvme_path is not None:
            assert isinstance(self.config, dict)
            refuse_optimizer(optimizer)
            prepare_weights(self.config, model, self.world_size)
        self._groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        engine, zero, _, _ = deepspeed.initialize(
            config=self.config,
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=optimizer,
            lr_scheduler=lr_scheduler,
            dist_init_required=False,
        )
        if self.nvme_path is not None:
            warn_if_nothing_is_swapped(zero, model)
        return engine, zero

    def _initialize_deepspeed_inference(self, model: nn.Module) -> None:
        """For validate, test and predict. (Lightning tells DeepSpeed the index of a device, which a CPU has not.)"""
        import deepspeed

        assert isinstance(self.config, dict)
        if self.nvme_path is not None:
            prepare_weights(self.config, model, self.world_size)
        config = {"train_micro_batch_size_per_gpu": 1}  # which is asked for, and used to train only
        kept = ["fp16", "bf16"] + ["zero_optimization", "zero_allow_untested_optimizer"] * self.spreads_weights
        config |= {key: self.config[key] for key in kept if key in self.config}
        remove_module_hooks(model)  # of the fit before it
        self.model, _, _, _ = deepspeed.initialize(
            config=config, model=model, model_parameters=[], dist_init_required=False
        )

    # --- weights

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """The weights are made whole, then spread: under DeepSpeed's own context a model that transformers makes from a
        config silently gets other initial weights."""
        self._init_config_if_needed()
        yield

    # --- checkpoints: whole, of the form that every strategy reads; written by the CheckpointIO plugin

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return zero_weights(self.lightning_module, self.in_parts)

    def whole_weights(self) -> dict[str, Tensor]:
        """Every parameter as forward passes have it, by name, on every rank; all ranks call it."""
        assert self.lightning_module is not None
        # Of a step that did not use the weights, DeepSpeed may still be gathering some.
        self.deepspeed_engine.empty_partition_cache()
        return gathered_weights(self.lightning_module)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        assert self.lightning_module is not None
        return zero_optimizer_state(self.lightning_module, self.deepspeed_engine.optimizer, self._groups, self.in_parts)

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_zero_weights(self.lightning_module, checkpoint["state_dict"], strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        assert self.lightning_module is not None
        (state,) = checkpoint["optimizer_states"]
        load_zero_optimizer_state(self.lightning_module, self.deepspeed_engine.optimizer, self._groups, state)

    @property
    def gradient_norm(self) -> Tensor | None:
        """The norm of the last step's gradient, before clipping."""
        norm = self.deepspeed_engine.get_global_grad_norm()
        return None if norm is None else torch.as_tensor(float(norm))


def find_deepspeed() -> None:
    """Tells DeepSpeed that there is only a CPU before it is first imported: it decides then.

    Raises:
        ValueError: it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed  # noqa: F401
    except ImportError as error:
        raise ValueError("strategy: ZeRO needs DeepSpeed; pip install 'litrecipes[deepspeed]'") from error
