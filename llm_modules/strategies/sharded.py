"""FSDP2, tensor and context parallelism, together or not, on Lightning's ModelParallelStrategy."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from llm_modules.strategies.full_state import WholeCheckpoints


class ShardedStrategy(WholeCheckpoints, ModelParallelStrategy):
    """Weights, gradients and optimizer state spread over the devices: FSDP2 over groups of tensor-parallel devices.

    Args:
        tensor_parallel: devices that share each matrix (each of them computes a part of it on the same rows); 1: none.
            The other factor of the number of devices shards the parameters (FSDP2).
        reshard_after_forward: free a block's whole weights after its forward and gather them again for its backward
            (ZeRO-3); false keeps them (ZeRO-2): more memory, a third less communication.
        offload: keep shards and optimizer state in host memory, and step there.
        prefetch: blocks whose weights are gathered while one computes, in the forward and in the backward pass; 0: as
            torch does by itself (none; the next one). More memory: that many whole blocks.
        context_parallel: devices that share each row (each of them computes a slice of its positions; heads are
            exchanged for attention); 1: none. They shard the parameters too.
        process_group_backend: default: nccl on GPUs, gloo on CPUs.
    """

    spreads_weights = True

    def __init__(
        self,
        tensor_parallel: int = 1,
        reshard_after_forward: bool = True,
        offload: bool = False,
        prefetch: int = 0,
        context_parallel: int = 1,
        process_group_backend: str | None = None,
    ) -> None:
        if prefetch < 0:
            raise ValueError(f"strategy.prefetch: {prefetch} is not allowed; 0 or more blocks")
        for name, size in (("tensor_parallel", tensor_parallel), ("context_parallel", context_parallel)):
            if size < 1:
                raise ValueError(f"strategy.{name}: {size} is not allowed; 1 or more")
        super().__init__(
            tensor_parallel_size=tensor_parallel,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
        )
        self.tensor_parallel = tensor_parallel
        self.context_parallel = context_parallel
        self.context_mesh: DeviceMesh | None = None
        self.reshard_after_forward = reshard_after_forward
        self.offload = offload
        self.prefetch = prefetch

    def setup_environment(self) -> None:
        devices = self.num_nodes * self.num_processes
        for name in ("tensor_parallel", "context_parallel"):
            if devices % getattr(self, name):
                raise ValueError(
                    f"strategy.{name}: {getattr(self, name)} does not divide the number of devices {devices}; "
                    "set trainer.devices to a multiple of it"
                )
        if devices % (shared := self.tensor_parallel * self.context_parallel):
            raise ValueError(
                f"strategy: tensor_parallel {self.tensor_parallel} x context_parallel {self.context_parallel} = "
                f"{shared} does not divide the number of devices {devices}; set trainer.devices to a multiple of it"
            )
        if self.prefetch and devices == self.tensor_parallel > 1:
            raise ValueError(
                f"strategy.prefetch: {self.prefetch}, but with tensor_parallel {self.tensor_parallel} on {devices} "
                "devices no weights are gathered; set it to 0"
            )
        self._data_parallel_size = devices // self.tensor_parallel
        super().setup_environment()
        if self.context_parallel > 1:
            # Lightning's mesh has one dimension for all that shard the weights: those with other rows, and those with
            # other positions of the same rows.
            shape = (devices // shared, self.context_parallel, self.tensor_parallel)
            names = ("rows", "context_parallel", "tensor_parallel")
            self.context_mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=names)["context_parallel"]

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """In how many parts the rows are dealt, and which one is this rank's."""
        size, rank, shared = self.num_nodes * self.num_processes, self.global_rank, self.tensor_parallel
        shared *= self.context_parallel
        return {"num_replicas": size // shared, "rank": rank // shared}

    def model_to_device(self) -> None:
        if not self.offload:
            super().model_to_device()
