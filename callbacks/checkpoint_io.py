"""Checkpoints that are written whole or not at all, and read without executing anything."""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO

from callbacks.checkpoint_errors import (
    CheckpointError,
    first_line,
    os_error,
    refuse_what_cannot_be_loaded,
    siblings,
    sync_folder,
    write_message,
)
from callbacks.checkpoint_folder import REST, is_sharded, load_folder, remove_leftovers

_GIB = 2**30


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
            remove_leftovers(path.parent)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            refuse_what_cannot_be_loaded(temporary)
            temporary.replace(path)
            sync_folder(path.parent)
        except BaseException as error:
            temporary.unlink(missing_ok=True)
            cause = os_error(error)
            if cause is None:
                raise
            raise CheckpointError(write_message(path, checkpoint, cause)) from error

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
        path = whole = Path(path)
        if is_sharded(whole):
            path = whole / REST
        _refuse_missing(path)
        size, limit = path.stat().st_size, self.mmap_above_gib * _GIB
        large = size > limit
        try:
            if not large:
                _verify_checksums(path)
            checkpoint = torch.load(path, map_location=map_location or "cpu", weights_only=True, mmap=large)
        except (RuntimeError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{path}: truncated, damaged or no checkpoint ({size} bytes; {first_line(error)}); others beside it: "
                f"{siblings(whole)}"
            ) from error
        except pickle.UnpicklingError as error:
            raise CheckpointError(_unsafe_message(path, error)) from error
        _refuse_other_layouts(path, checkpoint)
        if path == whole:
            return checkpoint
        if not {"files", "shapes", "shared"} <= checkpoint.keys():
            raise CheckpointError(f"{path}: not a checkpoint of a run in shards: it has no list of its files")
        return load_folder(whole, checkpoint, sum(entry[0] for entry in checkpoint["files"].values()) <= limit)

    def remove_checkpoint(self, path: str | os.PathLike[str]) -> None:
        path = Path(path)
        if path.is_dir() and not path.is_symlink():
            # Under another name first: what a kill leaves of it must not pass for a checkpoint.
            going = path.with_name(f".{path.name}-partial")
            path.rename(going)
            shutil.rmtree(going)
        else:
            path.unlink(missing_ok=True)


def _refuse_missing(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path}: a folder, not a checkpoint file; it holds {siblings(path / 'x')}")
    if not path.is_file():
        link = f" (a link to {os.readlink(path)}, which is gone)" if path.is_symlink() else ""
        raise CheckpointError(f"{path}: no such checkpoint{link}; {path.parent} holds {siblings(path)}")


def _verify_checksums(path: Path) -> None:
    """torch.load does not compare the checksums that torch.save writes. Files of another kind end here too."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"wrong checksum of {damaged}")


def _unsafe_message(path: Path, error: Exception) -> str:
    names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    what = f"holds {', '.join(names)}" if names else f"holds more than tensors and plain values ({first_line(error)})"
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
