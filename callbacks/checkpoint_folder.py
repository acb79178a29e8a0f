"""A checkpoint as a folder of shards, written by all ranks: whole or not at all, as the file is.

``step-XXXXXXXX.ckpt/`` holds ``state.pt`` (everything small, and the list of the files with their sizes and checksums)
and a safetensors file of each rank.
"""

from __future__ import annotations

import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from callbacks.checkpoint_errors import (
    CheckpointError,
    first_line,
    os_error,
    refuse_what_cannot_be_loaded,
    room_message,
    siblings,
    sync_folder,
)

REST = "state.pt"
_LEFTOVERS = ".*.ckpt-partial"
_GIB = 2**30


def is_sharded(path: Path) -> bool:
    return (path / REST).is_file()


def remove_leftovers(folder: Path) -> None:
    """One run saves into a folder at a time, so whatever has such a name belonged to one that was killed."""
    for leftover in folder.glob(_LEFTOVERS):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def save_folder(parts: dict[str, Any], rest: dict[str, Any], path: Path, group: Any) -> None:
    """Write a checkpoint that was split (see ``shards.split``) to the folder ``path``; all ranks call it.

    A folder that is there already is of the same step of the same run: only its ``state.pt`` is written anew.

    Args:
        group: a process group for this alone (gloo); None: one process.

    Raises:
        CheckpointError: the disk is full or not writable, on any rank; what was there is as it was before.
        TypeError: ``rest`` holds an object that could not be loaded again with ``weights_only=True``.
    """
    ranks = _Ranks(group)
    if ranks.all(is_sharded(path))[0]:
        ranks.together(path, 0, lambda: _write_again(rest, path))
        return
    temporary = path.with_name(f".{path.name}-partial")
    from llm_modules.strategies.shards import held

    size = sum(local.nbytes for value in parts.values() for local in held(value))
    try:
        ranks.together(path, size, lambda: _make(temporary))
        files = ranks.together(path, size, lambda: _write(parts, temporary, group), on_all=True)
        listed = {name: entry for part in files for name, entry in part.items()}
        shapes = {name: list(value.size()) for name, value in parts.items()}
        whole = {**rest, "files": listed, "shapes": shapes}
        ranks.together(path, size, lambda: _finish(whole, temporary, path))
    except BaseException:
        if ranks.first:
            shutil.rmtree(temporary, ignore_errors=True)  # the error says what is to be known
        raise


def load_folder(path: Path, rest: dict[str, Any], verify: bool) -> dict[str, Any]:
    """The checkpoint in the folder ``path``; its tensors are read when they are asked for.

    Args:
        rest: what ``state.pt`` holds.
        verify: compare the checksums of all files.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, or one too many.
    """
    unknown = sorted(file.name for file in path.glob("*.safetensors") if file.name not in rest["files"])
    if unknown:
        raise CheckpointError(f"{path}: {unknown[0]} does not belong to it; others beside it: {siblings(path)}")
    for name, (size, checksum) in rest["files"].items():
        file = path / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            what = "is missing" if found is None else f"has {found} bytes instead of {size}"
        elif verify and _checksum(file) != checksum:
            what = "is damaged: wrong checksum"
        else:
            continue
        raise CheckpointError(f"{path}: {name} {what}; others beside it: {siblings(path)}")
    from llm_modules.strategies.shards import join

    return join(path, rest)


class _Ranks:
    """The ranks that write together; an error of one is raised on all."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.first = group is None or torch.distributed.get_rank(group) == 0

    def all(self, value: Any) -> list[Any]:
        if self.group is None:
            return [value]
        values: list[Any] = [None] * torch.distributed.get_world_size(self.group)
        torch.distributed.all_gather_object(values, value, group=self.group)
        return values

    def together(self, path: Path, size: int, work: Callable[[], Any], on_all: bool = False) -> list[Any]:
        """Do ``work`` (on the first rank alone, or on all), and let all know how it went."""
        result: Any = None
        error: BaseException | None = None
        try:
            result = work() if on_all or self.first else None
        except (Exception, CheckpointException) as raised:  # noqa: BLE001  # the others are to hear of it
            error = raised
        said = self.all((result, None if error is None else _message(path, size, error)))
        messages = [message for _, message in said if message]
        if messages:
            kind, text = messages[0]
            raise (TypeError(text) if kind == "type" else CheckpointError(text)) from error
        return [value for value, _ in said]


def _message(path: Path, size: int, error: BaseException) -> tuple[str, str]:
    """What kind of error, and its line."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    cause = os_error(error)
    if cause is not None:
        return "file", room_message(path, cause, size)
    return "type" if isinstance(error, TypeError) else "file", f"{path}: cannot be written: {first_line(error)}"


def _make(temporary: Path) -> None:
    temporary.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(temporary.parent)
    temporary.mkdir()


def _write(parts: dict[str, Any], temporary: Path, group: Any) -> dict[str, tuple[int, int]]:
    from llm_modules.strategies.shards import write_parts

    return {file.name: (file.stat().st_size, _checksum(file)) for file in write_parts(parts, temporary, group)}


def _finish(rest: dict[str, Any], temporary: Path, path: Path) -> None:
    from llm_modules.strategies.shards import ShardReader

    _write_rest(rest, temporary / REST)
    ShardReader(str(temporary)).refuse_holes(rest["shapes"])
    sync_folder(temporary)
    os.replace(temporary, path)
    sync_folder(path.parent)


def _write_again(rest: dict[str, Any], path: Path) -> None:
    before = torch.load(path / REST, weights_only=True)
    _write_rest({**rest, "files": before["files"], "shapes": before["shapes"]}, path / REST)
    sync_folder(path)


def _write_rest(rest: dict[str, Any], file: Path) -> None:
    temporary = file.with_name(f".{file.name}-partial")
    try:
        with temporary.open("wb") as stream:
            torch.save(rest, stream)
            stream.flush()
            os.fsync(stream.fileno())
        refuse_what_cannot_be_loaded(temporary)
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _checksum(file: Path, chunk: int = 1 << 24) -> int:
    value = 0
    with file.open("rb") as stream:
        while data := stream.read(chunk):
            value = zlib.crc32(data, value)
    return value
