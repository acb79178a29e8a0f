"""Reward models by the command: they learn, go on exactly, leave a classifier; mistakes are one line."""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from recipes.__main__ import main

RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 96
seed_everything: 3
model:
  class_path: llm_modules.RewardModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 128}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 5.0e-3, weight_decay: 0.0}}
data:
  class_path: llm_modules.data.PreferenceDataModule
  init_args: {sources: [{path: pairs.jsonl}], chat_template: chatml, batch_size: 4, validation_fraction: 0.2}
trainer: {max_steps: 12, accelerator: cpu, devices: 1, log_every_n_steps: 1, val_check_interval: 12,
          check_val_every_n_epoch: null, enable_progress_bar: false}
checkpoint: {every_n_steps: 6, keep_last: 3}
"""


def pairs(count: int = 60) -> list[dict[str, Any]]:
    safe = {"chosen_safe": True, "rejected_safe": False}
    return [{"prompt": f"number {i}?", "chosen": f"yes, {i}", "rejected": f"no {i}"} | safe for i in range(count)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(pairs())
    Path("reward.yaml").write_text(RECIPE)
    return tmp_path


def write(rows: list[dict[str, Any]]) -> None:
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def column(run: int, name: str) -> list[float]:
    with Path(f"runs/reward/{run}/metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_it_learns_goes_on_exactly_and_leaves_a_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert main(["fit", "-c", "reward"]) == 0
    assert column(0, "val/accuracy")[-1] == 1.0
    assert column(0, "train/loss")[-1] < 0.5 * column(0, "train/loss")[0]
    assert 0 <= column(0, "val/calibration_error")[-1] <= 0.5
    with Path("runs/reward/0/score_histogram.csv").open(newline="") as file:
        bins = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert all(before["high"] == after["low"] for before, after in itertools.pairwise(bins))
    for kind in ("chosen", "rejected"):
        assert sum(row[kind] for row in bins) == 13  # the held-out pairs
        middle = sum(row[kind] * (row["low"] + row["high"]) / 2 for row in bins) / 13
        assert abs(middle - column(0, f"val/score_{kind}")[-1]) <= bins[0]["high"] - bins[0]["low"]
    page = Path("runs/reward/0/report.html").read_text()
    assert page.count('<rect class="bar k0"') == page.count('<rect class="bar k1"') == len(bins)
    curve = Path("runs/reward/0/metrics.csv").read_bytes()
    assert main(["validate", "-c", "reward", "--run", "0"]) == 0
    assert Path("runs/reward/0/metrics.csv").read_bytes() == curve  # what it says is no point of the run's curve
    assert '"val/accuracy": 1.0' in Path("runs/reward/0/validate.json").read_text()
    assert main(["fit", "-c", "reward", "--trainer.max_steps", "6"]) == 0
    assert main(["fit", "-c", "reward", "--run", "1"]) == 0
    assert column(1, "train/loss") == column(0, "train/loss")
    assert main(["export", "runs/reward/0", "again"]) == 0
    ids = AutoTokenizer.from_pretrained("again")("yes", return_tensors="pt")["input_ids"]
    said = []
    for folder in ("again", "runs/reward/0/export"):
        model, report = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        assert model.config.architectures == ["LlamaForSequenceClassification"]
        with torch.no_grad():
            said.append(float(model(ids).logits))
        assert "AutoModelForSequenceClassification" in (Path(folder) / "README.md").read_text()
    assert said[0] == said[1] != 0
    # The folder is a model to go on with, score and all.
    other = ["--model.backbone.source", "again", "--runs_dir", "on", "--tokenizer", "again"]
    capsys.readouterr()
    assert main(["fit", "-c", "reward", *other, "--trainer.max_steps", "1"]) == 0
    assert "MISSING" not in capsys.readouterr().err
    with Path("on/reward/0/metrics.csv").open(newline="") as file:
        assert float(next(csv.DictReader(file))["train/loss"]) < 0.5


def test_with_an_adapter_it_goes_on_exactly_and_leaves_a_classifier(capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForSequenceClassification

    words = ["fit", "-c", "reward", "-c", "adapters/lora", "--trainer.max_steps"]
    assert main([*words, "12"]) == 0
    said = re.search(r"trained +([\d,]+)", capsys.readouterr().err)
    assert said is not None
    state = torch.load("runs/reward/0/checkpoints/step-00000006.ckpt", weights_only=True)["state_dict"]
    assert sum(value.numel() for value in state.values()) == int(said[1].replace(",", ""))
    assert {name for name in state if ".lora_" not in name} == {"model.hf.lm_head.weight"}
    assert column(0, "train/loss")[-1] < 0.7 * column(0, "train/loss")[0]
    assert main([*words, "12", "--ckpt_path", "runs/reward/0/checkpoints/step-00000006.ckpt"]) == 0
    assert column(1, "train/loss") == column(0, "train/loss")[6:]
    assert main(["export", "runs/reward/0", "again", "--which", "last"]) == 0
    said = []
    for folder in ("again", "runs/reward/0/export", "runs/reward/1/export"):
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        with torch.no_grad():
            said.append(float(model(torch.arange(1, 9)[None]).logits))
    assert said[0] == said[1] == said[2] != 0


@pytest.mark.parametrize("tied", [True, False])
def test_its_parameters_are_counted_before_it_is_built(tied: bool, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model.backbone.config.tie_word_embeddings", str(tied).lower(), "--trainer.max_steps", "1"]
    assert main(["fit", "-c", "reward", *words]) == 0
    said = re.search(r"parameters +([\d,]+)", capsys.readouterr().err)
    assert said is not None
    with safe_open("runs/reward/0/export/model.safetensors", "pt") as tensors:
        count = sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118 - no dictionary
    assert int(said[1].replace(",", "")) == count


def test_a_tokenizer_without_a_token_of_its_own_for_padding_scores_the_same() -> None:
    """Padding is the end token: transformers, which looks for it to find a text's end, would stop short of that."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from llm_modules import RewardModule
    from llm_modules.tokenizer import byte_tokenizer
    from llm_modules.zoo import Backbone

    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained("tokenizer")
    config = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    module = RewardModule(Backbone(config=config | {"num_attention_heads": 2}), tokenizer="tokenizer")
    module.configure_model()
    assert module.model is not None
    module.export("score")
    classifier = AutoModelForSequenceClassification.from_pretrained("score")
    text = AutoTokenizer.from_pretrained("score")("hi<|endoftext|>yes<|endoftext|>", return_tensors="pt")
    ids = text["input_ids"]
    positions, last = torch.arange(ids.shape[1])[None], torch.tensor([ids.shape[1] - 1])
    with torch.no_grad():
        expected = module.model(ids, positions, last)
        assert torch.allclose(classifier(**text).logits.flatten(), expected, atol=1e-6)
        with pytest.raises(ValueError, match="no padding token is defined"):  # several at once: refused, never wrong
            classifier(ids.repeat(2, 1))
        short = module.model(ids, positions, last - 1)
    assert not torch.allclose(short, expected, atol=1e-3)


