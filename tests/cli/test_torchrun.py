"""Processes that stand beside one another (torchrun): one folder, told by rank 0; resume; a mistake ends all."""

from __future__ import annotations

import csv
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 32
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 64}
data:
  class_path: llm_modules.data.TextDataModule
  init_args: {sources: [{path: rows.jsonl}], batch_size: 2, validation_fraction: 0.1}
trainer: {max_steps: 2, accelerator: cpu, devices: 2, log_every_n_steps: 1, enable_progress_bar: false}
checkpoint: {every_n_steps: 1}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rows = [json.dumps({"text": f"row number {i}, " * (1 + i % 5)}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def torchrun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    return subprocess.run(
        [*launcher, "-m", "recipes", "fit", "-c", "tiny", "-c", "strategies/ddp", "--trainer.devices", "2", *words],
        cwd=folder,
        # The folder is what an earlier run of this process may have left behind: of no meaning under a launcher.
        env=os.environ | {"OMP_NUM_THREADS": "1", "LITRECIPES_RUN_FOLDER": str(folder / "another")},
        capture_output=True,
        text=True,
        timeout=300,
    )


def steps(folder: Path, run: int) -> list[str]:
    with (folder / f"runs/tiny/{run}/metrics.csv").open() as file:
        return [row["step"] for row in csv.DictReader(file)]


def test_a_run_and_its_resume_share_one_folder(folder: Path) -> None:
    done = torchrun(folder)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (folder / "runs/tiny").iterdir()] == ["0"]
    run = folder / "runs/tiny/0"
    assert {"config.yaml", "metrics.csv", "tensorboard", "checkpoints", "export", "finished"} <= {
        path.name for path in run.iterdir()
    }
    assert steps(folder, 0) == ["0", "1"]
    (run / "finished").unlink()
    done = torchrun(folder, "--ckpt_path", "last", "--trainer.max_steps", "4")
    assert done.returncode == 0, done.stderr
    assert [path.name for path in (folder / "runs/tiny").iterdir()] == ["0"]
    assert steps(folder, 0) == ["0", "1", "2", "3"]


def test_a_mistake_ends_all_processes(folder: Path) -> None:
    done = torchrun(folder, "--data.sources.0.columns", "{text: content}")
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("recipes: ")]) == 1
    assert not (folder / "runs").exists()
