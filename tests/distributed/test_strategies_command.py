"""The command with a strategy's overlay: the exported folder is that of ddp, whatever the weights were spread over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

ROOT = Path(__file__).parents[2]
RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 32
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
               num_key_value_heads: 2, max_position_embeddings: 64}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: llm_modules.data.TextDataModule
  init_args: {sources: [{path: rows.jsonl}], batch_size: 4, validation_fraction: 0.1}
trainer: {max_steps: 3, accelerator: cpu, devices: 2, log_every_n_steps: 1, enable_progress_bar: false,
          gradient_clip_val: 1.0}
checkpoint: {every_n_steps: 1}
"""


def fit(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "recipes", "fit", "-c", "tiny", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("command")
    rows = [json.dumps({"text": f"row number {i}, " * (1 + i % 5)}) for i in range(60)]
    (folder / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (folder / "tiny.yaml").write_text(RECIPE)
    return folder


def exported(folder: Path, number: int, adapter: bool) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if adapter else "model.safetensors"
    return load_file(folder / f"runs/tiny/{number}/export/{name}")


@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora"])
def test_the_exported_folder_is_that_of_ddp(folder: Path, adapter: bool) -> None:
    more = ["-c", "adapters/lora"] if adapter else []
    expected, first = None, len(list(folder.glob("runs/tiny/*")))
    # Tensor-parallel ranks share their rows: one of them takes as many as the two of the others.
    layouts = {"ddp": [], "fsdp2": [], "fsdp1": [], "zero3": [], "tp": ["--data.batch_size", "8"]}
    for number, (name, words) in enumerate(layouts.items(), first):
        done = fit(folder, "-c", f"strategies/{name}", "--trainer.devices", "2", *words, *more)
        assert done.returncode == 0, done.stderr[-3000:]
        weights = exported(folder, number, adapter)
        expected = expected or weights
        assert set(weights) == set(expected)
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=2e-5)


def test_muon_is_refused_where_matrices_come_in_pieces(folder: Path) -> None:
    muon = ["--model.optimizer.class_path", "llm_modules.optimizers.MuonAdamW"]
    done = fit(folder, "-c", "strategies/fsdp1", "--trainer.devices", "2", *muon)
    assert done.returncode == 2, done.stderr[-3000:]
    assert "MuonAdamW needs whole matrices" in done.stderr
    assert "Traceback" not in done.stderr
