"""Writes what ``predict`` generates into the run's folder as JSON lines, ordered by row."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

_PART = "{name}.part-{rank:05d}"


class PredictionsWriter(Callback):
    """One JSON object a line, for each row once, in the order of the rows.

    Each rank writes to a part of its own as it goes; at the end rank 0 merges the parts and the file appears whole. A
    row that several ranks were given, as an even share demands, is written once. The folder must be one that all ranks
    see.

    Args:
        folder: where to write (default: the trainer's ``default_root_dir``, the run's folder).
        name: of the file.
    """

    def __init__(self, folder: str | None = None, name: str = "predictions.jsonl") -> None:
        self.folder = folder
        self.name = name
        self._file: Any = None

    def path(self, trainer: Trainer) -> Path:
        return Path(self.folder or trainer.default_root_dir) / self.name

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = self.path(trainer)
        if trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            for part in path.parent.glob(f"{self.name}.part-*"):  # of a run that was killed, maybe with more ranks
                part.unlink()
        trainer.strategy.barrier("predictions folder")
        self._file = self._part(trainer, trainer.global_rank).open("w", encoding="utf-8")

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        for row in outputs or ():
            self._file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._file.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._close()
        trainer.strategy.barrier("predictions written")
        if trainer.is_global_zero:
            self._merge(trainer)
        trainer.strategy.barrier("predictions merged")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _part(self, trainer: Trainer, rank: int) -> Path:
        path = self.path(trainer)
        return path.with_name(_PART.format(name=path.name, rank=rank))

    def _merge(self, trainer: Trainer) -> None:
        path = self.path(trainer)
        parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
        lines: dict[int, str] = {}
        for part in parts:
            with part.open(encoding="utf-8") as file:
                for line in file:
                    lines.setdefault(json.loads(line)["row"], line)
        temporary = path.with_name(f".{path.name}-partial")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines[row] for row in sorted(lines))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        for part in parts:
            part.unlink()
