"""A run's folder: made once, found again, and free of secrets."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from recipes.compose import compose
from recipes.errors import UserError
from recipes.ranks import first_on_each_machine, job_id
from recipes.redaction import redact_command, redact_config
from recipes.run_folder import LOCK, checkpoint_of, find_run, new_run, write_config, write_environment


def make_many(runs_dir: Path, count: int, out: Path) -> None:
    runs = [new_run(runs_dir, "sft/x") for _ in range(count)]
    out.write_text(json.dumps([run.number for run in runs]))


def test_runs_are_numbered(tmp_path: Path) -> None:
    runs = [new_run(tmp_path, "sft/x") for _ in range(3)]
    assert [run.path for run in runs] == [tmp_path / "sft/x" / str(n) for n in range(3)]
    runs[1].path.joinpath(".lock").unlink()
    runs[1].path.rmdir()
    assert new_run(tmp_path, "sft/x").number == 3  # never a number again while a later one is there


def test_processes_that_race_get_folders_of_their_own(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    outs = [tmp_path / f"{i}.json" for i in range(4)]
    workers = [context.Process(target=make_many, args=(tmp_path / "runs", 25, out)) for out in outs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    numbers = [number for out in outs for number in json.loads(out.read_text())]
    assert sorted(numbers) == list(range(100))


def touch_checkpoints(folder: Path, *names: str) -> None:
    (folder / "checkpoints").mkdir(exist_ok=True)
    for name in names:
        (folder / "checkpoints" / name).touch()


class TestFinding:
    def test_the_newest_unfinished_run(self, tmp_path: Path) -> None:
        runs = [new_run(tmp_path, "x") for _ in range(12)]
        for run in runs:
            run.release()  # the process ended
        runs[11].mark_finished()
        assert find_run(tmp_path, "x", None, unfinished=True).number == 10
        assert find_run(tmp_path, "x", None, unfinished=False).number == 11
        assert find_run(tmp_path, "x", 3, unfinished=True).number == 3

    def test_a_run_that_another_job_is_in_is_not_one_to_continue(self, tmp_path: Path) -> None:
        first = new_run(tmp_path, "x")
        first.release()
        code = (
            "import sys; from pathlib import Path; from recipes.run_folder import new_run;"
            "run = new_run(Path(sys.argv[1]), 'x'); print(run.number, flush=True); sys.stdin.read()"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        assert other.stdout.readline() == "1\n"
        assert find_run(tmp_path, "x", None, unfinished=True).number == 0
        with pytest.raises(UserError, match="a process is still running in it"):
            find_run(tmp_path, "x", 1, unfinished=True).acquire()
        other.send_signal(signal.SIGKILL)  # no chance to clean up
        other.communicate()
        found = find_run(tmp_path, "x", None, unfinished=True)
        assert found.number == 1
        found.acquire()

    def test_the_run_of_this_job_is_found_though_rank_zero_holds_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in (("TORCHELASTIC_RUN_ID", "7"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        run = new_run(tmp_path, "x")
        assert not run.running()
        assert find_run(tmp_path, "x", None, unfinished=True).number == 0
        monkeypatch.setenv("MASTER_PORT", "2")  # another job
        assert run.running()

    def test_it_is_found_in_the_instant_before_the_lock_has_the_jobs_name(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in (("TORCHELASTIC_RUN_ID", "7"), ("MASTER_ADDR", "h"), ("MASTER_PORT", "1")):
            monkeypatch.setenv(name, value)
        run = new_run(tmp_path, "x")
        name_of_job = (run.path / LOCK).read_text()
        (run.path / LOCK).write_text("elastic h:0 7")  # what the last job left there
        timer = threading.Timer(0.3, (run.path / LOCK).write_text, [name_of_job])
        timer.start()
        assert find_run(tmp_path, "x", None, unfinished=True).number == 0
        timer.join()

    def test_it_is_taken_though_another_process_looks_at_it(self, tmp_path: Path) -> None:
        run = new_run(tmp_path, "x")
        run.release()
        with (run.path / LOCK).open() as looking:
            fcntl.flock(looking, fcntl.LOCK_SH)
            timer = threading.Timer(0.3, fcntl.flock, [looking, fcntl.LOCK_UN])
            timer.start()
            run.acquire()
            timer.join()

    @pytest.mark.parametrize(
        ("number", "message"),
        [
            (None, "--ckpt_path last: .* has no unfinished run; leave the flag out to begin one, or name one: --run N"),
            (7, "--run 7: .* has no run 7; there are: 0"),
        ],
    )
    def test_there_is_none(self, tmp_path: Path, number: int | None, message: str) -> None:
        new_run(tmp_path, "x").mark_finished()
        with pytest.raises(UserError, match=message):
            find_run(tmp_path, "x", number, unfinished=True)

    def test_no_runs_at_all(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="has no unfinished run"):
            find_run(tmp_path / "nowhere", "x", None, unfinished=True)
        assert not (tmp_path / "nowhere").exists()


class TestCheckpoints:
    def test_the_highest_complete_step(self, tmp_path: Path) -> None:
        run = new_run(tmp_path, "x")
        touch_checkpoints(run.path, "step-00000009.ckpt", "step-00000010.ckpt", ".step-00000011.ckpt-partial")
        touch_checkpoints(run.path, "step-00000012.ckpt.tmp", "step-100000000.ckpt.tmp", "other.ckpt")
        assert checkpoint_of(run, "last").name == "step-00000010.ckpt"

    def test_best(self, tmp_path: Path) -> None:
        run = new_run(tmp_path, "x")
        touch_checkpoints(run.path, "step-00000009.ckpt", "step-00000010.ckpt")
        with pytest.raises(UserError, match="has no best checkpoint"):
            checkpoint_of(run, "best")
        (run.checkpoints / "best.ckpt").symlink_to("step-00000009.ckpt")
        assert checkpoint_of(run, "best").name == "step-00000009.ckpt"

    def test_none(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="stopped before its first checkpoint was whole"):
            checkpoint_of(new_run(tmp_path, "x"), "last")


class TestNotes:
    def test_a_changed_config_keeps_the_earlier_one(self, tmp_path: Path) -> None:
        run = new_run(tmp_path, "x")
        for text in ("a: 1\n", "a: 1\n", "a: 2\n", "a: 3\n"):
            write_config(run, text)
        texts = {path.name: path.read_text() for path in run.path.glob("*.yaml")}
        assert texts == {"config.0.yaml": "a: 1\n", "config.1.yaml": "a: 2\n", "config.yaml": "a: 3\n"}

    def test_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("WANDB_API_KEY", "hush-hush")
        run = new_run(tmp_path, "sft/x")
        for steps in ("3", "4"):
            write_environment(run, ["recipes", "fit", "--trainer.max_steps", steps], {"trainer": {}})
        text = (run.path / "environment.json").read_text()
        notes = json.loads(text)
        assert notes["recipe"] == "sft/x"
        assert notes["command"][-1] == "4"
        assert [earlier["command"][-1] for earlier in notes["earlier"]] == ["3"]
        assert re.match(r"\d+\.\d+", notes["versions"]["torch"])
        assert notes["cores"] >= 1
        assert "hush-hush" not in text

    @pytest.mark.parametrize(
        ("words", "shown"),
        [
            (["--logger.api_key", "k"], ["--logger.api_key", "***"]),
            (["--logger.api_key=k", "x"], ["--logger.api_key=***", "x"]),
            (["--hf_token", "k"], ["--hf_token", "***"]),
            (["--tokenizer", "builtin:bytes"], ["--tokenizer", "builtin:bytes"]),
            (["--data.eos_token", "</s>"], ["--data.eos_token", "</s>"]),
        ],
    )
    def test_secrets_in_a_command(self, words: list[str], shown: list[str]) -> None:
        assert redact_command(words) == shown

    def test_secrets_in_a_config(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MY_API_KEY", "hush")
        monkeypatch.setenv("PLACE", "here")
        file = tmp_path / "r.yaml"
        file.write_text(
            "trainer:\n  logger: [{api_key: '${oc.env:MY_API_KEY}', where: '${oc.env:MY_API_KEY}', password: open}]\n"
            "  path: ${oc.env:PLACE}\ntokenizer: t\n"
        )
        composed = compose([str(file)])
        assert composed.values["trainer"]["logger"][0]["api_key"] == "hush"
        assert redact_config(composed, composed.values) == {
            "trainer": {
                "logger": [{"api_key": "${oc.env:MY_API_KEY}", "where": "${oc.env:MY_API_KEY}", "password": "***"}],
                "path": "here",
            },
            "tokenizer": "t",
        }


class TestRanks:
    def test_a_job_has_one_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        assert job_id() == f"process {os.getpid()}"
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("MASTER_ADDR", "host")
        monkeypatch.setenv("MASTER_PORT", "123")
        assert job_id() == "elastic host:123 none"

    def test_the_others_wait_for_the_first(self, tmp_path: Path) -> None:
        code = (
            "import sys, time; from pathlib import Path; from recipes.ranks import first_on_each_machine\n"
            "rank, log = int(sys.argv[1]), Path(sys.argv[2])\n"
            "with first_on_each_machine(rank) as chosen:\n"
            "    if chosen:\n"
            "        time.sleep(1.5)\n"
            "    with log.open('a') as file:\n"
            "        file.write(f'{rank}{chosen} ')\n"
            "time.sleep(0.5)\n"
        )
        env = {
            **os.environ,
            "TORCHELASTIC_RUN_ID": f"test {os.getpid()}",
            "MASTER_ADDR": "h",
            "MASTER_PORT": "1",
            "TMPDIR": str(tmp_path),
        }
        log = tmp_path / "log"
        ranks = [subprocess.Popen([sys.executable, "-c", code, str(rank), str(log)], env=env) for rank in (1, 0)]
        assert [rank.wait(timeout=30) for rank in ranks] == [0, 0]
        assert log.read_text() == "0True 1False "
        assert [path.name for path in tmp_path.iterdir()] == ["log"]

    def test_without_a_launcher_there_is_no_waiting(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("TORCHELASTIC_RUN_ID", "SLURM_NTASKS"):
            monkeypatch.delenv(name, raising=False)
        with first_on_each_machine(1) as chosen:
            assert chosen
