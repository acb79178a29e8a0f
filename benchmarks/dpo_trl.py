"""DPO on hh-rlhf: `recipes fit` and TRL's DPOTrainer, pairs a second and memory; on a GPU, where there is one.

``LITRECIPES_DATA=... python -m benchmarks.dpo_trl [lora] [--repetitions 3] [--sides recipe trl ...]``: of all weights,
with a copy as the reference, or of LoRA.
"""

from __future__ import annotations

import sys
from dataclasses import replace
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
    *("recipe-cached", "trl", "trl-no-checkpointing", "trl-cached"),
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

LORA = replace(
    COMPARISON,
    title="DPO with LoRA on hh-rlhf, at most 512 tokens, activations computed again: pairs a second against TRL",
    sides={name: side(name) for name in ("recipe-lora", "trl-lora")},
    default=("recipe-lora", "trl-lora"),
    baselines=("trl-lora",),
)

if __name__ == "__main__":
    if lora := sys.argv[1:2] == ["lora"]:
        del sys.argv[1]
    main(LORA if lora else COMPARISON, Path(__file__).parent)
