"""DPO on hh-rlhf: `recipes fit` and TRL's DPOTrainer, pairs a second and memory; on a GPU, where there is one.

``LITRECIPES_DATA=... python -m benchmarks.dpo_trl [--repetitions 3] [--sides recipe recipe-apart trl ...]``
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import Side
from benchmarks.inputs import BATCH
from benchmarks.report import Comparison, main

WARMUP = 2
STEPS = 7


def side(name: str) -> Side:
    return Side(name, "benchmarks.dpo_sides", (name,), STEPS, WARMUP)


NAMES = (
    *("recipe", "recipe-apart", "recipe-compiled", "recipe-checkpointing", "recipe-checkpointing-compiled"),
    *("recipe-cached", "recipe-lora", "trl", "trl-no-checkpointing", "trl-cached", "trl-lora"),
)

COMPARISON = Comparison(
    name="dpo",
    title="DPO on hh-rlhf, at most 512 tokens, a copy of the model as the reference: pairs a second against TRL",
    sides={name: side(name) for name in NAMES},
    default=("recipe", "trl", "recipe-apart"),
    baselines=("trl",),
    unit="pairs",
    units_a_step=BATCH,
)

if __name__ == "__main__":
    main(COMPARISON, Path(__file__).parent)
