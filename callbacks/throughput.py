"""How fast a run trains, and what share of the work was useful."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from callbacks.device_peaks import dense_peak_flops


class Throughput(Callback):
    """Logs the speed over the optimizer steps since the last logged one, summed over ranks.

    - ``throughput/tokens_per_second``: tokens that are not padding; ``throughput/steps_per_second``.
    - ``throughput/useful_share``: those tokens among all positions computed.
    - ``throughput/flops_per_second``, ``throughput/mfu`` (model FLOPs utilization, PaLM, arXiv 2204.02311, appendix B):
      the module's ``flops_per_token`` times tokens per second, and its share of the devices' peak. Only the model's own
      operations count: recomputed activations and padding do not. Left out where a factor is not known.

    Waiting for data counts; validation and writing checkpoints do not. The clock starts with the second optimizer step:
    the first compiles and allocates.

    Args:
        peak_flops: FLOP/s of one device that count as 100 %; default: its dense bf16 rate where it is known and the
            precision is a 16-bit one.
    """

    def __init__(self, peak_flops: float | None = None) -> None:
        if peak_flops is not None and peak_flops <= 0:
            raise ValueError(f"Throughput.peak_flops: {peak_flops} is not allowed; give one device's, such as 312e12")
        self.peak_flops = peak_flops
        self._window = _Work()  # of the accumulation window so far
        self._since_log = _Work()  # of the optimizer steps since the last logged one
        self._timed = _Work()  # of those among them that were timed
        self._seconds = 0.0
        self._clock: float | None = None
        self._warm = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._clock, self._warm = None, False
        if not trainer.is_global_zero:
            self._since_log = _Work()  # what a checkpoint holds is the sum over ranks
        if self.peak_flops is None and "16" in str(trainer.precision) and pl_module.device.type == "cuda":
            self.peak_flops = dense_peak_flops(torch.cuda.get_device_name(pl_module.device))

    def pause(self) -> None:
        """Leave out the time until the next batch; for callbacks that do long work between two steps."""
        self._clock = None

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pause()

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._clock is None and self._warm:
            self._clock = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        computed, useful = batch.tokens()
        self._window += _Work(computed, useful)
        if trainer.fit_loop._should_accumulate():
            return
        self._window.steps = 1
        now = time.perf_counter()
        if self._clock is not None:
            self._timed += self._window
            self._seconds += now - self._clock
        self._clock, self._warm = now, True
        self._since_log += self._window
        self._window = _Work()
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._log(trainer, pl_module)

    def _log(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        work, timed = _sum_over_ranks(trainer, self._since_log, self._timed)
        values = {"throughput/useful_share": work.useful / max(work.computed, 1)}
        if self._seconds > 0:
            rate = timed.useful / self._seconds
            values["throughput/tokens_per_second"] = rate
            values["throughput/steps_per_second"] = self._timed.steps / self._seconds
            flops_per_token = getattr(pl_module, "flops_per_token", None)
            if flops_per_token:
                values["throughput/flops_per_second"] = rate * flops_per_token
                if self.peak_flops:
                    values["throughput/mfu"] = rate * flops_per_token / (self.peak_flops * trainer.world_size)
        pl_module.log_dict(values, on_step=True, on_epoch=False)
        self._since_log, self._timed, self._seconds = _Work(), _Work(), 0.0

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.pause()
        (work,) = _sum_over_ranks(trainer, self._since_log)
        checkpoint["callbacks"][self.state_key] = {"since_log": [work.computed, work.useful, work.steps]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._since_log = _Work(*state_dict["since_log"])


@dataclass
class _Work:
    """Positions computed, those that were not padding, and optimizer steps."""

    computed: int = 0
    useful: int = 0
    steps: int = 0

    def __add__(self, other: _Work) -> _Work:
        return _Work(self.computed + other.computed, self.useful + other.useful, self.steps + other.steps)


def _sum_over_ranks(trainer: pl.Trainer, *works: _Work) -> list[_Work]:
    """The work of all ranks together (steps are everybody's). All ranks call it."""
    if trainer.world_size == 1:
        return list(works)
    values = [[work.computed, work.useful] for work in works]
    total = trainer.strategy.reduce(
        torch.tensor(values, dtype=torch.float64, device=trainer.strategy.root_device), reduce_op="sum"
    )
    assert isinstance(total, torch.Tensor)
    dealt = trainer.distributed_sampler_kwargs or {"num_replicas": trainer.world_size}
    shared = trainer.world_size // dealt["num_replicas"]  # ranks that work on the same rows (tensor, context parallel)
    sums = (total.long() // shared).tolist()
    return [_Work(computed, useful, work.steps) for (computed, useful), work in zip(sums, works, strict=True)]
