"""Preparing data takes longer than the processes' connection waits for anybody: they are connected afterwards."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.distributed.test_resume import LAYOUTS, ROOT, write_recipe

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

SECONDS, TIMEOUT = 24, 15


@pytest.mark.parametrize(("verb", "late"), [("fit", 1), ("validate", 0)])
def test_the_other_node_waits(tmp_path: Path, verb: str, late: int) -> None:
    """Two nodes, each with a cache of its own; one has more to do."""
    write_recipe(tmp_path, LAYOUTS["packed, 0 workers"])
    strategy = {
        "class_path": "lightning.pytorch.strategies.DDPStrategy",
        "init_args": {"timeout": f"0:00:{TIMEOUT}", "process_group_backend": "gloo"},
    }
    data = {"class_path": "tests.distributed.slow_data.SlowText", "init_args": {"seconds": SECONDS, "rank": late}}
    given = yaml.safe_load((tmp_path / "recipe.yaml").read_text())["data"]["init_args"]
    over = {"trainer": {"strategy": strategy, "num_nodes": 2, "max_epochs": 1}}
    (tmp_path / "over.yaml").write_text(
        yaml.safe_dump(over | {"data": data | {"init_args": given | data["init_args"]}})
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    nodes = []
    for rank in (0, 1):
        told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1, "GROUP_RANK": rank}
        told |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": f"job{rank}{port}"}
        told |= {"XDG_CACHE_HOME": tmp_path / f"cache{rank}", "OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT}
        nodes.append(
            subprocess.Popen(
                [sys.executable, "-m", "recipes", verb, "-c", "recipe.yaml", "-c", "over.yaml"],
                cwd=tmp_path,
                env=os.environ | {key: str(value) for key, value in told.items()},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    try:
        errors = [node.communicate(timeout=300)[1] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], [error[-3000:] for error in errors]
