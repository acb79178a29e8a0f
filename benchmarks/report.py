"""From a comparison to its table: prepare, check, repeat, summarize, write."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import harness
from benchmarks.inputs import BATCH, data_folder


@dataclass(frozen=True)
class Comparison:
    """Who is compared in what.

    Attributes:
        name: of the work folder, the report, and the part of ``prepare.py`` that makes the inputs.
        sides: all there are; ``default`` names those that run unless told otherwise, ours first.
        baselines: sides that the others' ratios are taken to, where they ran; one table each.
        unit: what is counted; ``units_a_step`` of them in an optimizer step of ``BATCH`` rows.
        check_steps: of the untimed runs.
    """

    name: str
    title: str
    sides: dict[str, harness.Side]
    default: tuple[str, ...]
    baselines: tuple[str, ...]
    unit: str
    units_a_step: int
    check_steps: int = 4


def main(comparison: Comparison, here: Path) -> None:
    parser = argparse.ArgumentParser(description=comparison.title)
    parser.add_argument("--sides", nargs="+", choices=comparison.sides, default=comparison.default)
    parser.add_argument("--repetitions", type=int, default=5, help="of each side, in alternation (at least 3)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, the same for all sides")
    parser.add_argument("--work", type=Path, default=here / "results" / "work", help="folder for inputs and logs")
    parser.add_argument("--prepared", action="store_true", help="--work holds the inputs, though maybe no weights")
    options = parser.parse_args()
    if not options.prepared:
        data_folder()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    work = (options.work / comparison.name).absolute()
    work.mkdir(parents=True, exist_ok=True)
    began, machine = time.perf_counter(), harness.machine()
    sides = [comparison.sides[name] for name in options.sides]
    try:
        print(f"{comparison.title}\n{machine}\npreparing", flush=True)
        prepare = [sys.executable, "-m", "benchmarks.prepare"]
        prepare += ["weights" if options.prepared else comparison.name, str(work)]
        subprocess.run(prepare, cwd=harness.ROOT, check=True, stderr=subprocess.DEVNULL)
        print("checking that all sides do the same work", flush=True)
        checks = harness.check_sides(
            [s for s in sides if not s.name.endswith("-compiled")], work, steps=comparison.check_steps
        )
        print(f"measuring, {options.repetitions} repetitions", flush=True)
        runs = harness.compare(sides, work, repetitions=options.repetitions)
    except (harness.BenchmarkError, subprocess.CalledProcessError) as error:
        raise SystemExit(f"benchmarks: nothing to report: {error}") from error
    batch = json.loads((work / "settings.json").read_text())["batch"]
    units = dict.fromkeys(runs, comparison.units_a_step * batch / BATCH)
    summaries = [
        harness.summarize(runs, baseline, comparison.unit, units)
        for baseline in comparison.baselines
        if baseline in runs
    ]
    steps, warmup = sides[0].steps, sides[0].warmup
    print(f"\nmedian (smallest-largest) of {options.repetitions} repetitions, {steps - warmup} timed steps each after "
          f"{warmup} untimed ones; x: as many times as the baseline")  # fmt: skip
    for summary in summaries:
        print(f"\nbaseline {summary['baseline']}\n\n{harness.print_table(summary)}")
    facts = {name: run["facts"] for name, run in checks.items()}
    rows = {name: run["rows"] for name, run in checks.items()}
    losses = {name: run["losses"] for name, run in checks.items()}
    report = {
        "title": comparison.title, "machine": machine, "summaries": summaries, "runs": runs,
        "checks": {"facts": facts, "rows": rows, "losses": losses}, "seconds": time.perf_counter() - began,
    }  # fmt: skip
    print(f"\n{harness.write_report(comparison.name, report)}  ({report['seconds'] / 60:.1f} minutes)")
