"""`recipes fit` and its kin on a tiny model, in this process: the run's folder, resume, links, and what is refused."""

from __future__ import annotations

import csv
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import yaml

from recipes.__main__ import main

RECIPE = """\
# Tiny.
# Needs: nothing
seed_everything: 7
tokenizer: builtin:bytes
sequence_length: 32
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 64, tie_word_embeddings: true}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1e-2}}
data:
  class_path: llm_modules.data.TextDataModule
  init_args:
    sources: [{path: rows.jsonl}]
    batch_size: 2
    validation_fraction: 0.1
trainer:
  max_steps: 4
  accelerator: cpu
  devices: 1
  val_check_interval: 2
  log_every_n_steps: 1
  num_sanity_val_steps: 0
  logger: false
  enable_progress_bar: false
checkpoint: {every_n_steps: 2}
leave_out: [ExportFolder]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe and its data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LITRECIPES_RUN_FOLDER", raising=False)
    rows = [json.dumps({"text": f"row number {i}, " * (1 + i % 5)}) for i in range(60)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    return tmp_path


def fit(*words: str) -> int:
    return main(["fit", "-c", "tiny", *words])


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_and_its_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hush-hush")
    assert fit("--trainer.logger", "null", "--leave_out", "[]") == 0
    run = folder / "runs/tiny/0"
    assert {path.name for path in run.iterdir()} >= {
        "audit.json",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "export",
        "finished",
        "metrics.csv",
        "tensorboard",
    }
    assert [row["step"] for row in metrics(run)] == ["0", "1", "2", "3"]
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["trainer"]["max_steps"] == 4
    assert config["model"]["init_args"]["optimizer"]["init_args"]["weight_decay"] == 0.01  # a default
    assert json.loads((run / "environment.json").read_text())["command"][:3] == ["recipes", "fit", "-c"]
    assert not any("hush-hush" in path.read_text(errors="replace") for path in run.rglob("*") if path.is_file())
    assert not (folder / "lightning_logs").exists()


def test_a_runs_config_repeats_it_and_nothing_is_overwritten(folder: Path) -> None:
    assert fit("--trainer.logger", "null") == 0
    first = folder / "runs/tiny/0"
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}
    assert main(["fit", "-c", str(first / "config.yaml")]) == 0
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    losses = [[row["train/loss"] for row in metrics(folder / f"runs/tiny/{n}")] for n in (0, 1)]
    assert losses[0] == losses[1]
    # Shared values may still be changed on top.
    assert main(["fit", "-c", str(first / "config.yaml"), "--seed_everything", "8", "--dry-run"]) == 0


class TestResume:
    def test_last_continues_in_its_own_folder(self, folder: Path) -> None:
        assert fit("--trainer.logger", "null", "--runs_dir", "whole") == 0
        assert fit("--trainer.logger", "null", "--trainer.max_steps", "2") == 0
        (folder / "runs/tiny/0/finished").unlink()  # as if it had been killed after its checkpoint
        assert fit("--trainer.logger", "null", "--ckpt_path", "last") == 0
        assert [path.name for path in (folder / "runs/tiny").iterdir()] == ["0"]
        resumed, whole = metrics(folder / "runs/tiny/0"), metrics(folder / "whole/tiny/0")
        assert [row["train/loss"] for row in resumed] == [row["train/loss"] for row in whole]
        assert (folder / "runs/tiny/0/finished").exists()
        assert (folder / "runs/tiny/0/config.0.yaml").exists()  # it had been told to stop after two steps

    def test_there_is_none(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        assert fit("--ckpt_path", "last") == 2
        assert capsys.readouterr().err == (
            "recipes: --ckpt_path last: runs/tiny has no unfinished run; leave the flag out to begin one, or name "
            "one: --run N\n"
        )
        assert not (folder / "runs").exists()

    def test_a_finished_run_by_number(self, folder: Path) -> None:
        assert fit("--trainer.logger", "null", "--trainer.max_steps", "2") == 0
        assert fit("--trainer.logger", "null", "--trainer.max_steps", "2") == 0
        assert fit("--trainer.logger", "null", "--run", "0", "--trainer.max_steps", "3") == 0
        assert len(metrics(folder / "runs/tiny/0")) == 3
        assert len(metrics(folder / "runs/tiny/1")) == 2

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("sequence_length", "16", "belongs to other data"),
            ("model.optimizer", "torch.optim.SGD", "made with the optimizer AdamW"),
            ("model.backbone.config.hidden_size", "32", "another model"),
        ],
    )
    def test_a_resume_that_is_refused_changes_nothing(
        self, folder: Path, key: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert fit("--trainer.logger", "null", "--trainer.max_steps", "2") == 0

        def files() -> dict[Path, bytes]:
            return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.match("tensorboard/*")}

        before = files()
        assert fit("--trainer.logger", "null", "--run", "0", "--trainer.max_steps", "4", f"--{key}", value) == 2
        assert message in capsys.readouterr().err
        assert files() == before

    def test_a_run_stopped_by_a_signal_is_unfinished(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def interrupt() -> None:
            deadline = time.monotonic() + 60
            while not (folder / "runs/tiny/0/metrics.csv").exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        assert fit("--trainer.logger", "null", "--trainer.max_steps", "100000") == 130
        thread.join()
        assert not (folder / "runs/tiny/0/finished").exists()
        assert "--ckpt_path last continues" in capsys.readouterr().err
        steps = len(metrics(folder / "runs/tiny/0"))
        words = ("--ckpt_path", "last", "--trainer.max_steps", str(steps + 1))
        assert fit("--trainer.logger", "null", *words) == 0
        assert len(metrics(folder / "runs/tiny/0")) == steps + 1


def test_a_run_that_had_no_more_time_is_unfinished(folder: Path) -> None:
    assert fit("--trainer.logger", "null", "--trainer.max_steps", "100000", "--trainer.max_time", "00:00:00:01") == 0
    assert not (folder / "runs/tiny/0/finished").exists()
    steps = len(metrics(folder / "runs/tiny/0"))
    words = ("--ckpt_path", "last", "--trainer.max_steps", str(steps + 1))
    assert fit("--trainer.logger", "null", *words) == 0
    assert len(metrics(folder / "runs/tiny/0")) == steps + 1


def test_dry_run_builds_and_writes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(folder.rglob("*"))
    assert fit("--dry-run") == 0
    text = capsys.readouterr().err
    for word in ("parameters", "FLOPs", "peak memory", "tokens: ", "row number"):
        assert word in text
    assert set(folder.rglob("*")) == before


def test_print_config_is_a_config(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = set(folder.rglob("*"))
    assert fit("--print_config", "--trainer.max_steps", "9") == 0
    text = capsys.readouterr().out
    assert yaml.safe_load(text)["trainer"]["max_steps"] == 9
    assert set(folder.rglob("*")) == before
    (folder / "printed.yaml").write_text(text)
    assert main(["fit", "-c", "printed.yaml", "--print_config"]) == 0
    assert capsys.readouterr().out == text


def test_show_builds(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", "tiny", "--model", "--data"]) == 0
    text = capsys.readouterr().out
    for word in ("parameters", "peak memory", "documents: ", "⟦"):
        assert word in text


def test_validate_predict_and_test_of_a_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.logger", "null") == 0
    run = folder / "runs/tiny/0"
    for verb in ("validate", "test"):
        assert main([verb, "-c", "tiny", "--ckpt_path", "best"]) == 0
        noted = json.loads((run / f"{verb}.json").read_text())
        assert Path(noted["checkpoint"]).parent == run / "checkpoints"
        assert any(name.endswith("/loss") for name in noted["metrics"][0])
    assert main(["predict", "-c", "tiny", "--ckpt_path", "last", "--model.generator.max_new_tokens", "3"]) == 0
    rows = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert rows
    assert {"prompt", "completion"} <= rows[0].keys()
    assert [path.name for path in (folder / "runs/tiny").iterdir()] == ["0"]
    assert "random weights" not in capsys.readouterr().err
    assert main(["validate", "-c", "tiny"]) == 0  # of the untrained model: nothing to write
    assert "no --ckpt_path, so this is a model of random weights" in capsys.readouterr().err
    assert [path.name for path in (folder / "runs/tiny").iterdir()] == ["0"]


def test_a_users_own_objective_from_the_working_directory(folder: Path) -> None:
    (folder / "my_loss_of_a_test.py").write_text(
        "from llm_modules.objectives import NextToken\n\n\n"
        "class MyLoss(NextToken):\n"
        "    def __init__(self, factor: float = 2.0) -> None:\n"
        "        super().__init__()\n"
        "        self.factor = factor\n"
    )
    words = ("--model.objective", "my_loss_of_a_test.MyLoss", "--model.objective.factor", "3.0")
    assert fit("--trainer.logger", "null", *words) == 0
    config = yaml.safe_load((folder / "runs/tiny/0/config.yaml").read_text())
    assert config["model"]["init_args"]["objective"]["init_args"]["factor"] == 3.0


def test_loggers_of_the_config_write_into_the_run(folder: Path) -> None:
    assert fit("--trainer.logger", "[{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {name: extra}}]") == 0
    run = folder / "runs/tiny/0"
    assert (run / "metrics.csv").exists()
    assert list((run / "extra").rglob("metrics.csv"))
    assert not (run / "tensorboard").exists()
    (folder / "default.yaml").write_text("trainer: {logger: null}\n")
    assert main(["fit", "-c", "tiny", "-c", "default", "-c", "loggers/tensorboard"]) == 0
    assert list((folder / "runs/tiny/1/tensorboard").glob("events*"))


def test_a_trial_run_writes_nothing(folder: Path) -> None:
    before = set(folder.rglob("*"))
    assert fit("--trainer.fast_dev_run", "2") == 0
    assert set(folder.rglob("*")) == before


def test_default_callbacks_can_be_set_and_left_out(folder: Path) -> None:
    words = ("--trainer.callbacks", "[{class_path: callbacks.ExportFolder, init_args: {folder: mine}}]")
    assert fit("--trainer.logger", "null", *words, "--leave_out", "[MaskAudit, Throughput]") == 0
    run = folder / "runs/tiny/0"
    assert (run / "mine/config.json").exists()
    assert not (run / "export").exists()
    assert not (run / "audit.json").exists()
    assert "throughput/tokens_per_second" not in metrics(run)[0]


def test_a_model_card_tells_of_the_weights_that_leave(folder: Path) -> None:
    """The run goes one step further than its last validation."""
    import torch

    for weights in ("last", "best"):
        words = ("--trainer.callbacks", f"[{{class_path: callbacks.ExportFolder, init_args: {{weights: {weights}}}}}]")
        assert fit("--trainer.max_steps", "5", "--leave_out", "[]", "--trainer.logger", "null", *words) == 0
    last, best = ((folder / f"runs/tiny/{n}/export/README.md").read_text() for n in (0, 1))
    seen = {
        name: torch.load(folder / f"runs/tiny/1/checkpoints/{name}.ckpt", weights_only=True)["litrecipes"][
            "tokens_seen"
        ]
        for name in ("last", "best")
    }
    assert seen["best"] < seen["last"]
    assert f"- Tokens seen: {seen['last']:,}\n" in last
    assert "| val/loss (at step 4) |" in last
    assert "- Optimizer steps: 4\n" in best
    assert f"- Tokens seen: {seen['best']:,}\n" in best
    assert "| val/loss |" in best
    assert main(["export", "runs/tiny/0", "out", "--which", "last"]) == 0
    assert "| val/loss (at step 4) |" in (folder / "out/README.md").read_text()


def test_a_bug_shows_a_traceback(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "buggy_of_a_test.py").write_text(
        "from llm_modules.objectives import NextToken\n\n\n"
        "class Buggy(NextToken):\n"
        "    def __init__(self) -> None:\n"
        "        raise KeyError('whose?')\n"
    )
    assert fit("--model.objective", "buggy_of_a_test.Buggy") == 1
    assert "Traceback" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_debug_shows_the_traceback_of_a_mistake_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert fit("--trainer.nothing", "1", "--debug") == 2
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.splitlines()[-1].startswith("recipes: --trainer.nothing: unknown key")
