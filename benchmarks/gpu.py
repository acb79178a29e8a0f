"""What one GPU says: pre-training, fine-tuning of 8 B beside TRL and litgpt, strategies. One command, a few minutes.

``python -m benchmarks.gpu --work FOLDER [--out FOLDER] [--cases a,b] [--seconds 540] [--tiny] [--device cpu]``

Each case is a process with a time limit of its own. After each, ``gpu.json`` and ``gpu.md`` are written, so that a run
that is cut off leaves what it had; a later one with the same ``--work`` goes on with the cases that are not done. It
needs no data.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.gpu_cases import CASES, Case
from benchmarks.gpu_table import markdown

HERE = Path(__file__).parent
LITGPT_PYTHON = HERE / ".venv-litgpt" / "bin" / "python"
SHORTEST = 20.0
"""Seconds left below which no case is begun."""

Result = dict[str, Any]


def main(words: list[str] | None = None) -> int:
    options = parser().parse_args(words)
    began = time.perf_counter()
    work, out = options.work.absolute(), (options.out or options.work).absolute()
    for folder in (work, out):
        folder.mkdir(parents=True, exist_ok=True)
    report = load(work / "gpu.json", options.tiny, options.device)
    report["machine"] = harness.machine() | {"gpu": gpu_name()}
    done = [name for name, result in report["cases"].items() if result["status"] == "done"]
    chosen = [CASES[name] for name in options.cases or CASES if options.cases or name not in done]

    def left() -> float:
        return options.seconds - (time.perf_counter() - began)

    def save() -> None:
        for folder in {work, out}:
            (folder / "gpu.json").write_text(json.dumps(report, indent=1))
            (folder / "gpu.md").write_text(markdown(report))

    save()
    if not ready(work, options, chosen, left):
        return 1
    for case in chosen:
        result = run_case(case, work, options, left())
        report["cases"][case.name] = result
        print(f"{case.name}: {result['status']} {result.get('note', '')} ({result['seconds']:.0f} s)", flush=True)
        keep_log(work, out, case, result)
        save()
    print(f"\n{markdown(report)}\n{time.perf_counter() - began:.0f} s")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for weights (16 GB), runs and logs")
    parser.add_argument("--out", type=Path, help="folder that also gets gpu.json, gpu.md and the logs of failed cases")
    parser.add_argument("--cases", type=cases_of, help=f"of {', '.join(CASES)}; default: all not done")
    parser.add_argument("--seconds", type=float, default=1e9, help="no case goes on for longer, counted from now")
    parser.add_argument("--tiny", action="store_true", help="models of no size: does everything run?")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--litgpt", type=Path, help="interpreter that has litgpt; default: benchmarks/.venv-litgpt's")
    return parser


def cases_of(text: str) -> list[str]:
    """The names in a list with commas; ``8b``, ``lora`` and the like stand for all cases whose names hold them."""
    names = [name for word in text.split(",") for name in ([word] if word in CASES else _holding(word))]
    return list(dict.fromkeys(names))


def _holding(word: str) -> list[str]:
    if not (names := [name for name, case in CASES.items() if word in name.split("-") or word == case.group]):
        raise argparse.ArgumentTypeError(f"no case {word!r}; there are {', '.join(CASES)}")
    return names


def load(path: Path, tiny: bool, device: str) -> dict[str, Any]:
    """What an earlier run of the same kind has left."""
    if path.exists():
        earlier = json.loads(path.read_text())
        if (earlier["tiny"], earlier["device"]) == (tiny, device):
            return earlier
    return {"tiny": tiny, "device": device, "cases": {}}


def ready(work: Path, options: argparse.Namespace, chosen: list[Case], left: Callable[[], float]) -> bool:
    """Writes the inputs, where they are not there yet; without weights of 8 B only the other cases run."""
    kind = {"tiny": options.tiny, "device": options.device}
    settings = work / "settings.json"
    there = settings.exists() and {key: json.loads(settings.read_text())[key] for key in kind} == kind
    if not there:
        shutil.rmtree(work / "model-8b", ignore_errors=True)
        if (problem := prepare("texts", work, options, min(120, left()))) is not None:
            print(f"the inputs could not be made: {problem}", file=sys.stderr)
            return False
    weights = work / "model-8b" / "config.json"  # written last
    if any(case.model.startswith("8b") for case in chosen) and not weights.exists():
        problem = prepare("weights", work, options, min(180, left()))
        print(f"weights of 8 B: {problem or 'written'}", flush=True)
    return True


def prepare(what: str, work: Path, options: argparse.Namespace, limit: float) -> str | None:
    """One part of ``gpu_inputs``; what went wrong, or None."""
    command = [sys.executable, "-m", "benchmarks.gpu_inputs", what, "--work", str(work), "--device", options.device]
    log = work / f"{what}.log"
    status = harness.run_logged(command + ["--tiny"] * options.tiny, dict(os.environ), log, limit)
    if status is None:
        return f"took more than {limit:.0f} s"
    return last_line(log.read_text(errors="replace")) if status else None


def run_case(case: Case, work: Path, options: argparse.Namespace, left: float) -> Result:
    """Runs it, unless it cannot be run; never raises for what a side does."""
    python = interpreter(case, options.litgpt)
    if absent := [name for name in case.needs if not installed(name, python)]:
        return {"status": "not installed", "note": ", ".join(absent), "seconds": 0.0}
    if options.device == "cpu" and not case.on_cpu:
        return {"status": "not run", "note": "needs a GPU", "seconds": 0.0}
    if left < SHORTEST:
        return {"status": "not run", "note": "no time was left", "seconds": 0.0}
    for lock in work.glob("extensions/**/lock"):
        lock.unlink()  # of a case that was ended while it compiled: the next would wait for it for ever
    began = time.perf_counter()
    try:
        run = harness.run_side(
            side_of(case, python, options.device, work),
            work,
            tag="gpu",
            steps=case.steps,
            check=True,
            limit=min(case.limit * (5 if options.device == "cpu" else 1), left),
        )
        result = {"status": "done"} | measured(case, run, work)
    except harness.BenchmarkError as error:
        first, rest = str(error).split("\n", 1) if "\n" in str(error) else (str(error), "")
        result = {"status": "failed", "note": last_line(rest) or first}
    return result | {"seconds": time.perf_counter() - began}


def side_of(case: Case, python: str, device: str, work: Path) -> harness.Side:
    module = "benchmarks.gpu_litgpt" if case.kind == "litgpt" else "benchmarks.gpu_sides"
    environment = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
    environment["TORCH_EXTENSIONS_DIR"] = str(work / "extensions")
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return harness.Side(case.name, module, (case.name,), case.steps, case.warmup, environment, python)


def interpreter(case: Case, given: Path | None) -> str:
    """The python that has a side's libraries: litgpt's may be another than ours."""
    if case.kind != "litgpt":
        return sys.executable
    return str(given or (LITGPT_PYTHON if LITGPT_PYTHON.exists() else sys.executable))


def installed(module: str, python: str) -> bool:
    if python == sys.executable:
        return importlib.util.find_spec(module) is not None
    command = [python, "-c", f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"]
    return subprocess.run(command, capture_output=True).returncode == 0


def measured(case: Case, run: harness.Run, work: Path) -> Result:
    """What is kept of a run."""
    model = json.loads((work / "settings.json").read_text())["models"][case.model]
    times, facts = harness.measures(run, case.warmup), run["facts"]
    tokens = model["batch"] * model["sequence"]
    return {
        "seconds_a_step": times["wall"],
        "tokens_a_step": tokens,
        "tokens_per_second": tokens / times["wall"],
        "mfu": facts.get("throughput/mfu"),
        "device_allocated_gib": _gib(facts.get("device_allocated_mib")),
        "device_reserved_gib": _gib(facts.get("device_reserved_mib")),
        "host_peak_gib": _gib(facts["peak_mib"] if facts["peak_reset"] else None),
        "first_loss": run["losses"][0],
        "final_loss": run["losses"][-1],
        "rows": run["rows"],
        "facts": facts,
    }


def _gib(mib: float | None) -> float | None:
    return None if mib is None else mib / 1024


def last_line(text: str) -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Refused)\b", line)]
    return (errors or lines or [""])[-1][:300]


def keep_log(work: Path, out: Path, case: Case, result: Result) -> None:
    """The log of a case that failed, beside the results; its last part, where it is long."""
    log = work / f"{case.name}-gpu.log"
    if result["status"] == "failed" and log.exists():
        (out / f"{case.name}.log").write_text(log.read_text(errors="replace")[-200_000:])


def gpu_name() -> str | None:
    """The card and its driver, as nvidia-smi says; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    said = subprocess.run(command, capture_output=True, text=True)
    return said.stdout.strip().splitlines()[0] if not said.returncode and said.stdout.strip() else None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the case at work ends with this process
    sys.exit(main())
