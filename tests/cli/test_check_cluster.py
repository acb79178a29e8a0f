"""`recipes check cluster` with real processes: what is well, who is missing, what differs, and that it is said soon."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CHECK = ["-m", "recipes", "check", "cluster", "--mebibytes", "4"]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(folder: Path, rank: int, size: int, port: int, *words: str, **more: str) -> subprocess.Popen[str]:
    """One process as a launcher would start it."""
    told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, *CHECK, "--timeout", "20", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | {key: str(value) for key, value in told.items()} | more,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, list[str]]:
    """Exit status and what was said to the user."""
    _, err = process.communicate(timeout=120)
    return process.returncode, [line for line in err.splitlines() if not line.startswith("[W")]


def test_all_is_well(tmp_path: Path) -> None:
    """Under torchrun, twice in a row at the same port: nothing is left open."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    for _ in range(2):
        done = subprocess.run(
            [sys.executable, *launcher, *CHECK, "--timeout", "150"],  # of a busy machine
            cwd=tmp_path,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, done.stderr
        assert "cluster: 2 processes" in done.stderr
        assert f"{socket.gethostname()}: ranks 0-1; CPU" in done.stderr
        assert "all-reduce over gloo: right; 4 MiB in" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    begin = time.monotonic()
    port = free_port()
    here = [start(tmp_path, rank, 3, port, "--timeout", "6") for rank in (0, 2)]
    results = [ended(process) for process in here]
    assert results[0][0] == 2
    (line,) = results[0][1]
    assert line.startswith("recipes: rank 1 of 3 (node 1) did not come within 6 s")
    assert results[1] == (2, [])
    assert time.monotonic() - begin < 60
    assert list(tmp_path.iterdir()) == []


def test_rank_0_never_comes(tmp_path: Path) -> None:
    status, lines = ended(start(tmp_path, 1, 2, free_port(), "--timeout", "4"))
    assert status == 2
    assert len(lines) == 1
    assert "rank 0 at 127.0.0.1" in lines[0]
    assert "was not reached within 4 s by rank 1" in lines[0]


def test_the_port_is_taken(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, lines = ended(start(tmp_path, 0, 2, port))
    assert status == 2
    assert any(line.startswith(f"recipes: MASTER_PORT {port}: not free on {socket.gethostname()}") for line in lines)


def test_other_versions_on_one_node(tmp_path: Path) -> None:
    """A real difference: another safetensors is what rank 1's Python finds first."""
    metadata = tmp_path / "other/safetensors-0.0.1.dist-info/METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.0.1\n")
    root = str(Path(__file__).parents[2])
    port = free_port()
    folder = tmp_path / "work"
    folder.mkdir()
    first = start(folder, 0, 2, port)
    second = start(folder, 1, 2, port, PYTHONPATH=f"{metadata.parent.parent}:{root}")
    (status, lines), (other, silence) = ended(first), ended(second)
    assert (status, other, silence) == (2, 2, [])
    (line,) = lines
    assert line.startswith("recipes: package versions differ: safetensors is ")
    assert "0.0.1 on rank 1" in line


def test_a_run_folder_that_one_node_does_not_share(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    port = free_port()
    processes = [start(tmp_path / name, rank, 2, port) for rank, name in enumerate("ab")]
    (status, lines), _ = [ended(process) for process in processes]
    assert status == 2
    (line,) = lines
    assert "rank 1 on" in line
    assert "runs/ (runs_dir) is not the folder that rank 0 sees" in line


def test_a_run_folder_that_one_node_cannot_write(tmp_path: Path) -> None:
    """Rank 1 is shut into a namespace of its own, where runs/ is mounted read-only."""
    (tmp_path / "runs").mkdir()
    shut = [
        "unshare",
        "--mount",
        "sh",
        "-c",
        'mount --bind runs runs && mount -o remount,ro,bind runs && exec "$@"',
        "sh",
    ]
    try:
        possible = subprocess.run([*shut, "true"], cwd=tmp_path, capture_output=True).returncode == 0
    except FileNotFoundError:
        possible = False
    if not possible:
        pytest.skip("needs unshare --mount (root)")
    port = free_port()
    first = start(tmp_path, 0, 2, port)
    told = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    second = subprocess.Popen(
        [*shut, sys.executable, *CHECK, "--timeout", "20"],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | told,
        stderr=subprocess.PIPE,
        text=True,
    )
    (status, lines), (other, _) = ended(first), ended(second)
    assert (status, other) == (2, 2)
    (line,) = lines
    assert line.startswith("recipes: rank 1 on ")
    assert "Read-only file system" in line


def test_a_rank_that_stops_in_the_all_reduce(tmp_path: Path) -> None:
    """It reports in, and is stopped (as a machine that hangs) before it comes to the all-reduce."""
    (tmp_path / "stop").mkdir()
    (tmp_path / "stop/sitecustomize.py").write_text(
        "import os, signal, threading, time\n"
        "def watch():\n"
        "    import sys\n"
        "    while 'recipes.cluster_reduce' not in sys.modules: time.sleep(0.001)\n"
        "    os.kill(os.getpid(), signal.SIGSTOP)\n"
        "threading.Thread(target=watch, daemon=True).start()\n"
    )
    root = str(Path(__file__).parents[2])
    folder = tmp_path / "work"
    folder.mkdir()
    port = free_port()
    first = start(folder, 0, 2, port, "--timeout", "8")
    second = start(folder, 1, 2, port, "--timeout", "8", PYTHONPATH=f"{tmp_path / 'stop'}:{root}")
    try:
        status, lines = ended(first)
    finally:
        second.send_signal(signal.SIGKILL)
        second.communicate()
    assert status == 2
    said = [line for line in lines if line.startswith("recipes: ")]
    assert len(said) == 1
    assert "rank 1 of 2 (node 1)" in said[0]
    assert "died or hung in the all-reduce over gloo" in said[0]


def test_alone(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, *CHECK, "-c", "pretrain/quickstart"], cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert "one process: start this with srun or torchrun" in done.stderr
    assert list(tmp_path.iterdir()) == []
