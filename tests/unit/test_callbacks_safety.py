"""SafetyEvaluation: when it measures, what it writes, that training does not notice; on a tiny language model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from test_callbacks_outputs import fit, samples

from callbacks import SafetyEvaluation, Samples, StepCheckpoint
from callbacks.metrics_csv import read_rows
from callbacks.report_data import read_run
from callbacks.report_page import render
from callbacks.safety import SharedGenerator
from callbacks.safety_table import read_table
from llm_modules.evaluation.measurement import Measurement, Subject, share
from llm_modules.generation import Completion, Generator


class SaysA:
    """How many of four answers begin with what the model learns to say."""

    def __init__(self, name: str = "attack_success") -> None:
        self.name = name
        self.subjects: list[Subject] = []

    def measure(self, subject: Subject) -> list[Measurement]:
        self.subjects.append(subject)
        texts = [a.text for a in subject.generator.generate(subject.model, subject.tokenizer, ["a", "b", "c", "aa"])]
        hits = sum(text.startswith("a") for text in texts)
        return [share(self.name, hits, 4), share(f"{self.name}/part", hits, 4), share("over_refusal", 4 - hits, 4)]


def safety(**arguments: Any) -> SafetyEvaluation:
    return SafetyEvaluation([SaysA()], Generator(max_new_tokens=2), **arguments)


def steps(folder: Path) -> list[int]:
    return sorted({int(row["step"]) for row in read_table(folder / "safety.csv")})


def test_a_table_of_the_run_and_its_report(tmp_path: Path) -> None:
    fit(tmp_path, safety())
    table = read_table(tmp_path / "safety.csv")
    assert [(row["step"], row["name"]) for row in table][:4] == [
        ("0", "attack_success"), ("0", "attack_success/part"), ("0", "over_refusal"), ("8", "attack_success"),
    ]  # fmt: skip
    assert steps(tmp_path) == [0, 8, 16]
    first, last = table[0], table[-3]
    assert (first["value"], last["value"], last["count"]) == ("0.0", "1.0", "4")
    assert float(last["low"]) == pytest.approx(0.51011, abs=1e-5)  # Wilson's, 4 of 4
    logged = {int(row["step"]): row["safety/attack_success"] for row in read_rows(tmp_path / "metrics.csv")}
    assert {step: value for step, value in logged.items() if value} == {7: logged[7], 15: "1.0"}
    page = render([read_run(tmp_path)])
    assert '<section id="safety">' in page
    assert "attack_success/part" in page
    assert '<p class="note">Shares: attack_success: harmful requests that were answered (' in page
    assert "; over_refusal: benign requests that were refused. Unless the suite has a judge" in page
    assert "26 of 243 full compliances (10.7 %) count as refusals so, and 321 of 329 full refusals are fo" in page
    assert page.count('<circle class="dot k0"') == 3  # a place for each step
    assert 'style="' not in page  # the page's own policy forbids it


class Asks:
    """Requests of these lengths, in characters, which are tokens here."""

    def __init__(self, lengths: list[int], name: str = "") -> None:
        self.lengths, self.name = lengths, name

    def measure(self, subject: Subject) -> list[Measurement]:
        subject.generator.generate(subject.model, subject.tokenizer, ["a" * length for length in self.lengths])
        return []


def test_requests_that_are_cut_to_fit_are_counted_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    suites = [Asks([1, 500, 600], "long"), Asks([2]), Asks([700]), Asks([1], "short")]
    generator = Generator(max_new_tokens=2, too_long="truncate")
    fit(tmp_path, SafetyEvaluation(suites, generator, every_n_steps=4))
    found = [(row["name"], row["value"][:6], row["count"]) for row in read_table(tmp_path / "safety.csv")]
    assert found[:2] == [("long_truncated", "0.6666", "3"), ("truncated", "0.5", "2")]
    assert len(found) == 2 * len(steps(tmp_path))
    said = [line for line in capsys.readouterr().err.splitlines() if "were cut" in line]
    assert said == [
        "SafetyEvaluation: 2 of 3 requests were cut to fit into the model's positions, and answered without their "
        "beginning (long_truncated); lower generator.max_new_tokens (2), or leave them out",
        "SafetyEvaluation: 1 of 2 requests were cut to fit into the model's positions, and answered without their "
        "beginning (truncated); lower generator.max_new_tokens (2), or leave them out",
    ]
    assert "long_truncated" in render([read_run(tmp_path)])


def test_every_n_steps_alone(tmp_path: Path) -> None:
    fit(
        tmp_path,
        safety(every_n_steps=5, at_validation=False),
        log_every_n_steps=4,
        accumulate_grad_batches=2,
        max_steps=8,
    )
    assert steps(tmp_path) == [0, 5, 8]
    logged = {int(row["step"]) for row in read_rows(tmp_path / "metrics.csv") if row["safety/attack_success"]}
    assert logged == {4, 7}  # in the rows of these steps, though none of them is logged otherwise


def test_training_does_not_notice(tmp_path: Path) -> None:
    fit(tmp_path / "with", safety(every_n_steps=3), Samples(["a"], Generator(max_new_tokens=4)))
    fit(tmp_path / "without", Samples(["a"], Generator(max_new_tokens=4)))
    kept = [read_rows(tmp_path / name / "metrics.csv") for name in ("with", "without")]
    for name in ("train/loss", "random", "val/loss"):
        assert [row[name] for row in kept[0] if row["train/loss"]] == [
            row[name] for row in kept[1] if row["train/loss"]
        ]
    assert samples(tmp_path / "with") == samples(tmp_path / "without")


def test_a_resumed_run_has_the_table_of_one_that_was_not_killed(tmp_path: Path) -> None:
    fit(tmp_path / "whole", safety(every_n_steps=2))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    checkpoints = tmp_path / "killed" / "checkpoints"
    (checkpoints / "last.ckpt").unlink()
    (checkpoints / "step-00000012.ckpt").rename(checkpoints / "last.ckpt")
    fit(tmp_path / "killed", safety(every_n_steps=2), resume=True)
    whole, killed = ((tmp_path / name / "safety.csv").read_text() for name in ("whole", "killed"))
    assert whole == killed


def test_a_run_that_is_begun_again_begins_its_table_again(tmp_path: Path) -> None:
    fit(tmp_path / "once", safety())
    shutil.copytree(tmp_path / "once", tmp_path / "twice")
    shutil.rmtree(tmp_path / "twice" / "checkpoints")
    fit(tmp_path / "twice", safety())
    assert (tmp_path / "once" / "safety.csv").read_text() == (tmp_path / "twice" / "safety.csv").read_text()


class Falls:
    """Harm, one less each time that it is measured."""

    def __init__(self) -> None:
        self.value = 100.0

    def measure(self, subject: Subject) -> list[Measurement]:
        self.value -= 1
        return [Measurement("attack_success", self.value, self.value, self.value, 1)]


class Seen(Callback):
    """What there is to choose a checkpoint by at each validation."""

    def __init__(self) -> None:
        self.values: dict[int, float] = {}

    def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            self.values[trainer.global_step] = float(trainer.callback_metrics["safety/attack_success"])


@pytest.mark.parametrize("every", [0, 3, 4])
def test_a_checkpoint_is_chosen_by_what_its_own_step_measured(every: int, tmp_path: Path) -> None:
    """Where both meet, at step 12 (or at each of them), it is measured once and known to the validation."""
    best = StepCheckpoint(every_n_steps=4, keep_last=9, keep_best=1, monitor="safety/attack_success", mode="min")
    seen, suite = Seen(), SafetyEvaluation([Falls()], Generator(max_new_tokens=2), every_n_steps=every)
    fit(tmp_path, suite, seen, checkpoint=best, max_steps=12, val_check_interval=4)
    table = {int(row["step"]): float(row["value"]) for row in read_table(tmp_path / "safety.csv")}
    assert list(seen.values) == [4, 8, 12]
    assert seen.values == {step: table[step] for step in seen.values}
    assert "00000012" in best.best_model_path
    # And a run that goes on from where it was validated, or with the same callback, has no number of an earlier one.
    fit(tmp_path, suite, seen, checkpoint=best, max_steps=16, val_check_interval=4, resume=True)
    table = {int(row["step"]): float(row["value"]) for row in read_table(tmp_path / "safety.csv")}
    assert seen.values == {step: table[step] for step in (4, 8, 12, 16)}


class Echo(Generator):
    """Says a prompt again; refuses an empty one."""

    def generate(self, model: Any, tokenizer: Any, prompts: Any, rows: Any = None) -> list[Completion]:
        if "" in prompts:
            raise ValueError("a prompt is empty")
        return [Completion(row, f"{prompt}!", [], "stop", 1) for prompt, row in zip(prompts, rows, strict=True)]


def one_of_two_ranks(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    shared = SharedGenerator(Echo(), 2)
    said = [[done.row, done.text] for done in shared.generate(None, None, [f"p{i}" for i in range(5)])]
    try:
        shared.generate(None, None, ["p0", ""])  # the second rank's
    except ValueError as error:
        said.append(str(error))
    (Path(folder) / f"{rank}.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_ranks_share_the_prompts_and_their_errors(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(one_of_two_ranks, (str(tmp_path),), nprocs=2)
    expected: list[Any] = [[i, f"p{i}!"] for i in range(5)]
    for rank in (0, 1):
        assert json.loads((tmp_path / f"{rank}.json").read_text()) == [*expected, "a prompt is empty"]


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"SafetyEvaluation.suites: empty"):
        SafetyEvaluation([])
    with pytest.raises(ValueError, match=r"every_n_steps: -1 is not allowed; 0 \(off\) or more"):
        safety(every_n_steps=-1)
    with pytest.raises(ValueError, match=r"attack_success is measured twice; give the suites names of their own"):
        fit(tmp_path, SafetyEvaluation([SaysA(), SaysA()], Generator(max_new_tokens=2)))
    assert not (tmp_path / "safety.csv").exists()


def test_a_table_that_was_torn_is_said(tmp_path: Path) -> None:
    fit(tmp_path, safety())
    with (tmp_path / "safety.csv").open("a") as file:
        file.write("x,attack_success,0.5,0.1,0.9,4\n16,attack")
    run = read_run(tmp_path)
    assert run.problems == ["safety.csv, line 11: cannot be read"]
    assert run.safety["attack_success"][16][0] == 1.0
