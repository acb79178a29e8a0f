"""StepCheckpoint: where it saves, what it keeps, and that a killed run goes on as if it had not been killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from callback_runs import TinyModule, make_trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from callbacks import StepCheckpoint
from callbacks.metrics_csv import MACHINE_COLUMNS, read_rows

SCRIPT = Path(__file__).with_name("callback_runs.py")


def run(folder: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT), json.dumps({"folder": str(folder), **options})]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def measured(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in read_rows(folder / "metrics.csv")]


def weights(folder: Path) -> dict[str, Any]:
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    return {"weights": checkpoint["state_dict"], "optimizer": checkpoint["optimizer_states"]}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


def positions(folder: Path) -> list[int]:
    """How many micro-batches the loader had given out at each checkpoint (of a run within one epoch)."""
    found = []
    for path in sorted((folder / "checkpoints").glob("step-*.ckpt")):
        loops = torch.load(path, weights_only=True)["loops"]["fit_loop"]
        found.append(loops["state_dict"]["combined_loader"][0]["position"])
    return found


@pytest.mark.parametrize("accumulate", [1, 4])
def test_saves_only_after_optimizer_steps(tmp_path: Path, accumulate: int) -> None:
    checkpoint = StepCheckpoint(every_n_steps=2, keep_last=-1, keep_best=0)
    trainer = make_trainer(tmp_path, checkpoint=checkpoint, max_steps=5, accumulate_grad_batches=accumulate)
    trainer.fit(TinyModule(length=5 * accumulate))
    assert positions(tmp_path) == [2 * accumulate, 4 * accumulate, 5 * accumulate]
    assert os.readlink(tmp_path / "checkpoints" / "last.ckpt") == "step-00000005.ckpt"


def test_who_stops_a_run_inside_a_window_stops_it_at_its_end(tmp_path: Path) -> None:
    class Timer(Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            trainer.should_stop = trainer.should_stop or batch_idx == 5

    settings: dict[str, Any] = {"accumulate_grad_batches": 4, "limit_val_batches": 1, "val_check_interval": 16}

    def checkpoint() -> StepCheckpoint:
        return StepCheckpoint(every_n_steps=100)

    trainer = make_trainer(tmp_path / "run", Timer(), checkpoint=checkpoint(), max_steps=9, **settings)
    trainer.fit(TinyModule(length=16))
    assert positions(tmp_path / "run") == [8]
    assert trainer.global_step == 2
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    make_trainer(tmp_path / "run", checkpoint=checkpoint(), max_steps=9, **settings).fit(TinyModule(16), ckpt_path=last)
    make_trainer(tmp_path / "whole", checkpoint=checkpoint(), max_steps=9, **settings).fit(TinyModule(16))
    torch.testing.assert_close(weights(tmp_path / "run"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_stock_checkpoint_saves_inside_a_window_after_resume_and_ours_does_not(tmp_path: Path) -> None:
    """The reason for the class: ``global_step % n == 0`` still holds at the first micro-batch of the next window."""
    saved: dict[str, list[int]] = {}
    for kind in ("stock", "ours"):
        folder = tmp_path / kind / "checkpoints"
        for max_steps, resume in ((2, None), (3, "step-00000002.ckpt")):
            checkpoint: Any = StepCheckpoint(every_n_steps=2, keep_last=-1, keep_best=0)
            if kind == "stock":
                checkpoint = ModelCheckpoint(
                    folder,
                    filename="step-{step:08d}",
                    every_n_train_steps=2,
                    save_top_k=-1,
                    auto_insert_metric_name=False,
                )
            trainer = make_trainer(
                tmp_path / kind, checkpoint=checkpoint, max_steps=max_steps, accumulate_grad_batches=4
            )
            trainer.fit(TinyModule(length=16), ckpt_path=folder / resume if resume else None)
        saved[kind] = positions(tmp_path / kind)
    assert saved["ours"] == [8, 12]
    assert any(position % 4 for position in saved["stock"]), "Lightning no longer does this: the comment can go"


def test_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    class Scripted(TinyModule):
        scores = iter([5.0, 2.0, 3.0, float("nan"), 2.0, 4.0])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            pass

        def on_validation_epoch_end(self) -> None:
            self.log("val/loss", next(self.scores))

    checkpoint = StepCheckpoint(every_n_steps=2, keep_last=2, keep_best=2)
    trainer = make_trainer(tmp_path, checkpoint=checkpoint, max_steps=6, limit_val_batches=1, val_check_interval=1)
    trainer.fit(Scripted())
    # best: 2.0 of step 2 and, among equals after it, 2.0 of step 5; newest: steps 4 and 6 (every second), 5 as a best
    assert names(tmp_path) == [
        "best.ckpt",
        "last.ckpt",
        "step-00000002.ckpt",
        "step-00000005.ckpt",
        "step-00000006.ckpt",
    ]
    assert os.readlink(tmp_path / "checkpoints" / "best.ckpt") == "step-00000002.ckpt"
    assert Path(trainer.checkpoint_callback.best_model_path).name == "step-00000002.ckpt"


def test_validation_comes_before_the_checkpoint_of_its_step(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path, checkpoint=StepCheckpoint(every_n_steps=4), max_steps=4, limit_val_batches=1, val_check_interval=4
    )
    trainer.fit(TinyModule())
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["StepCheckpoint"]
    assert state["best"] == {"step-00000004.ckpt": float(trainer.callback_metrics["val/loss"])}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "step"),
    [("micro-batch", 5), ("write", 4), ("before the link", 4), ("after the link", 4), ("validation", 6)],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(tmp_path: Path, place: str, step: int) -> None:
    options: dict[str, Any] = {
        "trainer": {"max_steps": 9, "accumulate_grad_batches": 2, "limit_val_batches": 2, "val_check_interval": 6},
        "checkpoint": {"every_n_steps": 2, "keep_last": 2, "keep_best": 1},
        "module": {"length": 12},
    }
    killed = run(tmp_path / "killed", **options, callbacks={"kill": [place, step]})
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    for name, resume in (("whole", None), ("killed", tmp_path / "killed" / "checkpoints" / "last.ckpt")):
        checkpoint = StepCheckpoint(**options["checkpoint"])
        trainer = make_trainer(tmp_path / name, checkpoint=checkpoint, **options["trainer"])
        trainer.fit(TinyModule(length=12), ckpt_path=resume)
    assert measured(tmp_path / "killed") == measured(tmp_path / "whole")
    assert len(measured(tmp_path / "whole")) == 9
    torch.testing.assert_close(weights(tmp_path / "killed"), weights(tmp_path / "whole"), rtol=0, atol=0)
    assert names(tmp_path / "killed") == names(tmp_path / "whole")


@pytest.mark.parametrize("stop", [2, 3, 4, 5, 6, 7, 8])
def test_resume_at_every_step_is_exact(tmp_path: Path, stop: int) -> None:
    """Over the ends of an epoch of three steps, with validation every second step."""
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "limit_val_batches": 2, "val_check_interval": 4}
    settings |= {"check_val_every_n_epoch": None}

    def checkpoint() -> StepCheckpoint:
        return StepCheckpoint(every_n_steps=1, keep_last=-1)

    make_trainer(tmp_path / "whole", checkpoint=checkpoint(), max_steps=9, **settings).fit(TinyModule(length=6))
    part = tmp_path / "part"
    # A run that would go on, cut where the checkpoint of step `stop` is complete.
    make_trainer(part, checkpoint=checkpoint(), max_steps=9, **settings).fit(TinyModule(length=6))
    last = part / "checkpoints" / f"step-{stop:08d}.ckpt"
    make_trainer(part, checkpoint=checkpoint(), max_steps=9, **settings).fit(TinyModule(length=6), ckpt_path=last)
    assert measured(part) == measured(tmp_path / "whole")
    torch.testing.assert_close(weights(part), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_later_checkpoints_than_the_one_resumed_from_are_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else `last`, the export and the mean of the last checkpoints take those of the course that was left."""
    settings: dict[str, Any] = {"limit_val_batches": 1, "val_check_interval": 2}

    def checkpoint() -> StepCheckpoint:
        return StepCheckpoint(every_n_steps=2, keep_last=-1)

    folder = tmp_path / "checkpoints"
    make_trainer(tmp_path, checkpoint=checkpoint(), max_steps=6, **settings).fit(TinyModule())
    (folder / "best.ckpt").unlink()
    (folder / "best.ckpt").symlink_to("step-00000006.ckpt")
    resumed = make_trainer(tmp_path, checkpoint=checkpoint(), max_steps=3, **settings)
    resumed.fit(TinyModule(), ckpt_path=folder / "step-00000002.ckpt")
    there = ["step-00000002.ckpt", "step-00000003.ckpt"]
    assert names(tmp_path) == ["best.ckpt", "last.ckpt", "left-step-00000004.ckpt", "left-step-00000006.ckpt", *there]
    assert os.readlink(folder / "last.ckpt") == "step-00000003.ckpt"
    assert os.readlink(folder / "best.ckpt") == "step-00000002.ckpt"
    assert [path.name for path in resumed.checkpoint_callback.complete_checkpoints()] == there
    assert "step-00000004.ckpt, step-00000006.ckpt: of later steps than 2; kept as left-step-*" in (
        capsys.readouterr().err
    )


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    make_trainer(tmp_path / "whole", max_steps=7).fit(TinyModule(length=6))
    make_trainer(tmp_path / "part", max_steps=5).fit(TinyModule(length=6))
    make_trainer(tmp_path / "part", max_steps=7).fit(
        TinyModule(length=6), ckpt_path=tmp_path / "part" / "checkpoints" / "last.ckpt"
    )
    assert measured(tmp_path / "part") == measured(tmp_path / "whole")
    torch.testing.assert_close(weights(tmp_path / "part"), weights(tmp_path / "whole"), rtol=0, atol=0)


