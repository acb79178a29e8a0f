"""Throughput against a clock of the test's own and counts done by hand."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from callback_runs import Batch, TinyModule, make_trainer
from torch import Tensor

from callbacks import StepCheckpoint, Throughput
from callbacks.device_peaks import dense_peak_flops
from callbacks.metrics_csv import read_rows


class Slow(TinyModule):
    """0.02 s a micro-batch, 1.2 s a validation and a checkpoint, and a first step of 0.3 s more."""

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        time.sleep(0.32 if self.global_step == 0 and batch_idx == 0 else 0.02)
        return super().training_step(batch, batch_idx)

    def on_validation_epoch_start(self) -> None:
        time.sleep(1.2)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        time.sleep(1.2)


def test_speed_counts_training_only_and_useful_tokens_only(tmp_path: Path) -> None:
    trainer = make_trainer(
        tmp_path,
        Throughput(peak_flops=1e6),
        checkpoint=StepCheckpoint(every_n_steps=3, keep_best=0),
        max_steps=8,
        accumulate_grad_batches=2,
        log_every_n_steps=4,
        limit_val_batches=1,
        val_check_interval=4,
    )
    trainer.fit(Slow(length=16))
    first, second = read_rows(tmp_path / "metrics.csv")[1], read_rows(tmp_path / "metrics.csv")[-1]
    for row in (first, second):
        assert float(row["throughput/useful_share"]) == 7 / 8  # 8 positions a micro-batch, 1 of them padding
        # Two micro-batches of 7 tokens and 0.02 s (and a little, more on a busy machine) are a step; with the 1.2 s
        # of the validation or the checkpoint in it, there would be fewer than 3 steps a second.
        assert 5 < float(row["throughput/steps_per_second"]) < 25
        rate = float(row["throughput/tokens_per_second"])
        assert rate == pytest.approx(14 * float(row["throughput/steps_per_second"]))
        assert float(row["throughput/flops_per_second"]) == pytest.approx(100 * rate)
        assert float(row["throughput/mfu"]) == pytest.approx(100 * rate / 1e6)


def test_without_flops_or_peak_what_follows_from_them_is_left_out(tmp_path: Path) -> None:
    module = TinyModule()
    module.flops_per_token = None
    make_trainer(tmp_path, Throughput(peak_flops=1e6), max_steps=3).fit(module)
    make_trainer(tmp_path / "cpu", Throughput(), max_steps=3).fit(TinyModule())
    assert "throughput/flops_per_second" not in read_rows(tmp_path / "metrics.csv")[-1]
    assert "throughput/mfu" not in read_rows(tmp_path / "cpu" / "metrics.csv")[-1]
    assert "throughput/flops_per_second" in read_rows(tmp_path / "cpu" / "metrics.csv")[-1]


def test_useful_share_is_the_same_over_a_resume(tmp_path: Path) -> None:
    class Uneven(TinyModule):
        def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
            batch.padding = batch.rows[0] % 5
            return batch

    shares = {}
    for name, ends in (("whole", [8]), ("resumed", [3, 8])):
        for end in ends:
            last = tmp_path / name / "checkpoints" / "last.ckpt"
            trainer = make_trainer(tmp_path / name, Throughput(), max_steps=end, log_every_n_steps=4)
            trainer.fit(Uneven(), ckpt_path=last if last.exists() else None)
        shares[name] = [row["throughput/useful_share"] for row in read_rows(tmp_path / name / "metrics.csv")]
    assert shares["whole"] == shares["resumed"]
    assert float(shares["whole"][0]) == 1 - (0 + 2 + 4 + 1) / 32


def test_refuses_a_peak_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"Throughput.peak_flops: 0.0 is not allowed"):
        Throughput(peak_flops=0.0)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA L4", 121.0),
        ("NVIDIA A40", 149.7),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("AMD Instinct MI300X", 1307.4),
        ("Tesla T4", None),
        ("NVIDIA A10G", None),
    ],
)
def test_peaks_of_devices_by_the_names_they_give(name: str, tera: float | None) -> None:
    assert dense_peak_flops(name) == (None if tera is None else tera * 1e12)
