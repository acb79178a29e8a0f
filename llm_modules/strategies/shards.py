"""A checkpoint in shards: each rank writes the part that it holds, and reads the part that it needs.

By torch.distributed.checkpoint, in its safetensors form: its other one keeps pickles. Names are those of one process,
as in a whole checkpoint: ``state_dict.<parameter>`` and ``optimizer.<number>.<position>.<key>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

WEIGHTS, OPTIMIZER = "state_dict", "optimizer"


@contextmanager
def states_in_parts(strategy: Any) -> Iterator[None]:
    """Inside, a strategy of ours gives states as they are spread; others give whole ones on every rank."""
    before = getattr(strategy, "in_parts", None)
    if before is None:
        yield
        return
    strategy.in_parts = True
    try:
        yield
    finally:
        strategy.in_parts = before


def held(value: Any) -> list[Tensor]:
    """What this rank holds of a tensor that may be spread (FSDP1 has a kind of its own)."""
    if hasattr(value, "local_shards"):
        return [shard.tensor for shard in value.local_shards()]
    local = value.to_local() if hasattr(value, "to_local") else value
    return [] if local.is_meta else [local]


def not_mine(whole: Tensor) -> Tensor:
    """Stands for a tensor that another rank writes."""
    return torch.empty(whole.shape, dtype=whole.dtype, device="meta")


def split(checkpoint: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What is written in shards, by name, and the rest of a checkpoint, which is small.

    A tensor of several names (tied weights) is written once; ``shared`` of the rest says under which of them.
    """
    parts: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    first: dict[str, str] = {}

    def take(name: str, value: Any) -> None:
        key = [(local.data_ptr(), local.shape, local.stride(), local.dtype) for local in held(value) if local.numel()]
        if key and str(key) in first:
            shared[name] = first[str(key)]
            return
        first[str(key)] = name
        parts[name] = value

    states = []
    for number, whole in enumerate(checkpoint["optimizer_states"]):
        small: dict[Any, dict[str, Any]] = {}
        for position, values in whole.get("state", {}).items():
            small[position] = {}
            for key, value in values.items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    take(f"{OPTIMIZER}.{number}.{position}.{key}", value)
                else:
                    small[position][key] = value.full_tensor() if hasattr(value, "full_tensor") else value
        states.append({**whole, "state": small} if whole else whole)
    for name, value in checkpoint["state_dict"].items():
        take(f"{WEIGHTS}.{name}", value.detach() if isinstance(value, nn.Parameter) else value)
    rest = {**checkpoint, "state_dict": list(checkpoint["state_dict"]), "optimizer_states": states, "shared": shared}
    return parts, rest


