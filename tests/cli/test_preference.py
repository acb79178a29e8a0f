"""Preference tuning by the command: it learns, goes on exactly, leaves a model; mistakes are one line."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from recipes.__main__ import main
from tests.cli.test_policy import write_base

RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 96
seed_everything: 3
model:
  class_path: llm_modules.PreferenceModule
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
    return [{"prompt": f"number {i}?", "chosen": f"yes, {i}", "rejected": f"no {i}"} for i in range(count)]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(pairs())
    Path("dpo.yaml").write_text(RECIPE)
    return tmp_path


def write(rows: list[dict[str, Any]]) -> None:
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def column(run: int, name: str) -> list[float]:
    with Path(f"runs/dpo/{run}/metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def test_it_learns_goes_on_exactly_and_leaves_a_model() -> None:
    from transformers import AutoModelForCausalLM

    assert main(["fit", "-c", "dpo"]) == 0
    losses = column(0, "train/loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)  # the policy is its reference
    assert losses[-1] < 0.3 < losses[0]
    assert column(0, "val/reward_accuracy") == [1.0]
    assert column(0, "val/reward_margin")[0] > 1
    AutoModelForCausalLM.from_pretrained("runs/dpo/0/export")
    (checkpoint,) = Path("runs/dpo/0/checkpoints").glob("step-*6.ckpt")
    assert main(["fit", "-c", "dpo", "--ckpt_path", str(checkpoint)]) == 0
    assert column(1, "train/loss") == losses[6:]  # against the same reference as before


def test_the_odds_ratio_trains_as_any_other() -> None:
    assert main(["fit", "-c", "dpo", "--model.objective", "llm_modules.objectives.ORPO"]) == 0
    losses, ratios, likelihoods = (column(0, f"train/{name}") for name in ("loss", "odds_ratio", "nll_chosen"))
    assert losses[-1] < losses[0]
    total = [0.1 * ratio + likelihood for ratio, likelihood in zip(ratios, likelihoods, strict=True)]
    assert losses == pytest.approx(total, rel=1e-5)
    assert column(0, "val/reward_accuracy") == [1.0]


def test_with_an_adapter_the_base_is_the_reference(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["-c", "adapters/lora", "--model.optimizer.lr", "2e-2"]
    assert main(["fit", "-c", "dpo", *words]) == 0
    base = column(0, "train/loss")
    assert base[-1] < 0.6
    assert main(["fit", "-c", "dpo", *words, "--model.reference", "copy"]) == 0
    assert column(1, "train/loss") == pytest.approx(base, abs=1e-6)


def test_an_adapter_that_trains_the_bases_biases_is_compared_with_a_copy(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["-c", "adapters/lora", "--model.backbone.adapter.bias", "all"]
    words += ["--model.backbone.config.attention_bias", "true", "--model.optimizer.lr", "2e-2"]
    assert main(["fit", "-c", "dpo", *words, "--model.reference", "base"]) == 2
    assert "model.reference: base, but this LORA changes the base" in capfd.readouterr().err
    assert main(["fit", "-c", "dpo", *words]) == 0
    assert main(["fit", "-c", "dpo", *words, "--model.reference", "copy"]) == 0
    runs = sorted(int(path.parent.name) for path in Path("runs/dpo").glob("*/metrics.csv"))
    auto, copy = (column(run, "train/loss") for run in runs[-2:])
    assert auto == copy
    assert auto[-1] != pytest.approx(auto[0], abs=0.01)


def test_an_adapter_that_was_trained_before_is_compared_with_what_it_begins_as(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["fit", "-c", "dpo", "-c", "adapters/lora", "--model.optimizer.lr", "2e-2"]) == 0
    words = ["fit", "-c", "dpo", "--model.backbone.adapter", "runs/dpo/0/export"]
    assert main([*words, "--dry-run"]) == 0
    assert "frozen" in (said := capfd.readouterr().err)
    assert "model.reference: base" not in said
    assert main(words) == 0
    assert column(1, "train/loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    with pytest.warns(UserWarning, match=r"model\.reference: base, but backbone\.adapter was trained before"):
        assert main([*words, "--model.reference", "base"]) == 0
    assert abs(column(2, "train/loss")[0] - math.log(2)) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("words", [[], ["-c", "adapters/lora"], ["--model.objective", "llm_modules.objectives.ORPO"]])
def test_the_gradient_does_not_depend_on_how_pairs_are_cut(words: list[str]) -> None:
    assert main(["check", "invariance", "-c", "dpo", *words]) == 0


LOSSES = """\
from llm_modules.objectives import DPO, ORPO


