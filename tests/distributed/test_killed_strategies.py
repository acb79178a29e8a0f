"""Nothing is lost under any strategy: a run killed with SIGKILL twice and continued has the losses of one that was not.

Two processes each; once between two micro-batches, once while a checkpoint is written: as a file or as shards, at once
or in the background.
"""

from __future__ import annotations

import csv
import json
import signal
from pathlib import Path

import pytest
import yaml

from recipes.__main__ import main
from tests.distributed.test_resume import RECIPE
from tests.ranks import run_command, said

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEPS = 9
FORMS = {
    "file": {},
    "file, in the background": {"asynchronous": True},
    "shards": {"sharded": True},
    "shards, in the background": {"sharded": True, "asynchronous": True},
}
# Which form of checkpoint, and how it is killed while one is written.
CELLS = {
    "fsdp2": ("shards, in the background", "torn"),
    "tp": ("shards", "unnamed"),
    "fsdp1": ("shards, in the background", "unnamed"),
    "zero2": ("file, in the background", "torn"),
    "zero3": ("shards", "torn"),
    "ddp": ("file, in the background", "unnamed"),
}
LOSS = 2e-6


def write_recipe(folder: Path, form: str) -> None:
    folder.mkdir()
    rows = [{"text": f"{i}: " + "abc def ghi jkl "[: 3 + i % 13] * (1 + i % 5)} for i in range(160)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = yaml.safe_load(RECIPE)
    config["model"]["init_args"]["backbone"]["config"]["num_key_value_heads"] = 2
    config["data"]["init_args"] |= {"sources": [{"path": "rows.jsonl"}], "packing": "none", "cache_dir": "cache"}
    config["trainer"] |= {"max_steps": STEPS, "max_epochs": -1, "limit_val_batches": 0, "devices": 2}
    del config["trainer"]["val_check_interval"]
    config["checkpoint"] = {"every_n_steps": 2, "keep_best": 0, **FORMS[form]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config))


def write_kill(folder: Path, name: str, where: str, step: int) -> list[str]:
    killer = {"class_path": "tests.distributed.kill.Kill", "init_args": {"where": where, "step": step}}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [killer]}}))
    return ["-c", f"{name}.yaml"]


def losses(folder: Path) -> list[float]:
    (file,) = folder.glob("runs/recipe/*/metrics.csv")  # resuming continues in the same folder
    with file.open(newline="") as rows:
        return [float(row["train/loss"]) for row in csv.DictReader(rows) if row.get("train/loss")]


@pytest.mark.parametrize("name", CELLS)
def test_killed_and_resumed(name: str, tmp_path: Path) -> None:
    form, where = CELLS[name]
    folder, words, last = tmp_path, ["fit", "-c", "recipe.yaml", "-c", f"strategies/{name}"], ["--ckpt_path", "last"]
    words += ["--trainer.devices", "2"]
    whole, killed = folder / f"{name}-whole", folder / f"{name}-killed"
    for place in (whole, killed):
        write_recipe(place, form)
    statuses = [
        run_command(whole, words),
        run_command(killed, [*words, *write_kill(killed, "first", "window", 3)]),
        run_command(killed, [*words, *write_kill(killed, "second", where, 5), *last]),
        run_command(killed, [*words, *last]),
    ]
    assert statuses == [[0, 0], [-signal.SIGKILL] * 2, [-signal.SIGKILL] * 2, [0, 0]], said(whole) + said(killed)
    expected, found = losses(folder / f"{name}-whole"), losses(folder / f"{name}-killed")
    assert len(expected) == len(found) == STEPS
    assert len(set(expected)) == STEPS
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= LOSS
    checkpoints = next((folder / f"{name}-killed").glob("runs/recipe/*/checkpoints"))
    assert (checkpoints / "last.ckpt").is_dir() == FORMS[CELLS[name][0]].get("sharded", False)
    whole = next((folder / f"{name}-whole").glob("runs/recipe/*"))
    assert main(["export", str(whole), str(folder / f"{name}-exported")]) == 0
    exported = (folder / f"{name}-exported/model.safetensors").read_bytes()
    assert exported == (whole / "export/model.safetensors").read_bytes()
    # What was half written is gone, the end is there.
    assert sorted(path.name for path in checkpoints.iterdir()) == ["last.ckpt", f"step-{STEPS:08d}.ckpt"]