def test_a_cost_model_is_above_zero_for_harm() -> None:
    assert main(["fit", "-c", "reward", "--model.objective", "llm_modules.objectives.CostModel"]) == 0
    assert column(0, "val/accuracy")[-1] == 1.0
    assert column(0, "val/score_chosen")[-1] < 0 < column(0, "val/score_rejected")[-1]


def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> str:
        assert main([*words]) == 2
        return [line for line in capsys.readouterr().err.splitlines() if line.startswith("recipes: ")][-1]

    assert "cannot be merged into the reward model" in said("fit", "-c", "reward", "-c", "adapters/prefix")
    head = ["-c", "adapters/lora", "--model.backbone.adapter.init_args.target_modules", "[q_proj, lm_head]"]
    assert "lm_head is a reward model's head, which is trained whole" in said("fit", "-c", "reward", *head)
    assert "a reward model answers nothing" in said("predict", "-c", "reward")
    write([{**row, "margin": "much"} for row in pairs()])
    assert "pairs.jsonl:1: margin is 'much'; it must be a finite number" in said("fit", "-c", "reward")
    assert "margin is 'much'" in said("fit", "-c", "reward", "--data.bad_pairs", "drop")  # a pair, badly written
    write([{**row, "margin": math.inf} for row in pairs()])
    assert "margin is inf; it must be a finite number" in said("fit", "-c", "reward")
    write([{**row, "chosen_safe": 1} for row in pairs()])
    assert "pairs.jsonl:1: chosen_safe is 1; it must be true or false" in said("fit", "-c", "reward")
    write([{key: row[key] for key in ("prompt", "chosen", "rejected")} for row in pairs()])
    cost = ("--model.objective", "llm_modules.objectives.CostModel")
    assert "CostModel needs the columns chosen_safe and rejected_safe" in said("fit", "-c", "reward", *cost)
    write(pairs())
    Path("lm.yaml").write_text(RECIPE.replace("RewardModule", "LanguageModelModule"))
    assert "pairs of answers are for PreferenceModule and RewardModule" in said("fit", "-c", "lm")
    Path("talks.jsonl").write_text((json.dumps({"prompt": "a", "completion": "b"}) + "\n") * 8)
    talks = ("--data.class_path", "llm_modules.data.ConversationDataModule", "--data.sources", "[{path: talks.jsonl}]")
    talks += ("--data.validation_fraction", "0.0", "--data.batch_size", "1", "--data.chat_template", "chatml")
    assert "this model learns from pairs of answers" in said("fit", "-c", "reward", *talks)
    family = ("--model.backbone.config.model_type", "cohere")
    assert "no reward model of 'cohere'" in said("fit", "-c", "reward", *family)
    # Families whose classifiers are other models: they would train, and not be saved.
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = sizes | {"is_decoder": True, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 128}
    ctrl = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 128}
    alone = ("fit", "-c", "other", "--data.packing", "none")
    for kind, values in (("bert", encoder), ("ctrl", ctrl)):
        other = RECIPE.partition("      config: ")[0] + f"      config: {json.dumps({'model_type': kind} | values)}\n"
        other += "      attention: eager\n" + "    optimizer: " + RECIPE.partition("    optimizer: ")[2]
        Path("other.yaml").write_text(other)
        assert f"no reward model of {kind!r}: transformers' classifier" in said(*alone)
    assert main(["fit", "-c", "reward", "--trainer.max_steps", "1"]) == 0
    (run,) = [path for path in Path("runs/reward").iterdir() if (path / "export").is_dir()]
    capsys.readouterr()
    assert "a reward model, which answers nothing" in said("generate", "-m", str(run / "export"), "--prompt", "hi")
