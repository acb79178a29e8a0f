"""Whether reinforcement learning learns, over several seeds, on a task that a program checks.

``python -m benchmarks.rl [--seeds 1 2 3] [--runs grpo ppo safe reward-only safe-models ...] [--work FOLDER]``: of each
seed `recipes fit -c rl/letters-sft`, unless it is there, then from its model `rl/quickstart` (GRPO), `rl/ppo`,
`safety/safe-rlhf-quickstart`, and that one with a multiplier that stays next to nothing: PPO on the reward alone, whose
cost is measured. The runs named ``...-models`` are of `safety/safe-rlhf-models`, whose two models are trained before,
unless they are there; ``safe-models-lora`` trains adapters, of the policy and of its critics. Printed are the share of
right answers and of vowels, and what the models say of them, in the first iteration and of held-out words.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
SAFE = "safety/safe-rlhf-quickstart"
MODELS = "safety/safe-rlhf-models"
REWARD_ONLY = ["--model.objective.multiplier", "1e-8", "--model.objective.multiplier_rate", "0"]
RUNS: dict[str, list[str]] = {
    "grpo": ["rl/quickstart"],
    "ppo": ["rl/ppo"],
    "safe": [SAFE],
    "reward-only": [SAFE, *REWARD_ONLY],
    "safe-models": [MODELS],
    "safe-models-lora": [MODELS, "-c", "adapters/lora", "--model.optimizer.init_args.lr", "3e-3"],
    "reward-only-models": [MODELS, *REWARD_ONLY],
}
COLUMNS = [
    f"{stage}/{name}"
    for name in ("exact_answer", "vowel", "reward_model", "cost_model")
    for stage in ("rollout", "val")
]


def recipes(work: Path, *words: str) -> None:
    """`recipes WORDS` in a process of its own, in the folder ``work``."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "recipes", *words]
    with (work / "log").open("a") as log:
        done = subprocess.run(command, cwd=work, env=environment, stderr=log, stdout=log)
    if done.returncode:
        raise SystemExit(f"benchmarks: recipes {' '.join(words)} failed (log {work / 'log'})")


def one_run(work: Path, name: str, seed: int) -> dict[str, float]:
    """The first values in training (``rollout/...``) and the last of held-out words (``val/...``), and minutes."""
    recipe, *words = RUNS[name]
    began = time.perf_counter()
    common = ["--seed_everything", str(seed), "--trainer.log_every_n_steps", "1", "--runs_dir", name]
    recipes(work, "fit", "-c", recipe, *words, *common)
    with (work / name / recipe / "0" / "metrics.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    found = {"minutes": (time.perf_counter() - began) / 60}
    for column in COLUMNS:
        if values := [float(row[column]) for row in rows if row.get(column)]:
            found[column] = values[0] if column.startswith("rollout/") else values[-1]
    print(f"seed {seed} {name}: {', '.join(f'{key} {value:.3f}' for key, value in found.items())}", flush=True)
    return found


def one_seed(work: Path, names: list[str], seed: int) -> dict[str, dict[str, float]]:
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "runs" / "letters").is_dir():
        recipes(work, "fit", "-c", "rl/letters-sft", "--seed_everything", str(seed))
        recipes(work, "export", "runs/rl/letters-sft/0", "runs/letters")
    for kind in ("reward", "cost") if any("models" in name for name in names) else ():
        if not (work / "runs" / f"letters-{kind}").is_dir():
            recipes(work, "fit", "-c", f"safety/letters-{kind}", "--seed_everything", str(seed))
            recipes(work, "export", f"runs/safety/letters-{kind}/0", f"runs/letters-{kind}")
    return {name: one_run(work, name, seed) for name in names}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS))
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "results" / "rl")
    options = parser.parse_args()
    found = [one_seed(options.work.absolute() / str(seed), options.runs, seed) for seed in options.seeds]
    for name in options.runs:
        means = {key: statistics.mean(seed[name][key] for seed in found) for key in found[0][name]}
        print(f"{name}, mean of {len(found)} seeds: {', '.join(f'{key} {value:.3f}' for key, value in means.items())}")


if __name__ == "__main__":
    main()
