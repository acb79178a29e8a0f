"""Our side: the whole command `recipes fit`, as a user runs it, with its default callbacks and loggers."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.recorder import Recorder

_recorders: list[Recorder] = []


class Watch(Callback):
    """Shows the model to the recorder, once it is built."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _recorders[-1].watch(pl_module.model.hf)


def fit(
    recipe: str,
    work: Path,
    settings: dict[str, Any],
    recorder: Recorder,
    steps: int,
    source: Path,
    *overrides: str,
) -> None:
    """Runs ``recipes fit -c RECIPE`` on the common model, rows and settings, in this process."""
    words = [
        *("-c", str(Path(__file__).parent / f"{recipe}.yaml")),
        *("--tokenizer", str(work / "model"), "--sequence_length", str(settings["sequence"])),
        *("--model.init_args.backbone.source", str(work / "model")),
        *("--model.init_args.optimizer.init_args.lr", str(settings["lr"])),
        *("--data.init_args.sources", f"[{{path: {source}}}]"),
        *("--data.init_args.batch_size", str(settings["batch"])),
        *("--data.init_args.cache_dir", str(work / "cache")),
        *("--trainer.max_steps", str(steps), "--trainer.gradient_clip_val", str(settings["clip"])),
        *("--trainer.precision", settings["precision"]),
        *("--trainer.log_every_n_steps", str(1 if recorder.check else min(10, steps))),
        *("--trainer.callbacks", "[{class_path: benchmarks.recipe_side.Watch}]"),
        *overrides,
    ]
    recorder.finish([float(row["train/loss"]) for row in run(work, recorder, words)])


def run(work: Path, recorder: Recorder, words: list[str]) -> list[dict[str, str]]:
    """``recipes fit WORDS`` in this process, with the clocks read; the trainer's callbacks must hold ``Watch``.

    Returns:
        The rows of its metrics.csv that have a training loss.
    """
    import recipes.cli  # noqa: F401 - counted as import
    from recipes.__main__ import main

    runs = work / f"runs-{recorder.out.stem}"
    shutil.rmtree(runs, ignore_errors=True)
    _recorders.append(recorder)
    recorder.start()
    if status := main(["fit", *words, "--runs_dir", str(runs)]):
        raise SystemExit(status)
    with next(runs.rglob("metrics.csv")).open() as stream:
        return [row for row in csv.DictReader(stream) if row.get("train/loss")]
