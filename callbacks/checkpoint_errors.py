"""What can go wrong with a checkpoint's files, said in one line; and what makes them last."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GIB = 2**30


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, for a reason that the user can remove; the message is one line."""


def refuse_what_cannot_be_loaded(path: Path) -> None:
    """A checkpoint that its own run cannot read is found when it is written, not when it is needed."""
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    if unsafe:
        raise TypeError(
            f"the checkpoint holds {', '.join(sorted(unsafe))}, which loading with weights_only=True refuses: keep "
            "plain Python values and tensors in state dicts and hyper-parameters"
        )


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def os_error(error: BaseException) -> OSError | None:
    """The failed write behind ``error``; torch's zip writer wraps it, or only says that a write failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, RuntimeError) and "PytorchStreamWriter failed" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def write_message(path: Path, checkpoint: dict[str, Any], cause: OSError) -> str:
    return room_message(path, cause, checkpoint_bytes(checkpoint))


def room_message(path: Path, cause: OSError, needed: int) -> str:
    """Why ``path``, of about ``needed`` bytes, could not be written."""
    if cause.errno not in _FULL:
        return f"{path}: cannot be written: {cause.strerror}; no checkpoint was lost"
    free = shutil.disk_usage(path.parent).free
    return (
        f"{path.parent}: {cause.strerror} while saving {path.name}: it needs about {needed} bytes "
        f"({needed / _GIB:.2f} GiB), {free} bytes ({free / _GIB:.2f} GiB) are free; make room or choose another "
        f"folder, then resume with --ckpt_path last (complete checkpoints: {siblings(path)})"
    )


def checkpoint_bytes(tree: Any) -> int:
    """Bytes of the tensors in a nested structure, each storage counted once (as torch.save writes them)."""
    storages: dict[int, int] = {}
    for tensor in _tensors(tree):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _tensors(value)


def siblings(path: Path) -> str:
    return ", ".join(sorted(file.name for file in path.parent.glob("[!.]*.ckpt") if file != path)) or "none"


def first_line(error: BaseException) -> str:
    """The first sentence of an error of torch, which may go on for a page."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
