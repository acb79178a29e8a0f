"""torchrun on two nodes (network namespaces), by `recipes launch torchrun`: a killed worker, a node that is cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.distributed.namespaces import CABLE, TwoNodes, install
from tests.distributed.test_resume import LAYOUTS, ROOT, metrics, recipes, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEPS = 10  # two epochs
LAYOUT = LAYOUTS["packed, 2 workers, two ranks"]


@pytest.fixture
def nodes() -> Iterator[TwoNodes]:
    reason = install()
    if reason:
        pytest.skip(reason)
    made = TwoNodes()
    try:
        made.start()
        yield made
    finally:
        made.stop()


def launch(nodes: TwoNodes, folder: Path, *words: str) -> list[subprocess.Popen[str]]:
    """The launcher's command on both nodes; one process on each."""
    common = ["launch", "torchrun", "-c", "recipe.yaml", "--nodes", "2", "--devices", "1", "--interface", CABLE]
    common += ["--master", nodes.addresses[0], "--job", "test", "--preflight", "180", *words]
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return [
        nodes.run(
            rank,
            [sys.executable, "-m", "recipes", *common, "--node-rank", str(rank), "--local-addr", nodes.addresses[rank]],
            folder,
            variables,
        )
        for rank in (0, 1)
    ]


def ended(processes: list[subprocess.Popen[str]], seconds: float) -> tuple[list[int], list[str]]:
    """Exit statuses and what was said, node by node."""
    end = time.monotonic() + seconds
    try:
        errors = [process.communicate(timeout=max(1.0, end - time.monotonic()))[1] for process in processes]
    finally:
        for process in processes:
            process.terminate()
    return [process.returncode for process in processes], errors


def test_a_worker_is_killed_on_one_node(nodes: TwoNodes, tmp_path: Path) -> None:
    """Both restart and go on: the metrics are those of a run on one machine that nothing has disturbed."""
    (tmp_path / "alone").mkdir()
    write_recipe(tmp_path / "alone", LAYOUT)
    alone = recipes(tmp_path / "alone", "fit", "-c", "recipe.yaml")
    assert alone.returncode == 0, alone.stderr[-3000:]
    folder = tmp_path / "nodes"
    folder.mkdir()
    write_recipe(folder, LAYOUT)
    pause = {"class_path": "tests.distributed.pause.Pause", "init_args": {"seconds": 0.5, "folder": str(folder)}}
    (folder / "pause.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [pause]}}))
    processes = launch(nodes, folder, "-c", "pause.yaml")
    try:
        end = time.monotonic() + 400
        while not list(folder.glob("runs/recipe/0/checkpoints/step-*.ckpt")):
            gone = [process for process in processes if process.poll() is not None]
            assert not gone, gone[0].communicate()[1][-3000:]
            assert time.monotonic() < end
            time.sleep(0.1)
        victim = int((folder / "rank1.pid").read_text())
        os.kill(victim, signal.SIGKILL)
    except BaseException:
        for process in processes:
            process.terminate()
        raise
    statuses, errors = ended(processes, 500)
    assert statuses == [0, 0], [error[-3000:] for error in errors]
    assert "cluster: 2 processes" in errors[0]
    for name, address in zip(nodes.names, nodes.addresses, strict=True):
        assert f"{CABLE} {address}" in errors[0], name
    assert "all-reduce over gloo: right" in errors[0]
    assert errors[0].count("continuing runs/recipe/0 from step-") == 1
    assert int((folder / "rank1.pid").read_text()) != victim
    rows = metrics(folder)
    assert len([row for row in rows if row.get("train/loss")]) == STEPS
    assert rows == metrics(tmp_path / "alone")


def test_a_node_is_cut_off(nodes: TwoNodes, tmp_path: Path) -> None:
    """Its interface is down: each of the two says in a line what it is that is not there, and ends."""
    write_recipe(tmp_path, LAYOUT)
    nodes.set_link(nodes.names[1], up=False)
    statuses, errors = ended(launch(nodes, tmp_path, "--join", "8"), 400)  # torchrun itself waits 600 s
    assert statuses == [2, 2], errors
    lines = [[line for line in error.splitlines() if line.startswith("recipes: ")] for error in errors]
    assert [len(said) for said in lines] == [1, 1], errors
    assert lines[0][0].startswith(f"recipes: node {nodes.names[0]}: the 2 nodes did not meet ")
    assert f"at the end there were {nodes.addresses[0]}; the others were not started" in lines[0][0]
    assert lines[1][0].startswith(f"recipes: node {nodes.names[1]}: master {nodes.addresses[0]}:29500: not reached")
    assert "Traceback" not in errors[0] + errors[1]
    assert not (tmp_path / "runs").exists()


def test_the_check_of_the_cluster_names_the_rank_that_is_cut_off(nodes: TwoNodes, tmp_path: Path) -> None:
    """Without an agent of torchrun's (as under Slurm): each rank says what it misses."""
    told = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_PORT": "29600"}
    told |= {"MASTER_ADDR": nodes.addresses[0], "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "recipes", "check", "cluster", "--timeout", "12", "--mebibytes", "1"]
    nodes.set_link(nodes.names[1], up=False)
    processes = [nodes.run(rank, command, tmp_path, told | {"RANK": str(rank)}) for rank in (0, 1)]
    statuses, errors = ended(processes, 300)
    assert statuses == [2, 2], errors
    lines = [[line for line in error.splitlines() if line.startswith("recipes: ")] for error in errors]
    assert lines[0] == ["recipes: rank 1 of 2 (node 1) did not come within 12 s; see the logs of their nodes"]
    assert len(lines[1]) == 1
    assert f"was not reached within 12 s by rank 1 on {nodes.names[1]}" in lines[1][0]