def staged(parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """A copy in host memory, which training does not change."""
    options = StagingOptions(
        use_pinned_memory=False, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=False
    )
    # FSDP1's kind of spread tensor is not known to the stager: it is copied where it is.
    own = {name: value.clone() for name, value in parts.items() if hasattr(value, "local_shards")}
    others: Any = DefaultStager(options).stage({name: value for name, value in parts.items() if name not in own})
    return {name: own[name] if name in own else others[name] for name in parts}


def write_parts(parts: dict[str, Tensor], folder: Path, group: Any) -> list[Path]:
    """Write this rank's shard; all ranks call it. Returns the files that this rank wrote, synced to the disk.

    Args:
        group: a process group of its own for the ranks' plans (gloo, so that a thread may use it); None: one process.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    mine: Any = {name: value for name, value in parts.items() if hasattr(value, "local_shards") or not value.is_meta}
    dcp.save(mine, storage_writer=writer, process_group=group, no_dist=group is None)
    rank = 0 if group is None else dist.get_rank(group)
    return sorted(folder.glob(f"shard-{rank + 1:05d}-*.safetensors"))


class ShardReader(HuggingFaceStorageReader):
    """Reads the headers of a folder's files once."""

    @cached_property
    def _metadata(self) -> Metadata:
        return super().read_metadata()

    def read_metadata(self) -> Metadata:
        return self._metadata

    def sizes(self) -> dict[str, torch.Size]:
        return {name: entry.size for name, entry in self._metadata.state_dict_metadata.items()}  # type: ignore[union-attr]

    def refuse_holes(self, shapes: Mapping[str, list[int]]) -> None:
        """Raises ValueError where the files do not hold every number of every tensor."""
        for name, shape in shapes.items():
            entry: Any = self._metadata.state_dict_metadata.get(name)
            held = 0 if entry is None else sum(chunk.sizes.numel() for chunk in entry.chunks)
            if held != torch.Size(shape).numel() or (held and list(entry.size) != list(shape)):
                raise ValueError(f"{name}: {held} numbers of a tensor of {list(shape)} are in the shards")

    def whole(self, name: str) -> Tensor:
        entry: Any = self._metadata.state_dict_metadata[name]
        target = torch.empty(entry.size, dtype=entry.properties.dtype)
        dcp.load({name: target}, storage_reader=self, no_dist=True)
        return target


def read_parts(reader: ShardReader, wanted: list[tuple[str, Tensor]]) -> None:
    """Fill tensors, of which each rank has its part, from the shards that hold these.

    Raises:
        ValueError: a name is in no shard, or a tensor has another shape.
    """
    sizes = reader.sizes()
    while wanted:
        now: dict[str, Any] = {}
        later = []
        for name, target in wanted:
            if name not in sizes or sizes[name] != target.size():
                raise ValueError(
                    f"ckpt_path: {name} is {list(sizes[name]) if name in sizes else 'missing'} in the checkpoint, "
                    f"{list(target.size())} in this run"
                )
            if name in now:  # a tensor of several names
                later.append((name, target))
            else:
                now[name] = target
        dcp.load(now, storage_reader=reader, no_dist=True)
        wanted = later


class ShardedWeights(Mapping[str, Tensor]):
    """The weights of a checkpoint in shards, by name; each is read, whole, when it is asked for."""

    def __init__(self, reader: ShardReader, rest: Mapping[str, Any]) -> None:
        self.reader = reader
        self._names: list[str] = rest["state_dict"]
        self._shared: dict[str, str] = rest["shared"]

    def key(self, name: str) -> str:
        """Where a parameter is in the shards."""
        return self._shared.get(f"{WEIGHTS}.{name}", f"{WEIGHTS}.{name}")

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self.reader.whole(self.key(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class ShardedOptimizerState(Mapping[int, dict[str, Any]]):
    """An optimizer's state by position in a checkpoint in shards; that of a parameter is read when it is asked for."""

    def __init__(self, reader: ShardReader, rest: Mapping[str, Any], number: int) -> None:
        self.reader = reader
        self.small: dict[int, dict[str, Any]] = rest["optimizer_states"][number]["state"]
        self.keys_of: dict[int, dict[str, str]] = {position: {} for position in self.small}
        names = {name: name for name in reader.sizes()} | rest["shared"]
        for name, stored in names.items():
            what, *place = name.split(".", 3)
            if what == OPTIMIZER and int(place[0]) == number:
                self.keys_of[int(place[1])][place[2]] = stored

    def __getitem__(self, position: int) -> dict[str, Any]:
        read = {key: self.reader.whole(name) for key, name in self.keys_of[position].items()}
        return {**self.small[position], **read}

    def __iter__(self) -> Iterator[int]:
        return iter(self.small)

    def __len__(self) -> int:
        return len(self.small)


def join(folder: Path, rest: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint that was split, of a complete folder; its tensors are read when they are asked for."""
    reader = ShardReader(str(folder))
    states = [
        {**state, "state": ShardedOptimizerState(reader, rest, number)} if state else state
        for number, state in enumerate(rest["optimizer_states"])
    ]
    return {**rest, "state_dict": ShardedWeights(reader, rest), "optimizer_states": states}
