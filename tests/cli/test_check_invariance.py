"""`recipes check invariance`: what is right passes; a loss that forgets the padding does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.check_invariance import OWN, answer_cuts, row_cuts, variants

RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 160
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 256}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: llm_modules.data.TextDataModule
  init_args: {sources: [{path: rows.jsonl}], batch_size: 4, packing: documents, validation_fraction: 0.1}
trainer: {max_steps: 3, accelerator: cpu, devices: 1, accumulate_grad_batches: 2, precision: bf16-mixed}
"""
BROKEN = '''
from llm_modules import LanguageModelModule
from llm_modules.batch import ObjectiveOutput, Term
from llm_modules.logprobs import next_token_targets
from llm_modules.objectives import LanguageObjective


class MicroBatchMean(LanguageObjective):
    """Divides by the tokens of its own micro-batch, as most losses do."""

    def __call__(self, scores):
        return ObjectiveOutput({"loss": Term(-scores.logprobs.mean(), "tokens")})


class ForgetsPadding(LanguageModelModule):
    """Scores whatever follows in the row."""

    def objective_step(self, batch):
        targets = next_token_targets(batch.input_ids, batch.position_ids)
        scores = self.model(batch.input_ids, batch.position_ids, targets, batch.document_offsets, batch.max_document,
                            lengths=batch.lengths)
        return ObjectiveOutput({"loss": Term(-scores.logprobs.sum(), "tokens")})
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": f"row number {i}, " * (1 + (5 * i) % 9)}) for i in range(60)]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n")
    Path("tiny.yaml").write_text(RECIPE)
    Path("broken_cuts.py").write_text(BROKEN)
    return tmp_path


def said(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("recipes: ")]


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["-c", "adapters/lora"], ["--data.packing", "chunks"], ["--rows", "6"]])
def test_what_is_right_passes(words: list[str], folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.iterdir())
    assert main(["check", "invariance", "-c", "tiny", *words]) == 0
    out = capfd.readouterr().out.splitlines()
    rows, cut = ("6", "3 x 2") if "--rows" in words else ("8", "4 x 2")
    packing = "chunks" if "chunks" in words else "documents"
    assert out[0] == f"invariance: {rows} rows a step as {cut}, packing {packing}; one process, fp32, without dropout"
    titles = [line.split("  whole")[0].strip() for line in out[1:-1]]
    smaller = ["micro-batches of 2", "micro-batches of 1"]
    assert titles == [*smaller, "padded against packed", "head plain", "activation checkpointing on"]
    assert out[-1] == "passed"
    assert sorted(p for p in folder.iterdir() if p.name != "__pycache__") == before


@pytest.mark.slow
def test_a_mean_over_the_micro_batch(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "invariance", "-c", "tiny", "--model.objective", "broken_cuts.MicroBatchMean"]) == 1
    out, err = capfd.readouterr()
    assert len(said(err)) == 1
    assert said(err)[0].startswith("recipes: the gradient depends on how rows are cut into micro-batches: with 2 x 4")
    assert "passed" not in out


@pytest.mark.slow
def test_padding_that_is_scored(capfd: pytest.CaptureFixture[str]) -> None:
    Path("own.yaml").write_text(RECIPE.replace("llm_modules.LanguageModelModule", "broken_cuts.ForgetsPadding"))
    assert main(["check", "invariance", "-c", "own"]) == 1
    lines = said(capfd.readouterr().err)
    assert len(lines) == 1
    assert lines[0].startswith("recipes: the gradient depends on padding: something scores, or counts, positions")


def test_what_is_compared() -> None:
    backbone = {"head": "plain", "activation_checkpointing": 2}
    found = {v.title: v for v in [*row_cuts(12, (4, 3)), *variants((4, 3), "batch", backbone)]}
    assert [v.cut for v in found.values()] == [(3, 4), (1, 12), (4, 3), (4, 3), (4, 3)]
    assert found["padded against packed"].against == OWN
    assert found["head chunked"].overrides == {"model.backbone.head": "chunked"}
    assert found["activation checkpointing off"].overrides == {"model.backbone.activation_checkpointing": False}
    one = [*row_cuts(4, (1, 4)), *variants((1, 4), None, None)]
    assert [v.cut for v in one] == [(2, 2)]
    assert [v.cut for v in answer_cuts((8, 1))] == [(8, 2), (8, 4)]
    assert [v.cut for v in answer_cuts((8, 2))] == [(8, 1), (8, 4)]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "-c: a recipe must be named"),
        (["-c", "tiny", "--rows", "3"], "--rows 3: at least 4 are asked for"),
        (["-c", "tiny", "--data.batch_sizes", "3"], "batch_sizes"),
    ],
)
def test_bad_words(words: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "invariance", *words]) == 2
    err = capfd.readouterr().err.splitlines()
    assert len(err) == 1
    assert line in err[0]
