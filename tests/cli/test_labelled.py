"""Labelled answers by the command: KTO and BCO learn and go on exactly; mistakes are one line."""

from __future__ import annotations

import csv
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from recipes.__main__ import main
from tests.cli.test_preference import RECIPE

OBJECTIVES = "llm_modules.objectives."


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write(
        [
            {"prompt": f"number {i}?", "completion": f"{'yes' if i % 2 else 'no'} {i}", "label": i % 2 > 0}
            for i in range(120)
        ]
    )
    recipe = RECIPE.replace("PreferenceDataModule", "LabelledDataModule").replace("pairs.jsonl", "rows.jsonl")
    recipe = recipe.replace("    optimizer:", f"    objective: {{class_path: {OBJECTIVES}KTO}}\n    optimizer:", 1)
    Path("kto.yaml").write_text(recipe)
    return tmp_path


def write(rows: list[dict[str, Any]]) -> None:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def column(run: int, name: str) -> list[float]:
    with Path(f"runs/kto/{run}/metrics.csv").open(newline="") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.parametrize("name", ["KTO", "BCO"])
def test_it_learns_and_goes_on_exactly(name: str) -> None:
    words = ["-c", "kto", "--model.objective", OBJECTIVES + name, "--trainer.accumulate_grad_batches", "2"]
    assert main(["fit", *words]) == 0
    losses, points = column(0, "train/loss"), column(0, "train/reward_point")
    assert losses[0] == pytest.approx(0.5 if name == "KTO" else math.log(2), abs=1e-6)  # the policy is its reference
    assert points[0] == 0
    assert any(abs(point) > 0.01 for point in points[6:])
    assert losses[-1] < 0.8 * losses[0]
    assert column(0, "val/reward_accuracy")[-1] == 1.0
    (checkpoint,) = Path("runs/kto/0/checkpoints").glob("step-*6.ckpt")
    assert main(["fit", *words, "--ckpt_path", str(checkpoint)]) == 0
    assert column(1, "train/loss") == losses[6:]
    assert column(1, "train/reward_point") == points[6:]
    assert column(1, "val/loss")[-1] == column(0, "val/loss")[-1]


def test_what_is_held_out_does_not_depend_on_its_batches() -> None:
    for size in ("4", "7"):
        assert main(["fit", "-c", "kto", "--data.validation_batch_size", size]) == 0
    for name in ("loss", "reward_point", "reward_desirable", "kl"):
        first, second = (column(run, f"val/{name}") for run in (0, 1))
        assert first == pytest.approx(second, rel=1e-5), name


def test_pairs_and_the_base_under_an_adapter() -> None:
    write([{"prompt": f"number {i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)])
    words = ["-c", "adapters/lora", "--model.optimizer.lr", "2e-2"]
    assert main(["fit", "-c", "kto", *words]) == 0
    base = column(0, "train/loss")
    assert base[-1] < 0.49 < base[0]
    assert main(["fit", "-c", "kto", *words, "--model.reference", "copy"]) == 0
    assert column(1, "train/loss") == pytest.approx(base, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["KTO", "BCO"])
def test_the_gradient_does_not_depend_on_how_answers_are_cut(name: str) -> None:
    assert main(["check", "invariance", "-c", "kto", "--model.objective", OBJECTIVES + name]) == 0


def test_weights_that_the_paper_advises_against_are_said(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "kto", "--model.objective.desirable_weight", "3", "--trainer.max_steps", "1"]) == 0
    pattern = (
        r"(\d+) desirable answers of weight 3 against (\d+) undesirable ones of weight 1 are (\S+) to 1; KTO's paper"
    )
    found = re.search(pattern, capfd.readouterr().err)
    assert found is not None
    assert float(found[3]) == pytest.approx(3 * int(found[1]) / int(found[2]), abs=0.01)


def test_a_step_without_a_kind_says_nothing_of_it(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "kto", "--data.batch_size", "2"]) == 0
    rewards = column(0, "train/reward_desirable")
    assert any(math.isnan(reward) for reward in rewards)
    assert not all(math.isnan(reward) for reward in rewards)
    assert 0.0 not in rewards[1:]
    assert "to learn from" not in capfd.readouterr().err


GOOD = {"prompt": "a", "completion": "b", "label": True}


@pytest.mark.parametrize(
    ("rows", "words", "line"),
    [
        ([{"prompt": "a", "completion": "b"}], [], "rows.jsonl:1: no label"),
        ([{**GOOD, "label": "yes"}], [], "rows.jsonl:1: label is 'yes'; it must be true or false"),
        ([{**GOOD, "completion": ""}], [], "rows.jsonl:1: no answer"),
        ([{"prompt": "a", "chosen": "b", "rejected": "b"}], [], "rows.jsonl:1: chosen and rejected are the same"),
        ([{**GOOD, "prompt": str(i)} for i in range(9)], [], "labels are true; desirable and undesirable"),
        (None, ["--data.batch_size", "1"], "data.batch_size: KTO compares each answer with that to another prompt"),
        (
            None,
            ["--model.reference", "cached"],
            "model.reference: cached, but KTO compares answers under other prompts",
        ),
        (None, ["--model.objective", OBJECTIVES + "DPO"], "use llm_modules.data.PreferenceDataModule"),
        (None, ["--data.bad_rows", "skip"], "bad_rows"),
        (None, ["--model.objective.beta", "0"], "objective.beta: 0"),
    ],
)
def test_mistakes(
    rows: list[dict[str, Any]] | None, words: list[str], line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    if rows is not None:
        write(rows)
    assert main(["fit", "-c", "kto", *words]) == 2
    said = [text for text in capfd.readouterr().err.splitlines() if text.startswith("recipes: ")]
    assert len(said) == 1, said
    assert line in said[0]


def test_a_language_model_learns_from_no_label(capfd: pytest.CaptureFixture[str]) -> None:
    text = Path("kto.yaml").read_text().replace("PreferenceModule", "LanguageModelModule")
    Path("kto.yaml").write_text(text.replace(f"    objective: {{class_path: {OBJECTIVES}KTO}}\n", ""))
    assert main(["fit", "-c", "kto"]) == 2
    assert "data: labelled answers are for PreferenceModule; a language model" in capfd.readouterr().err


def test_pairs_are_not_labelled_answers(capfd: pytest.CaptureFixture[str]) -> None:
    write([{"prompt": f"{i}?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(60)])
    Path("kto.yaml").write_text(Path("kto.yaml").read_text().replace("LabelledDataModule", "PreferenceDataModule"))
    assert main(["fit", "-c", "kto"]) == 2
    said = (
        "KTO learns from labelled answers; use llm_modules.data.LabelledDataModule, as the recipe preference/kto-quick"
    )
    assert said in capfd.readouterr().err
