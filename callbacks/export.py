"""The trained model leaves as an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from callbacks.checkpoint import StepCheckpoint
from callbacks.checkpoint_io import AtomicCheckpointIO
from callbacks.run_files import run_folder


class ExportFolder(Callback):
    """Writes ``export/`` in the run's folder when training has come to its end.

    The folder holds weights, tokenizer, chat template, generation config and a model card with recipe, data, tokens
    seen and metrics. It is complete or not there.

    Args:
        weights: the weights of the last step, those of the checkpoint with the best validation, or the mean of the last
            checkpoints (stochastic weight averaging without its schedule, arXiv 1803.05407).
        average: how many of the last checkpoints `average` takes; `checkpoint.keep_last` must keep that many.
        folder: its name, or a path of its own.
    """

    def __init__(
        self, weights: Literal["last", "best", "average"] = "last", average: int = 3, folder: str = "export"
    ) -> None:
        if weights not in ("last", "best", "average"):
            raise ValueError(f"ExportFolder.weights: {weights!r} is not allowed; last, best or average")
        if average < 2:
            raise ValueError(f"ExportFolder.average: {average} is not allowed; 2 or more checkpoints")
        self.weights = weights
        self.average = average
        self.folder = folder
        self._validated = -1  # the step of the last validation

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        checkpoint = trainer.checkpoint_callback
        if stage != "fit" or self.weights == "last":
            return
        if not isinstance(checkpoint, StepCheckpoint):
            raise ValueError(f"ExportFolder.weights: {self.weights!r} needs callbacks.StepCheckpoint")
        if self.weights == "best" and checkpoint.keep_best < 1:
            raise ValueError("ExportFolder.weights: 'best' needs checkpoint.keep_best to be 1 or more; it is 0")
        if self.weights == "average" and 0 <= checkpoint.keep_last < self.average:
            raise ValueError(
                f"ExportFolder.average: {self.average} checkpoints cannot be averaged when checkpoint.keep_last is "
                f"{checkpoint.keep_last}; set it to {self.average}"
            )

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._validated = trainer.global_step

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        run = run_folder(trainer)
        step, seen = trainer.global_step, {}
        spread, weights = getattr(trainer.strategy, "spreads_weights", False), None
        if self.weights != "last":
            paths = self._paths(trainer)
            step = int(paths[-1].stem.rpartition("-")[2])
            seen = _tokens_seen(paths[-1])
            weights = mean_of_checkpoints(paths)
            if not spread:
                pl_module.load_state_dict(weights)
        elif spread:
            weights = trainer.strategy.lightning_module_state_dict()  # every rank gives its part
        if trainer.is_global_zero:
            target = run / self.folder
            temporary = target.with_name(f".{target.name}-partial")
            shutil.rmtree(temporary, ignore_errors=True)
            info = {
                **describe_run(run),
                "step": step,
                "weights": self.weights,
                "metrics": self._metrics(trainer),
                **seen,
            }
            module: Any = pl_module
            # A module of somebody else's need not know of weights that are spread.
            given = {"weights": weights} if spread else {}
            module.export(temporary, {**info, "place": str(target)}, **given)
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
        trainer.strategy.barrier("ExportFolder")

    def _metrics(self, trainer: pl.Trainer) -> dict[str, float]:
        """What was measured of the weights that leave; of a mean, nothing was."""
        checkpoint = trainer.checkpoint_callback
        if self.weights == "last":
            at = "" if self._validated == trainer.global_step else f" (at step {self._validated:,})"
            values = trainer.callback_metrics.items()
            return {f"{name}{at}": float(value) for name, value in values if name.startswith("val/")}
        if self.weights == "best":
            assert isinstance(checkpoint, StepCheckpoint)
            return {str(checkpoint.monitor): float(checkpoint.best_model_score)}  # type: ignore[arg-type]
        return {}

    def _paths(self, trainer: pl.Trainer) -> list[Path]:
        """The checkpoints whose weights leave."""
        checkpoint = trainer.checkpoint_callback
        assert isinstance(checkpoint, StepCheckpoint)
        if self.weights == "best":
            if not checkpoint.best_k_models:
                raise ValueError(
                    "ExportFolder.weights: 'best', but the run was never validated; see val_check_interval"
                )
            return [Path(checkpoint.best_model_path)]
        paths = checkpoint.complete_checkpoints()
        if len(paths) < self.average:
            raise ValueError(
                f"ExportFolder.average: {self.average} checkpoints were to be averaged, the run wrote {len(paths)}; "
                "lower checkpoint.every_n_steps"
            )
        return paths[-self.average :]


def _tokens_seen(path: Path) -> dict[str, int]:
    """What a module of ours notes in its checkpoints: the run's own count is that of its end."""
    about = AtomicCheckpointIO(mmap_above_gib=0.0).load_checkpoint(path).get("litrecipes", {})
    return {"tokens_seen": about["tokens_seen"]} if "tokens_seen" in about else {}


def mean_of_checkpoints(paths: list[Path]) -> dict[str, Tensor]:
    """The mean of the checkpoints' weights, tensor by tensor, summed in float64; of whole numbers the last ones."""
    reader = AtomicCheckpointIO(mmap_above_gib=0.0)
    states = [reader.load_checkpoint(path)["state_dict"] for path in paths]
    mean: dict[str, Tensor] = {}
    for name, last in states[-1].items():
        if len(states) == 1 or not last.is_floating_point():
            mean[name] = last
        else:
            total = torch.zeros_like(last, dtype=torch.float64)
            for state in states:
                total += state[name]
            mean[name] = (total / len(states)).to(last.dtype)
    return mean


def describe_run(run: Path) -> dict[str, Any]:
    """What the run's own files say for the model card: recipe, config, data."""
    info: dict[str, Any] = {}
    environment, config = run / "environment.json", run / "config.yaml"
    if environment.exists():
        info["recipe"] = json.loads(environment.read_text(encoding="utf-8")).get("recipe")
    if config.exists():
        info["config"] = config.read_text(encoding="utf-8")
        values = yaml.safe_load(info["config"]) or {}
        info["data"] = ((values.get("data") or {}).get("init_args") or {}).get("sources")
    return info
