"""Whether reinforcement learning learns: GRPO and PPO on a task that a program checks, over several seeds.

``python -m benchmarks.rl [--seeds 1 2 3] [--work FOLDER]``: of each seed `recipes fit -c rl/letters-sft`, then
`rl/quickstart` and `rl/ppo` from its model; prints the share of right answers to held-out words before and after.
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
RECIPES = ("rl/quickstart", "rl/ppo")


def recipes(work: Path, *words: str) -> None:
    """`recipes WORDS` in a process of its own, in the folder ``work``."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with (work / "log").open("a") as log:
        done = subprocess.run(
            [sys.executable, "-m", "recipes", *words], cwd=work, env=environment, stderr=log, stdout=log
        )
    if done.returncode:
        raise SystemExit(f"benchmarks: recipes {' '.join(words)} failed (log {work / 'log'})")


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open(newline="") as stream:
        return [float(row[name]) for row in csv.DictReader(stream) if row.get(name)]


def one_seed(work: Path, seed: int) -> dict[str, tuple[float, float, float]]:
    """Of each recipe: the first reward in training, that of held-out words in the end, and the minutes it took."""
    work.mkdir(parents=True)
    recipes(work, "fit", "-c", "rl/letters-sft", "--seed_everything", str(seed))
    recipes(work, "export", "runs/rl/letters-sft/0", "runs/letters")
    found = {}
    for recipe in RECIPES:
        began = time.perf_counter()
        recipes(work, "fit", "-c", recipe, "--seed_everything", str(seed), "--trainer.log_every_n_steps", "1")
        run = work / "runs" / recipe / "0"
        minutes = (time.perf_counter() - began) / 60
        found[recipe] = (column(run, "rollout/exact_answer")[0], column(run, "val/exact_answer")[-1], minutes)
        before, after, _ = found[recipe]
        print(
            f"seed {seed} {recipe}: {before:.1%} at first, {after:.1%} of held-out words; {minutes:.1f} min", flush=True
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--work", type=Path, default=ROOT / "benchmarks" / "results" / "rl")
    options = parser.parse_args()
    found = [one_seed(options.work.absolute() / str(seed), seed) for seed in options.seeds]
    for recipe in RECIPES:
        first, last = (statistics.mean(seed[recipe][i] for seed in found) for i in (0, 1))
        print(f"{recipe}: {first:.1%} to {last:.1%}, mean of {len(found)} seeds")


if __name__ == "__main__":
    main()
