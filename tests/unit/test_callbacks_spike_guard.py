"""SpikeGuard: stops before the weights are spoiled, and names the batch."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callback_runs import Batch, Rows, TinyModule, make_trainer
from torch import Tensor

from callbacks import SpikeGuard, StepCheckpoint
from callbacks.spike_guard import UnstableTraining


def weights(module: TinyModule) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def reference(steps: int, accumulate: int, tmp_path: Path) -> list[Tensor]:
    """The weights of a healthy run after ``steps`` optimizer steps."""
    module = TinyModule(length=100)
    make_trainer(tmp_path, max_steps=steps, accumulate_grad_batches=accumulate).fit(module)
    return weights(module)


def test_a_nan_loss_stops_the_run_before_the_step_and_names_step_micro_batch_and_rows(tmp_path: Path) -> None:
    module = TinyModule(length=100, poison=11)  # micro-batch 11 is the last of step 3's (numbers 9, 10, 11)
    trainer = make_trainer(tmp_path / "run", SpikeGuard(), max_steps=20, accumulate_grad_batches=3)
    with pytest.raises(UnstableTraining) as caught:
        trainer.fit(module)
    message = str(caught.value)
    assert message.startswith("step 3, micro-batch 2, dataset rows 22, 23: the loss is nan; stopped before")
    assert "\n" not in message
    for found, expected in zip(weights(module), reference(3, 3, tmp_path / "reference"), strict=True):
        assert torch.equal(found, expected)


def test_rows_are_named_by_file_and_place_where_the_data_know_them(tmp_path: Path) -> None:
    class Data(pl.LightningDataModule):
        def train_dataloader(self) -> Rows:
            return Rows(100, poison=3)

        def describe_rows(self, rows: list[int]) -> list[str]:
            return [f"a.jsonl:{row + 1}" for row in rows]

    with pytest.raises(UnstableTraining, match=r"micro-batch 0, dataset rows a\.jsonl:7, a\.jsonl:8: the loss is nan"):
        make_trainer(tmp_path, SpikeGuard(), max_steps=9).fit(TinyModule(), datamodule=Data())


class InfiniteGradient(TinyModule):
    """A finite loss with an infinite derivative (sqrt at 0) in step 2."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + torch.sqrt(0 * loss) if self.global_step == 2 else loss


def test_a_gradient_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    module = InfiniteGradient(length=100)
    with pytest.raises(UnstableTraining, match=r"step 2, dataset rows 4, 5: the norm of the gradient is nan"):
        make_trainer(tmp_path / "run", SpikeGuard(), max_steps=20).fit(module)
    for found, expected in zip(weights(module), reference(2, 1, tmp_path / "reference"), strict=True):
        assert torch.equal(found, expected)


def test_a_module_that_clips_is_spared_the_norm(tmp_path: Path) -> None:
    class Clips(TinyModule):
        gradient_norm: Tensor | None = None

        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            by_hand = torch.cat([parameter.grad.flatten() for parameter in self.parameters()]).square().sum().sqrt()
            assert self.gradient_norm is not None
            torch.testing.assert_close(self.gradient_norm, by_hand)
            self.gradient_norm = None

    make_trainer(tmp_path, SpikeGuard(), max_steps=3).fit(Clips())


class Jumps(TinyModule):
    """Logs a loss of about 1 that is 10 in step 30."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("train/loss", 10.0 if self.global_step == 30 else 1 + 0.1 * (self.global_step % 3))
        return loss


def test_a_jump_of_the_loss_warns_once_or_stops(tmp_path: Path) -> None:
    expected = (
        r"step 30, dataset rows 60, 61: train/loss jumped to 10, 1\d\d.\d standard deviations above its mean of 1.1"
    )
    with pytest.warns(UserWarning, match=expected) as caught:
        make_trainer(tmp_path / "warn", SpikeGuard(), max_steps=60).fit(Jumps(length=100))
    assert sum("jumped" in str(warning.message) for warning in caught) == 1
    with pytest.raises(UnstableTraining, match=expected):
        make_trainer(tmp_path / "stop", SpikeGuard(spike="stop"), max_steps=60).fit(Jumps(length=100))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*jumped.*")
        make_trainer(tmp_path / "off", SpikeGuard(spike="off"), max_steps=60).fit(Jumps(length=100))
        make_trainer(tmp_path / "high", SpikeGuard(threshold=1000), max_steps=60).fit(Jumps(length=100))


def test_the_history_is_in_the_checkpoint(tmp_path: Path) -> None:
    """Without it the window would be empty and the jump at step 30 unseen."""
    checkpoint = StepCheckpoint(every_n_steps=100, keep_best=0)
    make_trainer(tmp_path, SpikeGuard(), checkpoint=checkpoint, max_steps=28).fit(Jumps(length=100))
    trainer = make_trainer(
        tmp_path, SpikeGuard("stop"), checkpoint=StepCheckpoint(every_n_steps=100, keep_best=0), max_steps=60
    )
    with pytest.raises(UnstableTraining, match="step 30"):
        trainer.fit(Jumps(length=100), ckpt_path=tmp_path / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spike": "ignore"}, "SpikeGuard.spike: 'ignore' is not allowed; warn, stop or off"),
        ({"threshold": 0}, "SpikeGuard.threshold: 0 is not allowed"),
        ({"window": 3}, "SpikeGuard.window: 3 is not allowed; optimizer steps, 4 or more"),
    ],
)
def test_refuses_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpikeGuard(**arguments)


def test_names_the_metrics_when_the_monitored_one_is_missing(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"SpikeGuard.monitor: 'loss' is not logged by the training step; there is train/loss"
    ):
        make_trainer(tmp_path, SpikeGuard(monitor="loss"), max_steps=2).fit(TinyModule())