def test_refuses_a_folder_with_checkpoints_of_another_run(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2).fit(TinyModule())
    before = (tmp_path / "metrics.csv").read_bytes()
    with pytest.raises(ValueError, match=r"earlier run \(step-00000002.ckpt\); resume it with --ckpt_path last"):
        make_trainer(tmp_path, max_steps=2).fit(TinyModule())
    assert (tmp_path / "metrics.csv").read_bytes() == before


def test_refuses_validation_inside_a_window(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=2, accumulate_grad_batches=4, limit_val_batches=1, val_check_interval=6)
    with pytest.raises(ValueError, match=r"trainer.val_check_interval: every 6 .* a multiple of 4, such as 4"):
        trainer.fit(TinyModule(length=16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every_n_steps": -1}, "checkpoint.every_n_steps: -1 is not allowed; 0 or more"),
        ({"keep_last": 0}, "checkpoint.keep_last: 0 is not allowed; 1 or more, or -1 for all"),
        ({"keep_best": -2}, "checkpoint.keep_best: -2 is not allowed; 0 or more"),
    ],
)
def test_refuses_impossible_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        StepCheckpoint(**arguments)


def test_names_the_metrics_when_the_monitored_one_is_missing(tmp_path: Path) -> None:
    checkpoint = StepCheckpoint(monitor="val/los")
    trainer = make_trainer(tmp_path, checkpoint=checkpoint, max_steps=2, limit_val_batches=1, val_check_interval=2)
    with pytest.raises(
        ValueError, match=r"checkpoint.monitor: 'val/los' is not logged by the validation; there is val/loss"
    ):
        trainer.fit(TinyModule())
