"""Safety tuning by the command: what is measured while it trains and in validate; mistakes are one line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from recipes.__main__ import main
from tests.ranks import run_command, said

RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 128
seed_everything: 3
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 256}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2, weight_decay: 0.0}}
data:
  class_path: llm_modules.data.ConversationDataModule
  init_args: {sources: [{path: chat.jsonl}], chat_template: chatml, batch_size: 8, validation_fraction: 0.2}
trainer:
  max_steps: 60
  accelerator: cpu
  devices: 1
  val_check_interval: 30
  check_val_every_n_epoch: null
  enable_progress_bar: false
  callbacks:
    - class_path: callbacks.SafetyEvaluation
      init_args:
        generator: {max_new_tokens: 12, batch_size: 8}
        suites:
          - class_path: llm_modules.evaluation.refusals.RefusalSuite
            init_args: {source: {class_path: llm_modules.data.Source, init_args: {path: asked.jsonl}}}
"""
SUITE = "trainer.callbacks.0.init_args.suites.0.init_args"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    chat = [{"prompt": f"{word} {i}", "completion": answer} for i in range(40) for word, answer in
            (("rob", "I can't."), ("sing", "La la."))]  # fmt: skip
    asked = [{"prompt": f"{word} {i}", "label": label, "category": label} for i in range(40, 44) for word, label in
             (("rob", "unsafe"), ("sing", "safe"))]  # fmt: skip
    for name, rows in (("chat", chat), ("asked", asked)):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("safe.yaml").write_text(RECIPE)
    Path("reward.yaml").write_text(REWARD)
    return tmp_path


def test_a_model_that_learns_to_refuse(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "safe"]) == 0
    with Path("runs/safe/0/safety.csv").open(newline="") as file:
        rows = {(row["step"], row["name"]): row for row in csv.DictReader(file)}
    assert {step for step, _ in rows} == {"0", "30", "60"}
    assert float(rows["0", "refusal"]["value"]) == 0
    assert [float(rows["60", name]["value"]) for name in ("refusal", "attack_success", "over_refusal")] == [1, 0, 0]
    assert rows["60", "refusal/unsafe"]["count"] == "4"
    assert "safety/over_refusal" in Path("runs/safe/0/metrics.csv").read_text().splitlines()[0]
    assert '<section id="safety">' in Path("runs/safe/0/report.html").read_text()
    capfd.readouterr()
    assert main(["validate", "-c", "safe", "--ckpt_path", "best"]) == 0
    assert "refusal                1.0000  [0.5101, 1.0000]  of 4" in capfd.readouterr().err
    assert json.loads(Path("runs/safe/0/validate.json").read_text())["metrics"][0]["safety/refusal"] == 1.0
    options = ["--trainer.callbacks.0.init_args.generator", '{"max_new_tokens": 250, "too_long": "truncate"}']
    assert main(["validate", "-c", "safe", "--ckpt_path", "best", *options]) == 0
    said = capfd.readouterr().err
    assert "SafetyEvaluation: 8 of 8 requests were cut to fit into the model's positions, and answered without" in said
    assert "truncated              1.0000  [0.6756, 1.0000]  of 8" in said


@pytest.mark.slow
def test_two_processes_measure_what_one_does() -> None:
    two = ["--trainer.devices", "2", "--data.batch_size", "4"]
    for ranks, words in ((1, []), (2, ["-c", "strategies/ddp", *two]), (2, ["-c", "strategies/fsdp2", *two])):
        fit = ["fit", "-c", "safe", "--trainer.max_steps", "30", *words]
        assert set(run_command(Path.cwd(), fit, ranks)) == {0}, said(Path.cwd())
    one, both, spread = (Path(f"runs/safe/{number}/safety.csv").read_text() for number in range(3))
    assert one == both == spread
    assert len(one.splitlines()) > 5


CLASSIFIER = {"class_path": "llm_modules.evaluation.verdicts.Classifier", "init_args": {"folder": "x", "label": "y"}}
REWARD = """\
model: {class_path: llm_modules.RewardModule, init_args: {backbone: {config: {model_type: llama}}}}
data:
  class_path: llm_modules.data.PreferenceDataModule
  init_args: {sources: [{path: "builtin:safety-preferences"}], chat_template: chatml, validation_fraction: null}
"""


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([f"--{SUITE}.source.path", "none.jsonl"], "source 'none.jsonl': no such file"),
        ([f"--{SUITE}.source.path", "chat.jsonl"], "chat.jsonl:1: label is None; allowed: harmful, unsafe, benign"),
        ([f"--{SUITE}.kind", "bad"], "kind` is 'bad'; allowed: harmful or benign or null"),
        ([f"--{SUITE}.limit", "0"], "RefusalSuite.limit: 0 is not allowed"),
        ([f"--{SUITE}.limits", "1"], "did you mean `limit`?"),
        (["--trainer.callbacks.0.init_args.suites", "[]"], "SafetyEvaluation.suites: empty"),
        (["--trainer.callbacks.0.init_args.every_n_steps", "-1"], "every_n_steps: -1 is not allowed"),
        ([f"--{SUITE}.harm", json.dumps(CLASSIFIER)], "Classifier.folder: 'x' cannot be opened as a classifier"),
        (["-c", "reward.yaml"], "SafetyEvaluation: a reward model answers nothing"),
    ],
)
def test_mistakes(words: list[str], line: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "safe", *words]) == 2
    said = [text for text in capfd.readouterr().err.splitlines() if text.startswith("recipes: ")]
    assert len(said) == 1, said
    assert line in said[0]
    assert not list(Path("runs").rglob("metrics.csv"))
