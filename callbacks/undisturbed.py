"""What is done to a model in the middle of a run, without the run being another because of it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch

from callbacks.throughput import Throughput


@contextmanager
def undisturbed(trainer: pl.Trainer, pl_module: pl.LightningModule) -> Iterator[None]:
    """The model evaluates; afterwards modes and random states are what they were, and its time is no training's."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Throughput):
            callback.pause()
    modes = {name: module.training for name, module in pl_module.named_modules()}
    python_state = random.getstate()
    devices = [pl_module.device] if pl_module.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            pl_module.eval()
            yield
    finally:
        random.setstate(python_state)
        for name, module in pl_module.named_modules():
            module.training = modes[name]
