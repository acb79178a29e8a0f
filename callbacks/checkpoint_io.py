"""Checkpoints that are written whole or not at all, and read without executing anything."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

_LEFTOVERS = ".*.ckpt-partial"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_GIB = 2**30


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read, for a reason that the user can remove; the message is one line."""


class AtomicCheckpointIO(CheckpointIO):
    """Writes a checkpoint to a temporary name in its own folder, then renames it; reads with ``weights_only=True``.

    A run that is killed while it writes leaves the old checkpoints as they were; what is left of the unfinished file is
    removed at the next save. A reader never sees half a file.

    Args:
        mmap_above_gib: files larger than this many GiB are mapped into memory and read as needed instead of being read
            whole; smaller ones are read whole, and their checksums are verified.
    """

    def __init__(self, mmap_above_gib: float = 4.0) -> None:
        self.mmap_above_gib = mmap_above_gib

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None
    ) -> None:
        """Stream ``checkpoint`` to ``path``.

        Raises:
            CheckpointError: the disk is full or not writable; ``path`` is as it was before.
            TypeError: ``checkpoint`` holds an object that could not be loaded again with ``weights_only=True``.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        path = Path(path)
        temporary = path.with_name(f".{path.name}-partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{path.parent}: cannot be made: {error.strerror}; no checkpoint was lost") from error
        try:
            # One process saves into a folder at a time, so whatever has this name belonged to a run that was killed.
            for leftover in path.parent.glob(_LEFTOVERS):
                leftover.unlink(missing_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            _refuse_what_cannot_be_loaded(temporary)
            temporary.replace(path)
            _sync_folder(path.parent)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            cause = _os_error(error)
            if cause is None:
                raise
            raise CheckpointError(_write_message(path, checkpoint, cause)) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any | None = None,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read a checkpoint of ours.

        Args:
            path: the file.
            map_location: as torch.load's; default: the CPU.
            weights_only: not read, for a checkpoint is always loaded with ``weights_only=True``.

        Raises:
            CheckpointError: missing, truncated, corrupt, not a checkpoint of a run, or made to execute code.
        """
        path = Path(path)
        _refuse_missing(path)
        size = path.stat().st_size
        large = size > self.mmap_above_gib * _GIB
        try:
            if not large:
                _verify_checksums(path)
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=large)
        except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{path}: truncated, damaged or no checkpoint ({size} bytes; {_first_line(error)}); others beside it: "
                f"{_siblings(path)}"
            ) from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(_unsafe_message(path, error)) from error
        _refuse_other_layouts(path, checkpoint)
        return checkpoint

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _refuse_what_cannot_be_loaded(path: Path) -> None:
    """A checkpoint that its own run cannot read is found when it is written, not when it is needed."""
    unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    if unsafe:
        raise TypeError(
            f"the checkpoint holds {', '.join(sorted(unsafe))}, which loading with weights_only=True refuses: keep "
            "plain Python values and tensors in state dicts and hyper-parameters"
        )


def _sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` survive a loss of power."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _os_error(error: BaseException) -> OSError | None:
    """The failed write behind ``error``; torch's zip writer wraps it, or only says that a write failed."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError):
            return seen
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, RuntimeError) and "PytorchStreamWriter failed" in str(error):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return None


def _write_message(path: Path, checkpoint: dict[str, Any], cause: OSError) -> str:
    if cause.errno not in _FULL:
        return f"{path}: cannot be written: {cause.strerror}; no checkpoint was lost"
    needed, free = checkpoint_bytes(checkpoint), shutil.disk_usage(path.parent).free
    return (
        f"{path.parent}: {cause.strerror} while saving {path.name}: it needs about {needed} bytes "
        f"({needed / _GIB:.2f} GiB), {free} bytes ({free / _GIB:.2f} GiB) are free; make room or choose another "
        f"folder, then resume with --ckpt_path last (complete checkpoints: {_siblings(path)})"
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


def _refuse_missing(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, not a checkpoint file; it holds {_siblings(path / 'x')}")
    if not path.is_file():
        link = f" (a link to {os.readlink(path)}, which is gone)" if path.is_symlink() else ""
        raise CheckpointError(f"{path}: no such checkpoint{link}; {path.parent} holds {_siblings(path)}")


def _verify_checksums(path: Path) -> None:
    """torch.load does not compare the checksums that torch.save writes. Files of another kind end here too."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def _unsafe_message(path: Path, error: Exception) -> str:
    names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    what = f"holds {', '.join(names)}" if names else f"holds more than tensors and plain values ({_first_line(error)})"
    return (
        f"{path}: {what}, which loading would have to execute; nothing of it was executed. Only checkpoints of tensors "
        "and plain values are loaded"
    )


def _refuse_other_layouts(path: Path, checkpoint: Any) -> None:
    wanted = ("state_dict", "pytorch-lightning_version", "global_step")
    if isinstance(checkpoint, dict) and all(key in checkpoint for key in wanted):
        return
    found = f"a dict with {_some(checkpoint)}" if isinstance(checkpoint, dict) else f"a {type(checkpoint).__name__}"
    raise CheckpointError(
        f"{path}: not a checkpoint of a run: it holds {found}, expected {', '.join(wanted)}; weights alone are given "
        "as the model's source, not as --ckpt_path"
    )


def _some(keys: Any, most: int = 5) -> str:
    names = [str(key) for key in keys]
    return ", ".join(names[:most]) + (f" and {len(names) - most} more keys" if len(names) > most else "") or "no keys"


def _siblings(path: Path) -> str:
    return ", ".join(sorted(file.name for file in path.parent.glob("[!.]*.ckpt") if file != path)) or "none"


def _first_line(error: Exception) -> str:
    """The first sentence of an error of torch, which may go on for a page."""
    return str(error).strip().split("\n")[0].split(". ")[0][:200]
