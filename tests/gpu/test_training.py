"""A tiny model trains on one GPU under every precision, strategy and saving of memory, close to fp32, and resumes."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from recipes.__main__ import main

pytestmark = pytest.mark.gpu

STEPS = 12
RECIPE = f"""\
tokenizer: builtin:bytes
sequence_length: 128
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {{model_type: llama, hidden_size: 128, intermediate_size: 256, num_hidden_layers: 2,
               num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 128}}
    optimizer: {{class_path: torch.optim.AdamW, init_args: {{lr: 1.0e-3}}}}
data:
  class_path: llm_modules.data.TextDataModule
  init_args: {{sources: [{{path: rows.jsonl}}], batch_size: 4, packing: documents, validation_fraction: 0.0}}
trainer: {{max_steps: {STEPS}, accelerator: auto, devices: 1, log_every_n_steps: 1, enable_progress_bar: false,
          gradient_clip_val: 1.0}}
checkpoint: {{every_n_steps: {STEPS // 2}}}
leave_out: [ExportFolder, RunReport]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu")
    rows = [json.dumps({"text": f"row number {i} of many, " * (1 + i % 9)}) for i in range(200)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


@pytest.fixture(autouse=True)
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In the folder, and with nothing left of what a strategy tells the processes that it starts."""
    monkeypatch.chdir(folder)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def fit(name: str, *words: str) -> list[float]:
    """The losses of all steps of the newest run below ``name``."""
    assert main(["fit", "-c", "tiny", "--runs_dir", name, *words]) == 0
    newest = max(Path(name).glob("tiny/*/metrics.csv"), key=lambda path: path.stat().st_mtime_ns)
    with newest.open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


@pytest.fixture(scope="module")
def exact(folder: Path) -> list[float]:
    """In fp32, in one process."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        losses = fit("exact")
    finally:
        os.chdir(before)
    assert len(losses) == STEPS
    assert losses[-1] < 0.8 * losses[0]
    return losses


WAYS = {
    "bf16-mixed": ("-c", "precision/bf16-mixed"),
    "bf16-true": ("-c", "precision/bf16-true"),
    "16-mixed": ("-c", "precision/16-mixed"),
    "16-mixed-fused": ("-c", "precision/16-mixed", "--model.optimizer.fused", "true"),
    "offload": ("--model.backbone.activation_offload", "true"),
    "bf16-checkpointed": ("-c", "precision/bf16-mixed", "--model.backbone.activation_checkpointing", "true"),
    "bf16-selective": ("-c", "precision/bf16-mixed", "--model.backbone.activation_checkpointing", "selective"),
    "bf16-compile": ("-c", "precision/bf16-mixed", "--model.backbone.compile", "true"),
    "fsdp1": ("-c", "strategies/fsdp1", "--trainer.devices", "1"),
    "fsdp2": ("-c", "strategies/fsdp2", "--trainer.devices", "1"),
    "fsdp1-bf16": ("-c", "strategies/fsdp1", "-c", "precision/bf16-mixed", "--trainer.devices", "1"),
    "fsdp2-bf16": ("-c", "strategies/fsdp2", "-c", "precision/bf16-mixed", "--trainer.devices", "1"),
    "zero3-bf16": ("-c", "strategies/zero3", "-c", "precision/bf16-mixed", "--trainer.devices", "1"),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_trains_as_in_fp32(way: str, exact: list[float]) -> None:
    if way.startswith("zero") and find_spec("deepspeed") is None:
        pytest.skip("needs deepspeed")
    losses = fit(way, *WAYS[way])
    assert len(losses) == STEPS
    # Small updates are lost to rounding where the weights themselves are in bf16.
    tolerance = 0.1 if way == "bf16-true" else 0.02 if "16" in way else 1e-4
    for step, (loss, expected) in enumerate(zip(losses, exact, strict=True)):
        assert abs(loss - expected) < tolerance * exact[0], f"step {step}: {loss} instead of {expected}"


@pytest.mark.parametrize("way", ["bf16-mixed", "16-mixed", "fsdp2-bf16"])
def test_it_resumes(way: str) -> None:
    """What was cut off at half its length ends as the whole run does (fp16's loss scale comes back, too)."""
    half = ("--trainer.max_steps", str(STEPS // 2))
    whole, first = fit(f"whole-{way}", *WAYS[way]), fit(f"half-{way}", *WAYS[way], *half)
    resumed = fit(f"half-{way}", *WAYS[way], "--run", "0")
    assert (len(first), len(resumed)) == (STEPS // 2, STEPS)
    for loss, expected in zip(resumed, whole, strict=True):
        assert abs(loss - expected) < 1e-3 * expected


def test_qlora_trains_as_lora_does() -> None:
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    higher = ("--model.optimizer.lr", "1.0e-2")
    whole = fit("lora", "-c", "adapters/lora", "-c", "precision/bf16-mixed", *higher)
    small = fit("qlora", "-c", "adapters/qlora", *higher)
    assert small[-1] < 0.95 * small[0]
    assert abs(small[-1] - whole[-1]) < 0.1 * whole[0]


def test_where_the_device_is_watched() -> None:
    """The peak is that of the device, and every step says how fast it was."""
    assert main(["fit", "-c", "tiny", "--runs_dir", "watched", "-c", "precision/bf16-mixed"]) == 0
    with Path("watched/tiny/0/metrics.csv").open(newline="") as file:
        last = [row for row in csv.DictReader(file) if row.get("train/loss")][-1]
    assert float(last["throughput/tokens_per_second"]) > 0
    assert float(last["memory/peak_gib"]) > 0
    if torch.cuda.is_available() and "throughput/mfu" in last:
        assert 0 < float(last["throughput/mfu"]) < 1
