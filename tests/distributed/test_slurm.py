"""A real Slurm: two nodes train together; told to stop (the time is over, a job of higher priority comes), the job
saves, goes back into the queue, and goes on as if nothing had happened; cancelled, it saves and stays away."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.distributed.slurm_cluster import SlurmCluster, install
from tests.distributed.test_resume import LAYOUTS, ROOT, metrics, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEPS = 10  # two epochs


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    reason = install()
    if reason:
        pytest.skip(reason)
    started = SlurmCluster(tmp_path_factory.mktemp("slurm"))
    try:
        started.start()
        yield started
    finally:
        started.stop()


def submit(cluster: SlurmCluster, folder: Path, *words: str) -> str:
    """Submits the recipe to two nodes; the job's number."""
    launch = ["launch", "slurm", "-c", "recipe.yaml", "--nodes", "2", "--devices", "1", "--sbatch", "output=log.txt"]
    launch += ["--preflight", "180"]  # of a busy machine
    done = subprocess.run(
        [sys.executable, "-m", "recipes", *launch, *words],
        cwd=folder,
        env=os.environ | cluster.environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def submit_slow(cluster: SlurmCluster, folder: Path) -> str:
    """The same, with time to act in between; returns when a checkpoint was written."""
    write_recipe(folder, LAYOUTS["packed, 2 workers, two ranks"])
    pause = {"class_path": "tests.distributed.pause.Pause", "init_args": {"seconds": 0.5, "folder": str(folder)}}
    (folder / "pause.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [pause]}}))
    job = submit(cluster, folder, "-c", "pause.yaml")
    until(lambda: len(list(folder.glob("runs/recipe/0/checkpoints/step-*.ckpt"))) > 0, folder)
    return job


def until(what: object, folder: Path, seconds: float = 400) -> None:
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, log(folder)
        time.sleep(0.2)


def log(folder: Path) -> str:
    return (folder / "log.txt").read_text() if (folder / "log.txt").exists() else "no log"


def steps_saved(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("runs/recipe/*/checkpoints/step-*.ckpt"))


@pytest.fixture(scope="module")
def undisturbed(cluster: SlurmCluster, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    folder = tmp_path_factory.mktemp("undisturbed")
    write_recipe(folder, LAYOUTS["packed, 2 workers, two ranks"])
    job = submit(cluster, folder)
    shown = cluster.wait(job, 500)
    assert shown["JobState"] == "COMPLETED", log(folder)
    assert (shown["NumNodes"], shown["Restarts"]) == ("2", "0")
    text = log(folder)
    assert "cluster: 2 processes" in text
    assert "all-reduce over gloo: right" in text
    rows = metrics(folder)
    assert len([row for row in rows if row.get("train/loss")]) == STEPS
    return rows


def test_the_time_is_over(cluster: SlurmCluster, undisturbed: list[dict[str, str]], tmp_path: Path) -> None:
    """SIGUSR1 to all tasks, as Slurm sends it before the time limit."""
    job = submit_slow(cluster, tmp_path)
    cluster.run("scancel", "--signal=USR1", job)
    shown = cluster.wait(job, 600)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log(tmp_path)
    text = log(tmp_path)
    assert text.count(f"recipes: requeueing job {job}") == 1
    assert "continuing runs/recipe/0 from step-" in text
    assert not list(tmp_path.rglob("hpc_ckpt*")), "Lightning saved from its signal handler too"
    assert metrics(tmp_path) == undisturbed


def test_a_job_of_higher_priority(cluster: SlurmCluster, undisturbed: list[dict[str, str]], tmp_path: Path) -> None:
    job = submit_slow(cluster, tmp_path)
    sleep = ["--partition=high", "--nodes=2", "--exclusive", f"--output={tmp_path}/other.txt", "--wrap=sleep 5"]
    cluster.run("sbatch", "--parsable", *sleep)
    shown = cluster.wait(job, 600)
    assert (shown["JobState"], shown["Restarts"]) == ("COMPLETED", "1"), log(tmp_path)
    assert "SIGTERM: saving a checkpoint after this step" in log(tmp_path)
    assert metrics(tmp_path) == undisturbed


def test_cancelled(cluster: SlurmCluster, tmp_path: Path) -> None:
    """Not requeued; but the steps since its last checkpoint are saved."""
    job = submit_slow(cluster, tmp_path)
    before = steps_saved(tmp_path)
    cluster.run("scancel", job)
    assert cluster.wait(job, 300)["JobState"] == "CANCELLED", log(tmp_path)
    assert steps_saved(tmp_path) != before
    assert "requeueing" not in log(tmp_path)


def test_a_wrong_recipe_is_not_submitted(cluster: SlurmCluster, tmp_path: Path) -> None:
    write_recipe(tmp_path, LAYOUTS["packed, 2 workers, two ranks"])
    with pytest.raises(AssertionError, match="max_steps"):
        submit(cluster, tmp_path, "--trainer.max_stepz", "3")
    assert cluster.run("squeue", "--noheader").stdout == ""


def test_the_fixture_leaves_nothing(tmp_path: Path) -> None:
    """A cluster of its own, started and stopped."""
    if install() or not shutil.which("sbatch"):
        pytest.skip("needs Slurm")
    before = Path("/etc/hosts").read_text()
    other = SlurmCluster(tmp_path)
    try:
        other.start()
    finally:
        other.stop()
    assert Path("/etc/hosts").read_text() == before