class Mean(DPO):
    def losses(self, scores):
        return super().losses(scores).mean()


class Wide(ORPO):
    def losses(self, scores):
        return super().losses(scores)[:, None].expand(-1, 2)


class Number(DPO):
    def losses(self, scores):
        return 1.0


class Detached(DPO):
    def losses(self, scores):
        return super().losses(scores).detach()


class Twice(DPO):
    def terms(self, scores):
        terms = super().terms(scores)
        return terms | {"preference": terms["loss"]}


class Broken(DPO):
    def losses(self, scores):
        return scores.chosen @ scores.chosen[:1]
"""


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Mean", "losses gave shape (), not one loss for each of the 4 pairs"),
        ("Wide", "losses gave shape (4, 2), not one loss for each of the 4 pairs"),
        ("Number", "losses gave a float, not one loss for each of the 4 pairs"),
        ("Detached", "the loss has no gradient"),
        ("Twice", "it has the terms loss and preference; loss is the total of all terms: give that term another name"),
    ],
)
def test_a_loss_that_is_none(name: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    Path("losses_of_pairs.py").write_text(LOSSES)
    assert main(["fit", "-c", "dpo", "--model.objective", f"losses_of_pairs.{name}"]) == 2
    lines = [text for text in capfd.readouterr().err.splitlines() if text.startswith("recipes: ")]
    assert len(lines) == 1
    assert lines[0].startswith(f"recipes: objective losses_of_pairs.{name}: {said}")


def test_a_loss_that_raises_is_shown_with_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    Path("broken_losses.py").write_text(LOSSES)
    assert main(["fit", "-c", "dpo", "--model.objective", "broken_losses.Broken"]) == 1
    err = capfd.readouterr().err
    assert "Traceback" in err
    line = 1 + LOSSES.splitlines().index("        return scores.chosen @ scores.chosen[:1]")
    assert err.splitlines()[-1].startswith(f"recipes: broken_losses.py:{line}, in losses: RuntimeError: ")


def test_a_reference_that_nothing_reads_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["-c", "dpo", "--model.reference", "copy", "--dry-run"]
    assert main(["fit", *words, "--model.objective", "llm_modules.objectives.SimPO"]) == 0
    line = "model.reference: copy is not read: SimPO compares with no reference"
    assert line in capfd.readouterr().err.splitlines()
    assert main(["fit", *words]) == 0
    assert "is not read" not in capfd.readouterr().err


def test_going_on_with_another_loss_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["fit", "-c", "dpo", "--model.objective.class_path", "llm_modules.objectives.DPO"]
    assert main([*words, "--trainer.max_steps", "2", "--checkpoint.every_n_steps", "2"]) == 0
    again = ["--run", "0", "--ckpt_path", "last"]
    capfd.readouterr()
    assert main([*words, *again, "--trainer.max_steps", "4", "--model.optimizer.lr", "1e-3"]) == 0
    assert "continuing with other settings" not in capfd.readouterr().err
    assert main([*words, *again, "--trainer.max_steps", "6", "--model.objective.beta", "0.3"]) == 0
    line = "continuing with other settings: model.objective.beta 0.1 -> 0.3 (before: config.1.yaml)"
    assert line in capfd.readouterr().err.splitlines()
    words[-1] = "llm_modules.objectives.SimPO"
    assert main([*words, *again, "--trainer.max_steps", "8"]) == 0
    line = "continuing with other settings: model.objective DPO -> SimPO (before: config.2.yaml)"
    assert line in capfd.readouterr().err.splitlines()


CUTS = """\
import torch
from llm_modules.objectives import PreferenceObjective
from llm_modules.objectives.preference import margin


