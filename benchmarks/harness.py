"""Runs sides of a comparison in alternation, each in a process of its own, and reports medians and ratios.

This process imports neither torch nor a peer, so that it takes no part in what it measures. It refuses to report
unless every side ran, with the same parameters, trained on the same tokens in the same steps, and lost the same.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
Run = dict[str, Any]


@dataclass(frozen=True)
class Side:
    """One contestant.

    Attributes:
        name: in tables and file names.
        module: what `python -m` runs; it takes the arguments that follow, and --work, --out, --steps, --check.
        arguments: e.g. which side of that module.
        environment: variables added to those of this process.
        python: the interpreter (a peer may have a virtual environment of its own).
        same_rows: whether its steps hold the rows of the other sides (false for a peer's own packing).
        steps: optimizer steps that one repetition trains, the first ``warmup`` of them untimed.
    """

    name: str
    module: str
    arguments: tuple[str, ...]
    steps: int
    warmup: int
    environment: dict[str, str] = field(default_factory=dict)
    python: str = sys.executable
    same_rows: bool = True


class BenchmarkError(Exception):
    """A comparison that may not be reported."""


def run_side(side: Side, work: Path, *, tag: str, steps: int, check: bool = False, limit: float | None = None) -> Run:
    """One process of one side.

    Args:
        limit: seconds after which it is ended, with what it started.

    Raises:
        BenchmarkError: it failed, took too long, or trained fewer steps than asked for.
    """
    out = work / f"{side.name}-{tag}.json"
    out.unlink(missing_ok=True)
    command = [side.python, "-m", side.module, *side.arguments]
    command += ["--work", str(work), "--out", str(out), "--steps", str(steps)] + (["--check"] if check else [])
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"} | side.environment
    log = out.with_suffix(".log")
    status = run_logged(command, environment, log, limit)
    if status is None:
        raise BenchmarkError(f"{side.name} took more than {limit:.0f} s (log {log})")
    if status or not out.exists():
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise BenchmarkError(f"{side.name} failed (status {status}, log {log}):\n{tail}")
    data = json.loads(out.read_text())
    if len(data["ticks"]) != steps + 1:
        raise BenchmarkError(f"{side.name} made {len(data['ticks']) - 1} optimizer steps instead of {steps}")
    return data


def run_logged(command: list[str], environment: dict[str, str], log: Path, limit: float | None) -> int | None:
    """Exit status; None: it was ended because it took longer than ``limit`` seconds."""
    with log.open("w") as stream:
        # A session of its own: compilers and data workers that it started end with it.
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def check_sides(sides: list[Side], work: Path, *, steps: int = 4, tolerance: float = 0.02) -> dict[str, Run]:
    """Untimed runs that prove that the sides do the same work.

    Raises:
        BenchmarkError: parameters, their dtypes, the tokens of a step or the losses differ.
    """
    runs = {side.name: run_side(side, work, tag="check", steps=steps, check=True) for side in sides}
    first = runs[sides[0].name]
    for side in sides[1:]:
        run = runs[side.name]
        for fact in ("parameters", "parameter_dtypes", "threads", "torch"):
            if run["facts"][fact] != first["facts"][fact]:
                raise BenchmarkError(
                    f"{side.name} has {fact} {run['facts'][fact]}, {sides[0].name} {first['facts'][fact]}"
                )
        if not side.same_rows:
            continue
        if run["rows"] != first["rows"]:
            raise BenchmarkError(f"{side.name} trains on other tokens than {sides[0].name}: {run['rows']}")
        pairs = list(zip(run["losses"], first["losses"], strict=True))
        if len(pairs) != steps or any(abs(a - b) > tolerance * abs(b) for a, b in pairs):
            raise BenchmarkError(f"{side.name} and {sides[0].name} have other losses: {pairs}")
    return runs


def compare(sides: list[Side], work: Path, *, repetitions: int) -> dict[str, list[Run]]:
    """A B C A B C ...: at least three repetitions of all sides, so that slow drifts of the machine hit all alike."""
    if repetitions < 3:
        raise BenchmarkError(f"{repetitions} repetitions say nothing about the spread; at least 3")
    runs: dict[str, list[Run]] = {side.name: [] for side in sides}
    for repetition in range(repetitions):
        for side in sides:
            run = run_side(side, work, tag=str(repetition), steps=side.steps)
            if not run["facts"]["peak_reset"]:
                raise BenchmarkError("this system does not let a process reset its peak memory, which is compared")
            runs[side.name].append(measures(run, side.warmup))
            last = runs[side.name][-1]
            print(
                f"  {repetition + 1}/{repetitions} {side.name}: {last['wall']:.3f} s wall, {last['cpu']:.3f} s CPU, "
                f"peak {last['peak_mib']:.0f} MiB",
                flush=True,
            )
    for name in runs:
        eager = name.removesuffix("-compiled")
        if eager != name and eager in runs:  # compiled sides are not in the untimed check: they prove themselves here
            losses = [run["final_loss"] for run in runs[name] + runs[eager]]
            if max(losses) - min(losses) > 0.02 * min(losses):
                raise BenchmarkError(f"{name} and {eager} end with other losses: {losses}")
    return runs


def measures(run: Run, warmup: int) -> Run:
    """Seconds a step after the warm-up, and memory, of one process (of its device, where that is no CPU)."""
    first, last = run["ticks"][warmup], run["ticks"][-1]
    steps = len(run["ticks"]) - 1 - warmup
    facts = run["facts"]
    peak = facts.get("device_allocated_mib") or facts["peak_mib"]
    return {
        "wall": (last["wall"] - first["wall"]) / steps,
        "cpu": (last["cpu"] - first["cpu"]) / steps,
        "warmup_wall": first["wall"] - run["ticks"][0]["wall"],
        "peak_mib": peak,
        "growth_mib": peak if "device_allocated_mib" in facts else peak - facts["imported_mib"],
        "final_loss": run["losses"][-1],
        "timed_steps": steps,
    }


def summarize(runs: dict[str, list[Run]], baseline: str, unit: str, units_a_step: dict[str, float]) -> dict[str, Any]:
    """Medians and spreads of each side, and its ratios to ``baseline``, taken repetition by repetition."""
    table = {}
    for name, repetitions in runs.items():
        row: dict[str, Any] = {
            key: _spread([r[key] for r in repetitions])
            for key in ("wall", "cpu", "warmup_wall", "peak_mib", "growth_mib", "final_loss")
        }
        row[f"{unit}_per_second"] = _spread([units_a_step[name] / r["wall"] for r in repetitions])
        scale = units_a_step[name] / units_a_step[baseline]
        pairs = list(zip(repetitions, runs[baseline], strict=True))
        row["times_as_fast_wall"] = _spread([scale * b["wall"] / a["wall"] for a, b in pairs])
        row["times_as_fast_cpu"] = _spread([scale * b["cpu"] / a["cpu"] for a, b in pairs])
        row["times_peak_memory"] = _spread([a["peak_mib"] / b["peak_mib"] for a, b in pairs])
        row["times_memory_growth"] = _spread([a["growth_mib"] / b["growth_mib"] for a, b in pairs])
        table[name] = row
    return {"baseline": baseline, "unit": unit, "sides": table}


def _spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def print_table(summary: dict[str, Any]) -> str:
    """The summary as a Markdown table; ratios are to the baseline, brackets hold the smallest and the largest."""
    unit = summary["unit"]
    lines = [
        f"| side | {unit}/s | s/step wall | s/step CPU | x wall | x CPU | peak MiB | x peak | growth MiB | x growth |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in summary["sides"].items():
        cells = [
            f"{row[f'{unit}_per_second']['median']:.1f}",
            f"{row['wall']['median']:.3f}",
            f"{row['cpu']['median']:.3f}",
            *(_ratio(row[key]) for key in ("times_as_fast_wall", "times_as_fast_cpu")),
            f"{row['peak_mib']['median']:.0f}",
            _ratio(row["times_peak_memory"]),
            f"{row['growth_mib']['median']:.0f}",
            _ratio(row["times_memory_growth"]),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _ratio(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['min']:.2f}-{spread['max']:.2f})"


def machine() -> dict[str, Any]:
    """What the numbers were measured on, and with what."""
    packages = (
        *("torch", "lightning", "transformers", "trl", "accelerate", "datasets", "tokenizers", "litgpt"),
        *("peft", "bitsandbytes", "torchao", "deepspeed", "triton"),
    )
    versions = {}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    about = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    cpu = (
        f"{about.get('model name', platform.processor())}, family {about.get('cpu family')} model {about.get('model')}"
    )
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout if shutil.which("git") else ""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "bf16_instructions": [f for f in ("amx_bf16", "avx512_bf16") if f in about.get("flags", "").split()],
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.strip(),
        "threads": os.environ.get("OMP_NUM_THREADS", "default"),
    }


def write_report(name: str, report: dict[str, Any]) -> Path:
    """``benchmarks/results/NAME-DATE.json``."""
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
    path.write_text(json.dumps(report, indent=1))
    return path
