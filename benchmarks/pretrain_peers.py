"""Pre-training on the books: `recipes fit`, transformers' Trainer and litgpt's pretrain, tokens a second and memory.

``LITRECIPES_DATA=... python -m benchmarks.pretrain_peers [--repetitions 3] [--sides recipe trainer ...]``

litgpt needs other versions of the libraries: ``make -C benchmarks litgpt`` builds its environment.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.harness import Side
from benchmarks.inputs import BATCH, SEQUENCE
from benchmarks.report import Comparison, main

WARMUP = 3
STEPS = 10
HERE = Path(__file__).parent
LITGPT_PYTHON = str(HERE / ".venv-litgpt" / "bin" / "python")


def side(name: str) -> Side:
    return Side(name, "benchmarks.pretrain_sides", (name,), STEPS, WARMUP)


def litgpt(name: str, **environment: str) -> Side:
    return Side(name, "benchmarks.pretrain_litgpt", (), STEPS, WARMUP, environment, LITGPT_PYTHON)


SIDES = {
    "recipe": side("recipe"),
    "trainer": side("trainer"),
    "litgpt": litgpt("litgpt", TORCHDYNAMO_DISABLE="1"),
    "recipe-compiled": side("recipe-compiled"),
    "trainer-compiled": side("trainer-compiled"),
    "litgpt-compiled": litgpt("litgpt-compiled"),
    "plain": side("plain"),
    "plain-compiled": side("plain-compiled"),
}

COMPARISON = Comparison(
    name="pretrain",
    title=f"Pre-training on the books, 33.7 M Llama, rows of {SEQUENCE}, bf16-mixed, batch {BATCH}: tokens a second",
    sides=SIDES,
    default=("recipe", "trainer", "litgpt", "recipe-compiled", "trainer-compiled", "litgpt-compiled"),
    baselines=("trainer", "litgpt", "trainer-compiled", "litgpt-compiled"),
    unit="tokens",
    units_a_step=BATCH * SEQUENCE,
)

if __name__ == "__main__":
    main(COMPARISON, HERE)
