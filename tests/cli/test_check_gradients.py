"""`recipes check gradients` on real ranks: what is right passes, what is broken is caught and named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recipes.__main__ import main

ROOT = Path(__file__).parents[2]
RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 160
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 256}
      activation_checkpointing: true
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: llm_modules.data.TextDataModule
  init_args: {sources: [{path: rows.jsonl}], batch_size: 2, packing: batch, validation_fraction: 0.1}
trainer: {max_steps: 3, accelerator: cpu, devices: 1, accumulate_grad_batches: 2, gradient_clip_val: 0.1,
          precision: bf16-mixed}
"""
BROKEN = '''
import torch
from lightning.pytorch.strategies import DDPStrategy
from llm_modules.batch import ObjectiveOutput, Term
from llm_modules.objectives import LanguageObjective


class MicroBatchMean(LanguageObjective):
    """Divides by the tokens of its own micro-batch, as most losses do."""

    def __call__(self, scores):
        return ObjectiveOutput({"loss": Term(-scores.logprobs.mean(), "tokens")})


class NeverReduced(DDPStrategy):
    """Each rank keeps its own gradient."""

    def _setup_model(self, model):
        return model
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = [json.dumps({"text": f"row number {i}, " * (1 + (5 * i) % 9)}) for i in range(60)]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n")
    Path("tiny.yaml").write_text(RECIPE)
    Path("broken.py").write_text(BROKEN)
    return tmp_path


@pytest.mark.slow
@pytest.mark.cluster
def test_what_is_right_passes_also_with_lora_and_its_dropout(capfd: pytest.CaptureFixture[str], folder: Path) -> None:
    words = ["-c", "adapters/lora", "--model.backbone.adapter.lora_dropout", "0.5"]
    assert main(["check", "gradients", "-c", "tiny", "-c", "strategies/ddp", "--devices", "2", *words]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0].startswith(
        "gradients: 2 processes (DDPStrategy, cpu), 8 rows a step as 2 x 2 x 2; one process as 1 x"
    )
    assert out[1].startswith("step 1: whole gradient ")
    assert "worst of 14 tensors" in out[1]  # A and B of the seven matrices of the block
    assert out[2] == "passed"
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == [
        "broken.py",
        "rows.jsonl",
        "tiny.yaml",
    ]


@pytest.mark.slow
def test_a_rank_whose_gradients_are_not_reduced(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--trainer.strategy", "{class_path: broken.NeverReduced}", "--devices", "2"]
    assert main(["check", "gradients", "-c", "tiny", *words]) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("recipes: ")]
    assert len(said) == 1
    assert said[0].startswith("recipes: rank 1 has another gradient than rank 0: step 1, ")
    assert " in model.hf." in said[0]


@pytest.mark.slow
@pytest.mark.cluster
def test_an_objective_that_divides_by_its_own_micro_batch(capfd: pytest.CaptureFixture[str]) -> None:
    """It is told apart from broken synchronization: one process with the same micro-batches has the same gradient."""
    assert main(["check", "gradients", "-c", "tiny", "--model.objective", "broken.MicroBatchMean"]) == 1
    out, err = capfd.readouterr()
    assert "one process: nothing is synchronized, and only the micro-batches are compared" in out
    said = [line for line in err.splitlines() if line.startswith("recipes: ")]
    assert len(said) == 1
    assert said[0].startswith("recipes: the gradient depends on how rows are cut into micro-batches")


@pytest.mark.slow
@pytest.mark.cluster
def test_inside_torchrun(folder: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = ["-c", "tiny", "-c", "strategies/fsdp2", "--devices", "2", "--steps", "2"]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "recipes", "check", "gradients", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("passed") == 1
    assert "gradients: 2 processes (ShardedStrategy, cpu)" in done.stdout
    assert "step 2: whole gradient " in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "-c: a recipe must be named"),
        (["-c", "tiny", "--steps", "0"], "--steps 0: at least 1 is asked for"),
        (["-c", "tiny", "--data.batch_sizes", "3"], "batch_sizes"),
    ],
)
def test_bad_words(words: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "gradients", *words]) == 2
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1
    assert line in err[0]


@pytest.mark.slow
def test_more_rows_than_there_are(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "gradients", "-c", "tiny", "--data.batch_size", "600"]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("recipes: ")]
    assert len(said) == 1
    assert "fewer than the 1200 of one optimizer step" in said[0]
