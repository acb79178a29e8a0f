"""A few steps of a recipe under one precision: its losses, speed and memory, for `recipes check precision`."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.memory import peak_bytes
from recipes.compose import Composed
from recipes.errors import UserError
from recipes.precision_rules import check_precision
from recipes.ranks import part_from_the_others, tell_folder, told_folder


def train(composed: Composed, out: Path) -> None:
    """Trains the merged recipe; rank 0 writes what it measured to ``out``, as JSON.

    Raises:
        UserError: the hardware or the recipe refuses.
    """
    from recipes.cli import RecipeCLI

    check_precision(composed, training=True)
    cli = RecipeCLI(composed)
    cli.instantiate()
    if not hasattr(cli.model, "optimizer_factory"):
        raise UserError(
            f"check precision: {type(cli.model).__name__} cannot be compared: a model that derives from "
            "llm_modules.LLMModule is needed"
        )
    if told_folder() is None:
        from recipes.preview import check_before_training

        check_before_training(cli, verbose=False, full=False)
        tell_folder(out.parent)  # the ranks that Lightning starts know by it that this was done
    cli.trainer.callbacks.append(_Measure(out))  # type: ignore[attr-defined]
    try:
        cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    finally:
        tell_folder(None)
    part_from_the_others()


class _Measure(Callback):
    """Writes ``{"losses", "tokens_per_second", "peak_bytes", "device", ...}`` when training ends."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._losses: list[float] = []
        self._first: tuple[int, float] | None = None
        self._last: tuple[int, float] = (0, 0.0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        self._losses.append(float(trainer.callback_metrics["train/loss"]))  # waits for the device
        self._last = (int(pl_module.tokens_seen), time.perf_counter())  # type: ignore[arg-type]
        # The first step pays for what is done once.
        self._first = self._first or self._last

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.is_global_zero or self._first is None:
            return
        tokens, seconds = (last - first for last, first in zip(self._last, self._first, strict=True))
        device = trainer.strategy.root_device
        measured = {
            "losses": self._losses,
            "tokens_per_second": tokens / seconds if seconds else None,
            "peak_bytes": peak_bytes(device),
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "processes": trainer.world_size,
        }
        self._out.write_text(json.dumps(measured), encoding="utf-8")
