"""FSDP1 (FullyShardedDataParallel), also on CPUs; checkpoints of one form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from llm_modules.strategies.full_state import WholeCheckpoints, clean_name, nothing_left_out


class FSDP1Strategy(WholeCheckpoints, FSDPStrategy):
    """Flat shards of each decoder block's weights (arXiv 2304.11277), as torch had them before FSDP2.

    Args:
        sharding_strategy: what is sharded: FULL_SHARD (weights, gradients, optimizer state), SHARD_GRAD_OP (not the
            weights), NO_SHARD (nothing: as ddp), HYBRID_SHARD (within a machine, replicated across).
        offload: keep shards in host memory between their uses.
        forward_prefetch: gather the next block's weights before the present one computes, in the forward pass too (in
            the backward pass it is always done): more overlap where the CPU is the slower one, more memory.
        process_group_backend: default: nccl on GPUs, gloo on CPUs.
    """

    spreads_weights = True
    flattens = True

    def __init__(
        self,
        sharding_strategy: Literal["FULL_SHARD", "SHARD_GRAD_OP", "NO_SHARD", "HYBRID_SHARD"] = "FULL_SHARD",
        offload: bool = False,
        forward_prefetch: bool = False,
        process_group_backend: str | None = None,
    ) -> None:
        super().__init__(
            sharding_strategy=sharding_strategy,
            cpu_offload=offload,
            process_group_backend=process_group_backend,
            auto_wrap_policy=set(),  # Lightning asks for one where it is HYBRID; `_setup_model` has its own
        )
        self.forward_prefetch = forward_prefetch

    @property
    def shard_group(self) -> Any:
        """The ranks that a gradient's parts are spread over; None where each rank has it whole."""
        from torch.distributed.fsdp import ShardingStrategy

        return None if self.sharding_strategy == ShardingStrategy.NO_SHARD else self.model.process_group  # type: ignore[union-attr]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """FSDP1 wants to see every parameter; of a model that keeps only what is trained, the others go afterwards."""
        assert self.lightning_module is not None
        if not hasattr(self.lightning_module.model, "whole_state"):
            return super().lightning_module_state_dict()
        trained = {clean_name(name) for name, p in self.lightning_module.named_parameters() if p.requires_grad}
        with nothing_left_out(self.lightning_module):
            weights = super().lightning_module_state_dict()
        return {name: value for name, value in weights.items() if name in trained}

    def whole_weights(self) -> dict[str, Tensor]:
        """As forward passes have them: FSDP1 casts them itself."""
        dtype = self.mixed_precision_config.param_dtype if self.mixed_precision_config is not None else None
        return {name: value.to(dtype or value.dtype) for name, value in super().whole_weights().items()}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """What is trained of a model is small: read whole, for FSDP1 cannot give a part of its parameters."""
        assert self.lightning_module is not None
        if hasattr(self.lightning_module.model, "whole_state"):
            checkpoint = {**checkpoint, "state_dict": dict(checkpoint["state_dict"])}
        super().load_model_state_dict(checkpoint, strict)

    def _setup_model(self, model: nn.Module) -> nn.Module:
        """Each decoder block a unit. (torch takes a CPU only if it is told the device itself, not its index.)

        Raises:
            ValueError: the weights are of several dtypes, as over a quantized base.
        """
        dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
        if len(dtypes) > 1:
            raise ValueError(
                f"strategy: FSDP1 lays weights of one dtype end to end, and these are {', '.join(dtypes)}; use "
                "strategies/fsdp2, which shards each by itself"
            )
        from torch.distributed.fsdp import FullyShardedDataParallel
        from torch.distributed.fsdp.wrap import ModuleWrapPolicy

        if any(type(module).__name__ == "ParamWrapper" for module in model.modules()):
            raise ValueError(
                "strategy: FSDP1 cannot train LoRA on stacked experts, whose weights are parts of a flat one; "
                "use strategies/fsdp2, or target_modules without the experts"
            )
        parts: list[Any] = [model.model, *getattr(model, "critics", ())]
        blocks = [block for part in parts for block in part.blocks()]
        ignored: list[nn.Parameter] = []
        if self.world_size == 1:
            # Nothing is sharded then, and torch loses the parameters of a unit in which none is trained.
            inside = {id(parameter) for block in blocks for parameter in block.parameters()}
            ignored = [p for p in model.parameters() if not p.requires_grad and id(p) not in inside]
            model.to(self.root_device)
        return FullyShardedDataParallel(
            model,
            cpu_offload=self.cpu_offload,
            mixed_precision=self.mixed_precision_config,
            sharding_strategy=self.sharding_strategy,
            forward_prefetch=self.forward_prefetch,
            auto_wrap_policy=ModuleWrapPolicy({type(block) for block in blocks}),
            device_id=self.root_device if self.root_device.type == "cpu" else self.root_device.index,
            ignored_states=ignored,
            use_orig_params=True,
        )
