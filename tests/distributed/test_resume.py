"""Nothing is lost: a run that is killed with SIGKILL and continued writes the metrics of one that was not, bit for bit.

Through the command itself, with real processes: in an accumulation window, in an epoch, in a validation, in the writing
of a checkpoint; with 0 and 2 loader workers, packed and padded, on one process and two.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from callbacks.metrics_csv import MACHINE_COLUMNS
from tests.ranks import ROOT, run_command, said

RECIPE = """
seed_everything: 7
tokenizer: builtin:bytes
sequence_length: 96
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 128}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
    schedule: {class_path: llm_modules.schedules.WarmupCosine, init_args: {warmup: 2}}
data:
  class_path: llm_modules.data.TextDataModule
  init_args: {batch_size: 2, validation_fraction: 0.2}
trainer:
  accelerator: cpu
  max_epochs: 2
  accumulate_grad_batches: 2
  gradient_clip_val: 1.0
  log_every_n_steps: 1
  val_check_interval: 6
  enable_progress_bar: false
checkpoint: {every_n_steps: 2}
"""

LAYOUTS: dict[str, dict[str, Any]] = {
    "packed, 0 workers": {"packing": "documents", "workers": 0, "devices": 1},
    "padded, 2 workers": {"packing": "none", "workers": 2, "devices": 1},
    "packed, 2 workers, two ranks": {"packing": "documents", "workers": 2, "devices": 2},
    "padded, 0 workers, two ranks": {"packing": "none", "workers": 0, "devices": 2},
}
KILLS = [("window", 1), ("window", 9), ("torn", 5), ("unnamed", 9), ("validation", 6)]


def recipes(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """One command in a process group of its own; where it hangs, the test fails with the stack of each process."""
    process = subprocess.Popen(
        [sys.executable, "-m", "recipes", *arguments],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGABRT)
        raise AssertionError(f"{arguments} hung:\n{process.communicate()[1][-20000:]}") from None
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def write_recipe(folder: Path, layout: dict[str, Any]) -> None:
    rows = [{"text": f"{i}: " + "abc def ghi jkl "[: 3 + i % 13] * (1 + i % 5)} for i in range(160)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load(RECIPE)
    config["data"]["init_args"] |= {
        "sources": [{"path": str(folder / "rows.jsonl")}],
        "packing": layout["packing"],
        "workers": layout["workers"],
    }
    config["trainer"] |= {"devices": layout["devices"]}
    if layout["devices"] != 1:
        config["trainer"]["strategy"] = "ddp"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))


def metrics(folder: Path) -> list[dict[str, str]]:
    """Rows of metrics.csv without the wall-clock columns, as they stand in the file."""
    files = list(folder.glob("runs/recipe/*/metrics.csv"))
    assert len(files) == 1, "resuming must continue in the same folder"
    with files[0].open(newline="") as file:
        return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in csv.DictReader(file)]


@pytest.fixture(scope="module", params=LAYOUTS)
def undisturbed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list]:
    folder, layout = tmp_path_factory.mktemp("undisturbed"), LAYOUTS[request.param]
    write_recipe(folder, layout)
    statuses = run_command(folder, ["fit", "-c", "recipe.yaml"], layout["devices"])
    assert set(statuses) == {0}, said(folder)
    rows = metrics(folder)
    losses = [float(row["train/loss"]) for row in rows if row.get("train/loss")]
    assert len(losses) >= 10
    assert len(set(losses)) == len(losses)
    return request.param, rows


@pytest.mark.slow
@pytest.mark.parametrize(("where", "step"), KILLS)
def test_killed_and_resumed(undisturbed: tuple[str, list], where: str, step: int, tmp_path: Path) -> None:
    name, expected = undisturbed
    layout = LAYOUTS[name]
    write_recipe(tmp_path, layout)
    killer = {"class_path": "tests.distributed.kill.Kill", "init_args": {"where": where, "step": step}}
    (tmp_path / "kill.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [killer]}}))
    killed = run_command(tmp_path, ["fit", "-c", "recipe.yaml", "-c", "kill.yaml"], layout["devices"])
    assert set(killed) == {-signal.SIGKILL}, said(tmp_path)
    resumed = run_command(tmp_path, ["fit", "-c", "recipe.yaml", "--ckpt_path", "last"], layout["devices"])
    assert set(resumed) == {0}, said(tmp_path)
    assert metrics(tmp_path) == expected
