"""FSDP2, tensor parallelism and both (2-D), on Lightning's ModelParallelStrategy; checkpoints of one form."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy

from llm_modules.strategies.full_state import WholeCheckpoints


class ShardedStrategy(WholeCheckpoints, ModelParallelStrategy):
    """Weights, gradients and optimizer state spread over the devices: FSDP2 over groups of tensor-parallel devices.

    Args:
        tensor_parallel: devices that share each matrix (each of them computes a part of it on the same rows); 1: none.
            The other factor of the number of devices, the data-parallel one, shards the parameters (FSDP2).
        reshard_after_forward: free a block's whole weights after its forward and gather them again for its backward
            (ZeRO-3); false keeps them (ZeRO-2): more memory, a third less communication.
        offload: keep shards and optimizer state in host memory, and step there.
        prefetch: blocks whose weights are gathered while one computes, in the forward and in the backward pass; 0: as
            torch does by itself (none; the next one). More memory: that many whole blocks.
        process_group_backend: default: nccl on GPUs, gloo on CPUs.
    """

    spreads_weights = True

    def __init__(
        self,
        tensor_parallel: int = 1,
        reshard_after_forward: bool = True,
        offload: bool = False,
        prefetch: int = 0,
        process_group_backend: str | None = None,
    ) -> None:
        if tensor_parallel < 1:
            raise ValueError(f"strategy.tensor_parallel: {tensor_parallel} is not allowed; 1 or more")
        if prefetch < 0:
            raise ValueError(f"strategy.prefetch: {prefetch} is not allowed; 0 or more blocks")
        super().__init__(
            tensor_parallel_size=tensor_parallel,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )
        self.tensor_parallel = tensor_parallel
        self.reshard_after_forward = reshard_after_forward
        self.offload = offload
        self.prefetch = prefetch

    def setup_environment(self) -> None:
        devices = self.num_nodes * self.num_processes
        if devices % self.tensor_parallel:
            raise ValueError(
                f"strategy.tensor_parallel: {self.tensor_parallel} does not divide the number of devices {devices}; "
                "set trainer.devices to a multiple of it"
            )
        if self.prefetch and devices == self.tensor_parallel > 1:
            raise ValueError(
                f"strategy.prefetch: {self.prefetch}, but with tensor_parallel {self.tensor_parallel} on {devices} "
                "devices no weights are gathered; set it to 0"
            )
        self._data_parallel_size = devices // self.tensor_parallel
        super().setup_environment()

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        if self._device_mesh is None:  # before the processes are connected
            size, rank = self.num_nodes * self.num_processes, self.global_rank
            return {"num_replicas": size // self.tensor_parallel, "rank": rank // self.tensor_parallel}
        return super().distributed_sampler_kwargs

    def model_to_device(self) -> None:
        if not self.offload:
            super().model_to_device()
