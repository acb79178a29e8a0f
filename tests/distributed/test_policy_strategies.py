"""Reinforcement learning under strategies, on two processes: the answers and weights of one process, and it goes on
exactly from inside of an iteration."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from callbacks.metrics_csv import MACHINE_COLUMNS
from recipes.__main__ import main
from tests.cli.policy_recipe import PPO, RECIPE
from tests.distributed.test_strategies import LOSS, WEIGHTS
from tests.ranks import run_command, said

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STEPS, MIDDLE = 8, 3
"""Two iterations of four steps; a checkpoint inside of the first."""
REWARDS = "def letters(answer):\n    return sum(map(ord, answer.text)) % 11 / 10\n"  # two answers seldom have the same
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": "all-linear"}}
LAST = f"runs/rl/0/checkpoints/step-{STEPS:08}.ckpt"
JOBS: dict[str, dict[str, Any]] = {
    "PPO": {"objective": {"class_path": PPO}},  # a critic, and a copy for reference
    "PPO, clipped": {"objective": {"class_path": PPO}, "clip": 0.02},
    "PPO with LoRA": {"objective": {"class_path": PPO}, "backbone": {"adapter": LORA}, "clip": 0.02},
    "LoRA": {
        "objective": {"class_path": "llm_modules.objectives.GRPO", "init_args": {"kl": 0.1}},
        "backbone": {"adapter": LORA},
    },
}
CELLS = [
    *((strategy, "PPO") for strategy in ("zero2", "fsdp2", "fsdp1", "zero3")),
    ("tp", "PPO, clipped"),
    ("fsdp1", "PPO with LoRA"),
    ("context", "LoRA"),
]
"""context: on FSDP2; ddp is in tests/invariance/test_policy_invariance.py."""
RESUMED = [(strategy, "PPO") for strategy in ("fsdp2", "fsdp1", "zero3")]
ANSWERS = ("zero3", "PPO")


def write_recipe(folder: Path, job: str) -> None:
    folder.mkdir()
    rows = [{"prompt": f"Say {i}.", "reference": i} for i in range(20)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "own_rewards.py").write_text(REWARDS)
    config = yaml.safe_load(RECIPE)
    arguments = config["model"]["init_args"]
    arguments["backbone"]["config"]["num_key_value_heads"] = 2
    arguments["backbone"] |= JOBS[job].get("backbone", {})
    arguments["rewards"][0]["init_args"]["function"] = "own_rewards.letters"
    arguments["objective"] = JOBS[job]["objective"]
    arguments["optimizer"]["init_args"]["lr"] = 1e-3
    config["data"]["init_args"]["cache_dir"] = "cache"
    config["trainer"] |= {"max_steps": STEPS, "val_check_interval": 4, "gradient_clip_val": JOBS[job].get("clip")}
    config["checkpoint"] = {"every_n_steps": MIDDLE, "keep_last": 9}
    (folder / "rl.yaml").write_text(yaml.safe_dump(config))


def steps(folder: Path, run: int = 0) -> list[dict[str, float]]:
    with (folder / f"runs/rl/{run}/metrics.csv").open(newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v and k not in MACHINE_COLUMNS} for row in csv.DictReader(file)]
    return [{k: v for k, v in row.items() if not k.startswith(("throughput/", "memory/"))} for row in rows]


def checkpoint(folder: Path, step: int, run: int = 0) -> dict[str, Any]:
    file = folder / f"runs/rl/{run}/checkpoints/step-{step:08}.ckpt"
    saved: dict[str, Any] = torch.load(file, weights_only=True)
    return saved


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each job's folder, trained by one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        for job in JOBS:
            write_recipe(folder / job, job)
            patch.chdir(folder / job)
            patch.syspath_prepend(str(folder / job))
            patch.delitem(sys.modules, "own_rewards", raising=False)
            assert main(["fit", "-c", "rl"]) == 0
            if job == ANSWERS[1]:
                assert main(["predict", "-c", "rl", "--ckpt_path", LAST]) == 0
    return {job: folder / job for job in JOBS}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the cells' folders, each trained by two processes; run 1 goes on from the middle of run 0."""
    folder = tmp_path_factory.mktemp("both")
    for strategy, job in CELLS:
        place = folder / f"{strategy}-{job}"
        write_recipe(place, job)
        words = ["-c", "rl", "-c", f"strategies/{strategy}", "--trainer.devices", "2"]
        words += ["--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "8"]
        runs = [["fit", *words]]
        if (strategy, job) in RESUMED:
            runs.append(["fit", *words, "--ckpt_path", f"runs/rl/0/checkpoints/step-{MIDDLE:08}.ckpt"])
        if (strategy, job) == ANSWERS:
            runs.append(["predict", *words, "--ckpt_path", LAST])
        for run in runs:
            assert run_command(place, run) == [0, 0], said(place)
    return folder


@pytest.mark.parametrize(("strategy", "job"), CELLS)
def test_two_processes_train_what_one_does(strategy: str, job: str, alone: dict[str, Path], both: Path) -> None:
    one, two = alone[job], both / f"{strategy}-{job}"
    assert (two / "runs/rl/0/export").is_dir(), said(two)
    for step in (MIDDLE, 2 * MIDDLE):  # inside of both iterations
        expected, found = (checkpoint(place, step)["litrecipes"]["policy"]["rollouts"] for place in (one, two))
        assert found["answer_ids"].tolist() == expected["answer_ids"].tolist()
        assert torch.equal(found["reward"], expected["reward"])
    for a, b in zip(steps(one), steps(two), strict=True):
        assert a.keys() - ({"train/grad_norm_critic"} if strategy in ("zero2", "zero3") else set()) == b.keys()
        norms = {name for name in a.keys() & b.keys() if name.startswith("train/grad_norm")}
        for name in norms if JOBS[job].get("clip") else ():
            assert a[name] == pytest.approx(b[name], rel=1e-3), name
        for name in {"train/loss", "val/loss", "rollout/reward", "rollout/tokens"} & a.keys():
            assert a[name] == pytest.approx(b[name], abs=LOSS), name
    expected, found = (checkpoint(place, STEPS)["state_dict"] for place in (one, two))
    assert expected.keys() == found.keys()
    assert max(float((expected[name] - found[name]).abs().max()) for name in expected) <= WEIGHTS


@pytest.mark.parametrize(("strategy", "job"), RESUMED)
def test_it_goes_on_exactly_inside_of_an_iteration(strategy: str, job: str, both: Path) -> None:
    folder = both / f"{strategy}-{job}"
    assert (folder / "runs/rl/1/export").is_dir(), said(folder)
    whole, resumed = ([row for row in steps(folder, run) if "train/loss" in row] for run in (0, 1))
    assert resumed == whole[MIDDLE:]
    expected, found = (checkpoint(folder, STEPS, run)["state_dict"] for run in (0, 1))
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_two_processes_predict_what_one_does(alone: dict[str, Path], both: Path) -> None:
    expected, found = (
        sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda row: row["row"])
        for place in (alone[ANSWERS[1]], both / "-".join(ANSWERS))
        for file in place.glob("runs/rl/*/predictions.jsonl")
    )
    assert len(found) > 1
    assert found == expected
