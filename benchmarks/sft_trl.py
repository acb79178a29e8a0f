"""Fine-tuning on dolly: `recipes fit` and TRL's SFTTrainer, rows a second and memory.

``LITRECIPES_DATA=... python -m benchmarks.sft_trl [--repetitions 3] [--sides recipe recipe-compiled trl ...]``
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import Side
from benchmarks.inputs import BATCH
from benchmarks.report import Comparison, main

WARMUP = 3
STEPS = 10


def side(name: str, **arguments: object) -> Side:
    return Side(name, "benchmarks.sft_sides", (name,), STEPS, WARMUP, **arguments)  # type: ignore[arg-type]


SIDES = {
    "recipe": side("recipe"),
    "recipe-compiled": side("recipe-compiled"),
    "plain": side("plain"),
    "plain-compiled": side("plain-compiled"),
    "trl": side("trl"),
    "trl-no-checkpointing": side("trl-no-checkpointing"),
    "trl-compiled": side("trl-compiled"),
}

COMPARISON = Comparison(
    name="sft",
    title=f"SFT on dolly, 33.7 M Llama, at most 512 tokens, bf16-mixed, batch {BATCH}: rows a second against TRL",
    sides=SIDES,
    default=("recipe", "trl", "recipe-compiled"),
    baselines=("trl",),
    unit="rows",
    units_a_step=BATCH,
)

if __name__ == "__main__":
    main(COMPARISON, Path(__file__).parent)
