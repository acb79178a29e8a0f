"""Every strategy trains what one process trains, and resumes what any other has saved.

The cells of a world size share one group of processes. With ``LITRECIPES_TABLE=1`` the
tables of ``llm_modules/strategies/README.md`` are written anew; without, they are checked to name every cell.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.strategy_cells import STEPS, STRATEGIES
from tests.invariance.gradients import write_rows
from tests.ranks import ROOT, run_program

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

README = ROOT / "llm_modules/strategies/README.md"
LOSS, WEIGHTS = 2e-6, 2e-5
WORLDS = (1, 2, 4)
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "lora_alpha": 8}}
JOBS: dict[str, dict[str, Any]] = {
    "next token": {"stage": "pretrain", "model": "llama"},
    "next token, tied": {"stage": "pretrain", "model": "qwen3"},
    "SFT with LoRA": {"stage": "sft", "model": "llama", "backbone": {"adapter": LORA}},
}
SAVED_AFTER = 3
PORTABLE = ("ddp", "fsdp2", "tp", "fsdp1", "zero1", "zero2", "zero3", "zero3-offload")
ALSO_PORTABLE = ("zero1", "zero3-offload")
"""With one job only: they keep what zero2 and zero3 keep."""

Cell = dict[str, Any]


class Launches:
    """Runs cells, all of a world size in one launch, and keeps their results."""

    def __init__(self, folder: Path, jobs: dict[str, dict[str, Any]] = JOBS) -> None:
        self.folder, self.jobs = folder, jobs
        self.program: tuple[str, ...] = ("tests.distributed.strategy_cells:main",)
        self.rows = {stage: str(write_rows(folder, stage, 40)) for stage in ("pretrain", "sft")}

    def cell(self, strategy: str, job: str, world: int, **more: Any) -> Cell:
        name = f"{strategy}-{world}-{job}" + "".join(f"-{Path(str(value)).stem}" for value in more.values())
        settings = self.jobs[job]
        rows, cache = self.rows[settings["stage"]], str(self.folder / "cache")
        return {"name": name, "job": job, "strategy": strategy, "rows": rows, "cache": cache, "world": world} | (
            settings | more
        )

    def run(self, cells: list[Cell], timeout: int = 900) -> dict[str, dict[str, Any]]:
        """Of cells of one world size."""
        folder, world = self.folder, cells[0]["world"]
        run_program(*self.program, cells, str(folder), folder=folder, ranks=world, timeout=timeout)
        return {cell["name"]: torch.load(self.folder / f"{cell['name']}.pt") for cell in cells}


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    return Launches(tmp_path_factory.mktemp("strategies"))


@pytest.fixture(scope="module")
def reference(launches: Launches) -> dict[str, dict[str, Any]]:
    """What one process trains, by job."""
    cells = [launches.cell("single", job, 1) for job in JOBS]
    results = launches.run(cells)
    return {cell["job"]: results[cell["name"]] for cell in cells}


def difference(result: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float]:
    """The largest differences of the losses (of the last steps, after a resume) and of the weights."""
    losses, wanted = result["losses"], expected["losses"][-len(result["losses"]) :]
    assert set(result["weights"]) == set(expected["weights"])
    weights = (
        float((value.float() - expected["weights"][name].float()).abs().max())
        for name, value in result["weights"].items()
    )
    return max(abs(a - b) for a, b in zip(losses, wanted, strict=True)), max(weights)


@pytest.mark.parametrize("world", WORLDS)
def test_every_strategy_trains_what_one_process_trains(
    world: int, launches: Launches, reference: dict[str, dict[str, Any]]
) -> None:
    """With accumulation, clipping, and counts of tokens that differ between micro-batches and ranks."""
    names = [name for name in STRATEGIES if (name == "single") == (world == 1) or name not in ("single", "ddp")]
    names = [name for name in names if world == 4 or name not in ON_FOUR]
    # Tied weights are one way to get it wrong, which needs two processes; the rows of the others are enough.
    jobs = [job for job in JOBS if world == 2 or not job.endswith("tied")]
    cells = [launches.cell(name, job, world) for name in names for job in jobs]
    results = launches.run(cells)
    table: dict[str, dict[str, str]] = {}
    for cell in cells:
        result = results[cell["name"]]
        row = table.setdefault(cell["strategy"], {})
        if "refused" in result:
            assert result["refused"].startswith("strategy"), result["refused"]
            assert "\n" not in result["refused"]
            assert (cell["strategy"], world) in REFUSED, result["refused"]
            row[cell["job"]] = "refused"
            continue
        assert (cell["strategy"], world) not in REFUSED
        assert len(result["losses"]) == STEPS
        expected = reference[cell["job"]]
        loss, weights = difference(result, expected)
        norm = max(abs(a - b) / b for a, b in zip(result["norms"], expected["norms"], strict=True))
        assert loss <= LOSS, cell
        assert weights <= WEIGHTS, cell
        assert norm <= 1e-5, cell
        assert result["tokens"] == pytest.approx(expected["tokens"], rel=1e-6), cell
        row[cell["job"]] = f"{loss:.0e}, {weights:.0e}"
    check_table(f"{world} process{'es' if world > 1 else ''}", table)


def test_every_strategy_validates_what_one_process_does(launches: Launches) -> None:
    """Without a fit before it, which strategies set the model up for in another way."""
    names = [name for name in STRATEGIES if name not in ("single", "tp-context", *ON_FOUR)]
    cells = [launches.cell(name, "SFT with LoRA", 2, validate=True) for name in names]
    results = launches.run(cells)
    alone = launches.cell("single", "SFT with LoRA", 1, validate=True)
    (expected,) = launches.run([alone])[alone["name"]]["losses"]
    assert expected > 1
    for cell in cells:
        assert results[cell["name"]].get("losses") == [pytest.approx(expected, abs=LOSS)], cell


ON_FOUR = ("fsdp2-context",)
"""On two it would be context."""

REFUSED = {("tp", 1), ("fsdp2-tp", 1), ("context", 1), ("tp-context", 1), ("tp-context", 2), ("tp", 4)}
"""No other device to share with; two heads of keys and values for four devices. (fsdp2-tp on two is tp.)"""


@pytest.mark.parametrize("job", ["next token", "SFT with LoRA"])
def test_what_one_strategy_saves_any_other_resumes(
    job: str, launches: Launches, reference: dict[str, dict[str, Any]]
) -> None:
    saved: dict[str, str] = {}
    portable = [name for name in PORTABLE if job == "next token" or name not in ALSO_PORTABLE]
    layouts = ((1, ("single",)), (2, portable), (4, ("fsdp2-tp",)))
    for world, names in layouts:
        cells = []
        for name in names:
            saved[name] = str(launches.folder / f"saved-{name}-{JOBS[job]['stage']}.ckpt")
            cells.append(launches.cell(name, job, world, steps=SAVED_AFTER, save=saved[name]))
        launches.run(cells)
    table: dict[str, dict[str, str]] = {}
    for world, names in layouts:
        cells = [launches.cell(name, job, world, resume=path) for name in names for path in saved.values()]
        results = launches.run(cells)
        for cell in cells:
            result = results[cell["name"]]
            assert len(result["losses"]) == STEPS - SAVED_AFTER, cell
            loss, weights = difference(result, reference[job])
            assert loss <= LOSS, cell
            assert weights <= WEIGHTS, cell
            source = next(name for name, path in saved.items() if path == cell["resume"])
            table.setdefault(source, {})[cell["strategy"]] = f"{loss:.0e}"
    check_table(f"resumed, {job}", table)


def check_table(title: str, table: dict[str, dict[str, str]]) -> None:
    """The README's table of this title has these rows and columns; its numbers are of the run that wrote it."""
    columns = sorted({column for row in table.values() for column in row}, key=str)
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(row.get(c, '') for c in columns)} |" for name, row in table.items()]
    begin, end = f"<!-- {title} -->\n", f"<!-- end {title} -->\n"
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(begin)
    before, tail = rest.split(end)
    if os.environ.get("LITRECIPES_TABLE"):
        README.write_text(head + begin + "\n".join(lines) + "\n" + end + tail, encoding="utf-8")
        return
    shape = [[cell == "refused" or bool(cell.strip()) for cell in line.split("|")] for line in lines]
    assert shape == [
        [cell == "refused" or bool(cell.strip()) for cell in line.split("|")] for line in before.splitlines()
    ]
    assert [line.split("|")[1] for line in lines] == [line.split("|")[1] for line in before.splitlines()]
    assert before.splitlines()[0] == lines[0]
