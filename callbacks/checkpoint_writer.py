"""Writes a run's checkpoints: as one file or a folder of shards, at once or while training goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from callbacks.checkpoint_errors import CheckpointError, first_line
from callbacks.checkpoint_folder import save_folder


class CheckpointWriter:
    """Begins to write a checkpoint, and says when it is complete.

    In the background a thread of each rank writes a copy in host memory. The ranks' threads talk to each other in a
    process group of their own; whether all are done, the ranks find out between two optimizer steps.

    Args:
        sharded: each rank writes the part that it holds (a folder); otherwise rank 0 writes all (a file).
        asynchronous: in the background.
    """

    def __init__(self, sharded: bool, asynchronous: bool) -> None:
        self.sharded = sharded
        self.asynchronous = asynchronous
        self.path: str | None = None  # of what is being written
        self._work: Future[None] | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._group: Any = None

    def begin(self, trainer: pl.Trainer, path: str) -> None:
        """Write the present state; all ranks call it, with no other under way. Complete on return if not asynchronous.

        Raises:
            CheckpointError: it cannot be written.
        """
        if not self.sharded and not self.asynchronous:
            trainer.save_checkpoint(path, False)
            return
        write = self._shards(trainer, path) if self.sharded else self._whole(trainer, path)
        if not self.asynchronous:
            write()
            return
        self.path = path
        self._threads = self._threads or ThreadPoolExecutor(1, "checkpoint")
        self._work = self._threads.submit(write)

    def complete(self, trainer: pl.Trainer, wait: bool) -> bool:
        """Whether what was begun is written now, on all ranks; all of them call it.

        Raises:
            CheckpointError: it could not be written; the same on all ranks.
        """
        assert self._work is not None
        if not wait and not trainer.strategy.reduce_boolean_decision(self._work.done()):
            return False
        error = self._work.exception()
        self._work = self.path = None
        said = [None if error is None else str(error)]
        if trainer.world_size > 1:
            said = [None] * trainer.world_size
            torch.distributed.all_gather_object(said, None if error is None else str(error))
        if error is not None:
            raise error
        for text in said:
            if text is not None:
                raise CheckpointError(text)
        return True

    def abandon(self) -> None:
        """The run has failed: what is being written is still valid, and is waited for."""
        work, path, self._work, self.path = self._work, self.path, None, None
        if work is not None and (error := work.exception()) is not None:
            print(f"checkpoint: {path} was not written: {first_line(error)}", file=sys.stderr)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown()
            self._threads = None

    def _whole(self, trainer: pl.Trainer, path: str) -> Callable[[], None]:
        from llm_modules.strategies.shards import staged

        checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
        if not trainer.is_global_zero:
            return lambda: None
        copy: Any = staged(checkpoint)
        return lambda: trainer.strategy.checkpoint_io.save_checkpoint(copy, path)

    def _shards(self, trainer: pl.Trainer, path: str) -> Callable[[], None]:
        from llm_modules.strategies.shards import split, staged, states_in_parts

        with states_in_parts(trainer.strategy):
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
        parts, rest = split(checkpoint)
        group = self._own_group(trainer)
        if self.asynchronous:
            parts, rest = staged(parts), staged(rest)  # type: ignore[assignment]
        return lambda: save_folder(parts, rest, Path(path), group)

    def _own_group(self, trainer: pl.Trainer) -> Any:
        """Of gloo: on host memory, and apart from the collectives of training, which go on meanwhile."""
        if trainer.world_size > 1 and self._group is None:
            self._group = torch.distributed.new_group(backend="gloo")
        return self._group
