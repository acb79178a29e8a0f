"""A tiny, real training run for the tests of callbacks; `python callback_runs.py JSON` is one that can be killed."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from callbacks import AtomicCheckpointIO, GracefulStop, MetricsCSV, SpikeGuard, StepCheckpoint, Throughput

warnings.filterwarnings("ignore", module="lightning")


@dataclass
class Batch:
    inputs: Tensor
    targets: Tensor
    rows: list[int]
    padding: int = 1

    def tokens(self) -> tuple[int, int]:
        return self.inputs.numel(), self.inputs.numel() - self.padding


class Rows:
    """Micro-batches that are a function of (epoch, position); its state is that position."""

    def __init__(self, length: int = 8, rank: int = 0, poison: int | None = None) -> None:
        self.length, self.rank, self.poison = length, rank, poison
        self.epoch, self.position = 0, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        if self.position >= self.length:
            self.epoch, self.position = self.epoch + 1, 0
        while self.position < self.length:
            number = self.epoch * self.length + self.position
            generator = torch.Generator().manual_seed(1000 * self.rank + number)
            inputs = torch.randn(2, 4, generator=generator)
            if number == self.poison:
                inputs = inputs * float("nan")
            self.position += 1
            yield Batch(inputs, inputs.sum(1, keepdim=True), [2 * number, 2 * number + 1])

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


class HeldOut(tuple[Batch, ...]):
    """A loader that gives the same micro-batches each time (Lightning takes a plain tuple for several loaders)."""

    __slots__ = ()


class TinyModule(pl.LightningModule):
    """Linear regression with noise that, like the project's modules, is a function of step and micro-batch."""

    flops_per_token: float | None = 100.0

    def __init__(self, length: int = 8, poison: int | None = None, poison_rank: int = 0) -> None:
        super().__init__()
        self.length, self.poison, self.poison_rank = length, poison, poison_rank
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        torch.manual_seed(1000 * self.global_step + batch_idx)
        noisy = nn.functional.dropout(batch.inputs, 0.2)
        loss = (self.layer(noisy) - batch.targets).square().mean()
        self.log("train/loss", loss, on_step=True, on_epoch=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.log("val/loss", (self.layer(batch.inputs) - batch.targets).square().mean(), sync_dist=True)

    def train_dataloader(self) -> Rows:
        return Rows(self.length, self.global_rank, self.poison if self.global_rank == self.poison_rank else None)

    def val_dataloader(self) -> tuple[Batch, ...]:
        return HeldOut(Rows(3, rank=77))

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=3, gamma=0.7)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def make_trainer(folder: str | Path, *callbacks: pl.Callback, checkpoint: Any = None, **arguments: Any) -> pl.Trainer:
    """A trainer that writes into ``folder`` as the project's runs do."""
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": [MetricsCSV(folder)],
        "callbacks": [*callbacks, checkpoint or StepCheckpoint(every_n_steps=2, keep_best=0)],
        "plugins": [AtomicCheckpointIO()],
        "log_every_n_steps": 1,
        "max_epochs": -1,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    return pl.Trainer(**(settings | arguments))


def main() -> None:
    """Run with the arguments of the JSON on the command line; ``callbacks`` names factories of this module's caller."""
    options = json.loads(sys.argv[1])
    folder = Path(options["folder"])
    extra = [FACTORIES[name](*values) for name, values in options.get("callbacks", {}).items()]
    checkpoint = StepCheckpoint(**options.get("checkpoint", {"every_n_steps": 2, "keep_best": 0}))
    trainer = make_trainer(folder, *extra, checkpoint=checkpoint, **options["trainer"])
    last = folder / "checkpoints" / "last.ckpt"
    trainer.fit(TinyModule(**options.get("module", {})), ckpt_path=str(last) if last.exists() else None)


class Announce(pl.Callback):
    """Prints each optimizer step, so that the test knows when to send a signal; sleeps to be there to get it."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        print(f"rank {trainer.global_rank}, pid {os.getpid()}, step {trainer.global_step}", flush=True)
        time.sleep(self.seconds)


class KillAt(pl.Callback):
    """Kills its own process, as ``kill -9`` does, at a named place of a named step."""

    def __init__(self, place: str, step: int) -> None:
        self.place, self.step = place, step

    def _kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.place == "micro-batch" and trainer.global_step == self.step and trainer.fit_loop._should_accumulate():
            self._kill()

    def on_validation_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if self.place == "validation" and trainer.global_step == self.step:
            self._kill()

    def on_save_checkpoint(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step != self.step:
            return
        if self.place == "write":
            self._kill_during_write()
        elif self.place in ("before the link", "after the link"):
            self._kill_at_the_link()

    def _kill_during_write(self) -> None:
        real_save = torch.save

        def half_save(value: Any, file: Any) -> None:
            real_save(value, file)
            file.truncate(file.tell() // 2)
            file.flush()
            self._kill()

        torch.save = half_save

    def _kill_at_the_link(self) -> None:
        real_replace = os.replace

        def replace_and_die(source: Any, target: Any) -> None:
            if self.place == "before the link" and str(target).endswith("last.ckpt"):
                self._kill()
            real_replace(source, target)
            if str(target).endswith("last.ckpt"):
                self._kill()

        os.replace = replace_and_die


FACTORIES: dict[str, Any] = {
    "announce": Announce,
    "guard": SpikeGuard,
    "kill": KillAt,
    "stop": GracefulStop,
    "throughput": Throughput,
}

if __name__ == "__main__":
    main()
