"""GRPO on gsm8k: `recipes fit` and TRL's GRPOTrainer, answers a second, generation included, and memory.

``LITRECIPES_DATA=... python -m benchmarks.grpo_trl [--repetitions 3] [--sides recipe trl ...]``
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.grpo_sides import GROUP
from benchmarks.harness import Side
from benchmarks.inputs import BATCH
from benchmarks.report import Comparison, main

WARMUP = 1
STEPS = 3


def side(name: str) -> Side:
    # What is sampled differs, so steps hold other tokens.
    return Side(name, "benchmarks.grpo_sides", (name,), STEPS, WARMUP, same_rows=False)


COMPARISON = Comparison(
    name="grpo",
    title="GRPO on gsm8k, 8 answers of 128 tokens to a prompt, an update each: answers a second against TRL",
    sides={name: side(name) for name in ("recipe", "recipe-static", "trl", "trl-no-checkpointing")},
    default=("recipe", "trl", "trl-no-checkpointing"),
    baselines=("trl", "trl-no-checkpointing"),
    unit="answers",
    units_a_step=GROUP * BATCH,
    check_steps=1,
)

if __name__ == "__main__":
    main(COMPARISON, Path(__file__).parent)
