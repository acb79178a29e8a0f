"""What the README shows: its example is run, its commands parse, the files it names are there."""

from __future__ import annotations

import csv
import re
import shlex
from pathlib import Path

import pytest
import torch

from llm_modules.batch import TokenScores
from recipes.__main__ import main
from recipes.command_line import parse_command
from recipes.compose import compose

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    (recipes .+?)(?:\s+#.*)?$", README, re.MULTILINE)
TRAINING = [line for line in COMMANDS if line.split()[1] == "fit" and "..." not in line]


def block(language: str) -> str:
    """The only block of code in a language."""
    (found,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return found


@pytest.fixture
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_loss.py").write_text(block("python"))
    (tmp_path / "focal.yaml").write_text(block("yaml"))
    return tmp_path


def test_the_loss_is_at_most_forty_lines_and_equals_its_paper(own_files: Path) -> None:
    assert len(block("python").splitlines()) <= 40
    namespace: dict[str, object] = {}
    exec(compile(block("python"), "my_loss.py", "exec"), namespace)
    focal = namespace["FocalLoss"](gamma=2.0)  # type: ignore[operator]
    probabilities = torch.tensor([0.5, 0.9])
    output = focal(TokenScores(logprobs=probabilities.log(), index=torch.arange(2)))
    expected = -(0.5**2 * torch.tensor(0.5).log() + 0.1**2 * torch.tensor(0.9).log())
    torch.testing.assert_close(output.terms["loss"].sum, expected)


@pytest.mark.slow
def test_the_loss_of_ones_own_trains(own_files: Path) -> None:
    words = ["fit", "-c", "pretrain/quickstart", "-c", "focal.yaml", "--trainer.max_steps", "3"]
    words += ["--trainer.limit_val_batches", "1", "--trainer.val_check_interval", "3", "--data.batch_size", "1"]
    assert main([*words, "--trainer.log_every_n_steps", "1", "--leave_out", "[ExportFolder]"]) == 0
    with (own_files / "runs/pretrain/quickstart/0/metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    # With gamma 1 the loss is below the negative log-likelihood: what is likely counts less.
    assert [float(row["train/loss"]) < float(row["train/nll"]) for row in rows] == [True] * 3


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) > 15
    assert len(TRAINING) > 8


@pytest.mark.parametrize("line", TRAINING)
def test_training_commands_name_what_there_is(line: str, own_files: Path) -> None:
    command = parse_command("fit", shlex.split(line)[2:])
    composed = compose(command.configs, command.overrides)
    assert composed.values["model"]["class_path"]


@pytest.mark.parametrize("line", COMMANDS)
def test_verbs_are_there(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([shlex.split(line)[1], "--help"]) == 0


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_linked_files_are_there(name: str) -> None:
    assert (ROOT / name).exists()


def test_make_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"\bmake ([a-z][a-z-]+)\b", README):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["pretrain", "sft"])
def test_ones_own_small_data_train(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An epoch of them is shorter than the recipe's val_check_interval."""
    monkeypatch.chdir(tmp_path)
    if recipe == "pretrain":
        (tmp_path / "notes").mkdir()
        for i in range(150):
            (tmp_path / f"notes/{i}.txt").write_text(f"Note {i} is about the sea, {i} ships and a whale. " * 2)
        source = "{path: notes/}"
    else:
        rows = "".join(
            f"What is {i}?,It is the number {i} and nothing else that one could think of.\n" for i in range(99)
        )
        (tmp_path / "questions.csv").write_text("q,a\n" + rows)
        source = "{path: questions.csv, columns: {instruction: q, response: a}}"
    words = ["fit", "-c", f"{recipe}/quickstart", "--data.sources", f"[{source}]", "--trainer.max_steps", "6"]
    words += ["--trainer.val_check_interval", "5", "--leave_out", "[ExportFolder]"]
    assert main([*words, "--trainer.log_every_n_steps", "1"]) == 0
    with (tmp_path / f"runs/{recipe}/quickstart/0/metrics.csv").open() as file:
        rows_of = list(csv.DictReader(file))
    assert [row["step"] for row in rows_of if row["val/loss"]] == ["4"]
