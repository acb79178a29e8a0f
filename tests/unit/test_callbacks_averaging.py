"""Lightning's weight averaging and early stopping under our checkpoints, and means of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from callback_runs import Batch, TinyModule, make_trainer
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from torch import Tensor

from callbacks import GracefulStop, StepCheckpoint
from callbacks.export import mean_of_checkpoints
from callbacks.metrics_csv import MACHINE_COLUMNS, read_rows

DECAY = 0.8


def measured(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in read_rows(folder / "metrics.csv")]


class Watched(TinyModule):
    """Keeps the weights after each optimizer step, and those that validation saw."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.trained: list[Tensor] = []
        self.validated: list[Tensor] = []

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self.global_step == len(self.trained):
            self.trained.append(self.layer.weight.detach().clone())

    def on_validation_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(self.layer.weight.detach().clone())


def fit(folder: Path, module: TinyModule, *, steps: int, resume: Path | None = None) -> None:
    checkpoint = StepCheckpoint(every_n_steps=1, keep_last=-1)
    make_trainer(
        folder,
        EMAWeightAveraging(decay=DECAY),
        checkpoint=checkpoint,
        max_steps=steps,
        accumulate_grad_batches=2,
        limit_val_batches=1,
        val_check_interval=8,
    ).fit(module, ckpt_path=resume)


def test_ema_is_the_recursion_of_the_weights_validation_sees_it_and_the_checkpoint_holds_it(tmp_path: Path) -> None:
    module = Watched(length=16)
    fit(tmp_path, module, steps=6)
    average = module.trained[1]  # Lightning's average begins with the weights after the first step
    for weight in module.trained[2:5]:
        average = DECAY * average + (1 - DECAY) * weight
    torch.testing.assert_close(module.validated[0], average)
    state = torch.load(tmp_path / "checkpoints" / "step-00000004.ckpt", weights_only=True)
    torch.testing.assert_close(state["state_dict"]["layer.weight"], average)
    torch.testing.assert_close(state["current_model_state"]["layer.weight"], module.trained[4])


@pytest.mark.parametrize("stop", [1, 3, 4, 5])
def test_ema_resumes_exactly(tmp_path: Path, stop: int) -> None:
    fit(tmp_path, TinyModule(length=16), steps=8)
    expected, rows = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True), measured(tmp_path)
    fit(tmp_path, TinyModule(length=16), steps=8, resume=tmp_path / "checkpoints" / f"step-{stop:08d}.ckpt")
    found = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    for part in ("state_dict", "current_model_state", "averaging_state", "optimizer_states"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert measured(tmp_path) == rows


class Scripted(TinyModule):
    """Validation losses as told: the best at the second, then worse."""

    scores = (3.0, 2.0, 2.5, 2.6, 2.7, 2.8)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        pass

    def on_validation_epoch_end(self) -> None:
        self.log("val/loss", self.scores[self.global_step // 2 - 1])


def test_early_stopping_counts_on_over_a_resume(tmp_path: Path) -> None:
    def trainer(folder: Path, *callbacks: Any) -> Any:
        checkpoint = StepCheckpoint(every_n_steps=1, keep_last=-1)
        return make_trainer(
            folder,
            EarlyStopping("val/loss", patience=3),
            *callbacks,
            checkpoint=checkpoint,
            max_steps=12,
            limit_val_batches=1,
            val_check_interval=2,
        )

    whole = trainer(tmp_path / "whole")
    whole.fit(Scripted(length=4))
    assert whole.global_step == 10, "three validations without a better one after the second"
    rows = measured(tmp_path / "whole")
    for stop in (6, 7, 8):
        resumed = trainer(tmp_path / "whole", GracefulStop())
        resumed.fit(Scripted(length=4), ckpt_path=tmp_path / "whole" / "checkpoints" / f"step-{stop:08d}.ckpt")
        assert resumed.global_step == 10
        assert measured(tmp_path / "whole") == rows
    assert Path(resumed.checkpoint_callback.best_model_path).name == "step-00000004.ckpt"


def test_the_mean_of_checkpoints(tmp_path: Path) -> None:
    paths = []
    for number in (1, 2, 6):
        state = {"w": torch.tensor([float(number), 1.0], dtype=torch.bfloat16), "n": torch.tensor(number)}
        paths.append(tmp_path / f"step-{number:08d}.ckpt")
        torch.save({"state_dict": state, "pytorch-lightning_version": "2", "global_step": number}, paths[-1])
    mean = mean_of_checkpoints(paths)
    assert mean["w"].tolist() == [3.0, 1.0]
    assert mean["w"].dtype == torch.bfloat16
    assert mean["n"].item() == 6
