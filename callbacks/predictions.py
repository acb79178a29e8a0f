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
    see. A file that is there already is kept, as ``predictions.0.jsonl`` and so on.

    Args:
        folder: where to write (default: the trainer's ``default_root_dir``, the run's folder).
        name: of the file.
    """

    def __init__(self, folder: str | None = None, name: str = "predictions.jsonl") -> None:
        self.folder = folder
        self.name = name
        self.path: Path | None = None
        self._file: Any = None

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Ranks that were started beside rank 0 do not know its folder.
        folder = trainer.strategy.broadcast(str(Path(self.folder or trainer.default_root_dir).absolute()))
        self.path = Path(folder) / self.name
        if trainer.is_global_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            for part in self.path.parent.glob(f"{self.name}.part-*"):  # of a run that was killed, maybe with more ranks
                part.unlink()
        trainer.strategy.barrier("predictions folder")
        self._file = self._part(trainer.global_rank).open("w", encoding="utf-8")

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

    def _part(self, rank: int) -> Path:
        assert self.path is not None
        return self.path.with_name(_PART.format(name=self.name, rank=rank))

    def _merge(self, trainer: Trainer) -> None:
        assert self.path is not None
        parts = [self._part(rank) for rank in range(trainer.world_size)]
        lines: dict[int, str] = {}
        for part in parts:
            with part.open(encoding="utf-8") as file:
                for line in file:
                    lines.setdefault(json.loads(line)["row"], line)
        temporary = self.path.with_name(f".{self.name}-partial")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines[row] for row in sorted(lines))
            file.flush()
            os.fsync(file.fileno())
        if self.path.exists():
            older = len(list(self.path.parent.glob(f"{self.path.stem}.*{self.path.suffix}")))
            self.path.rename(self.path.with_name(f"{self.path.stem}.{older}{self.path.suffix}"))
        temporary.replace(self.path)
        for part in parts:
            part.unlink()