class SoftWeights(PreferenceObjective):
    def losses(self, scores):
        margins = margin(scores)
        weights = torch.softmax(margins.detach(), 0) * len(margins)
        return weights * torch.exp(-self.beta * margins)


class Baseline(PreferenceObjective):
    def losses(self, scores):
        margins = margin(scores)
        return torch.exp(-self.beta * (margins - margins.mean().detach()))


class Centred(PreferenceObjective):
    def losses(self, scores):
        margins = margin(scores)
        return torch.exp(-self.beta * (margins - margins.mean()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SoftWeights", "Baseline", "Centred"])
def test_a_loss_that_looks_at_the_other_pairs_of_its_micro_batch(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """It is right where the policy is its reference, which is where training begins."""
    Path("cuts_of_pairs.py").write_text(CUTS)
    assert main(["check", "invariance", "-c", "dpo", "--model.objective", f"cuts_of_pairs.{name}"]) == 1
    said = [text for text in capfd.readouterr().err.splitlines() if text.startswith("recipes: ")]
    assert len(said) == 1
    assert said[0].startswith("recipes: the gradient depends on how rows are cut into micro-batches: with ")


@pytest.mark.parametrize(
    ("rows", "words", "line"),
    [
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], [], "pairs.jsonl:1: chosen and rejected are the same"),
        ([{"prompt": "a", "chosen": "b"}], [], "pairs.jsonl:1: no column 'rejected'"),
        ([{"prompt": "a", "chosen": "", "rejected": "b"}], [], "pairs.jsonl:1: an empty answer in 'chosen'"),
        ([{"chosen": "a", "rejected": "b"}], [], "pairs.jsonl:1: no prompt"),
        (None, ["--model.reference", "base"], "model.reference: base, but there is no adapter"),
        (None, ["--model.reference", "base", "--dry-run"], "model.reference: base, but there is no adapter"),
        (None, ["--model.reference", "bass"], "bass"),
        (None, ["--model.objective.beta", "0"], "objective.beta: 0"),
        (None, ["--data.packing", "documents"], "data.packing: 'documents' is not one of batch, none"),
        (None, ["--sequence_length", "8"], "no token is trained"),
    ],
)
def test_mistakes(
    rows: list[dict[str, Any]] | None, words: list[str], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if rows is not None:
        write(rows)
    if "--model.objective.beta" in words:
        words = ["--model.objective", "llm_modules.objectives.DPO", *words]
    assert main(["fit", "-c", "dpo", *words]) == 2
    said = [text for text in capfd.readouterr().err.splitlines() if text.startswith("recipes: ")]
    assert len(said) == 1, said
    assert line in said[0]
    assert not list(Path("runs").rglob("metrics.csv"))


def test_a_run_does_not_go_on_against_another_reference(capfd: pytest.CaptureFixture[str]) -> None:
    write_base("base", seed=1)
    begin, end = RECIPE.index("config: {"), RECIPE.index("    optimizer:")
    Path("dpo.yaml").write_text(RECIPE[:begin] + "source: base\n" + RECIPE[end:])
    words = ["fit", "-c", "dpo", "--trainer.max_steps", "8"]
    assert main(words) == 0
    (checkpoint,) = Path("runs/dpo/0/checkpoints").glob("step-*6.ckpt")
    words += ["--ckpt_path", str(checkpoint)]
    assert main(words) == 0
    assert column(1, "train/loss") == column(0, "train/loss")[6:]
    write_base("base", seed=2)
    assert main(words) == 2
    assert "ckpt_path: the frozen model that this one is compared with is another one" in capfd.readouterr().err
    assert main([*words, "--model.objective", "llm_modules.objectives.ORPO"]) == 0  # it has no reference
