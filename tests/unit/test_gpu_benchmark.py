"""The comparison on a GPU, with sides that only pretend: what fails is told, and does not stop the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu, harness
from benchmarks.gpu_cases import CASES, Case
from benchmarks.gpu_table import markdown

SIDE = """\
import json, sys, time
name, out, steps = sys.argv[1], sys.argv[sys.argv.index("--out") + 1], int(sys.argv[sys.argv.index("--steps") + 1])
if name.endswith("trl"):
    print("some progress")
    raise RuntimeError("CUDA out of memory | tried to allocate 2 GiB")
if name == "fsdp2":
    time.sleep(60)
ticks = [{"wall": 2.0 * i, "cpu": 2.0 * i, "peak": 1024.0} for i in range(steps + 1)]
facts = {"peak_mib": 2048.0, "peak_reset": True, "imported_mib": 512.0, "trained_parameters": 1234567,
         "throughput/mfu": 0.4321,
         "device_allocated_mib": 10240.0, "device_reserved_mib": 20480.0}
losses = [11.5 - 0.5 * i for i in range(steps)]
data = {"ticks": ticks, "rows": ["other" if name == "fsdp1" else "same"] * steps, "losses": losses, "facts": facts}
open(out, "w").write(json.dumps(data))
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose inputs are there, and sides that are the script above."""
    (tmp_path / "pretended_side.py").write_text(SIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    work = tmp_path / "work"
    (work / "model-8b").mkdir(parents=True)
    (work / "model-8b" / "config.json").write_text("{}")
    models = {case.model: {"batch": 2, "sequence": 64} for case in CASES.values()}
    (work / "settings.json").write_text(json.dumps({"tiny": True, "device": "cuda", "models": models}))

    def side_of(case: Case, python: str, device: str, work: Path) -> harness.Side:
        return harness.Side(case.name, "pretended_side", (case.name,), case.steps, case.warmup)

    monkeypatch.setattr(gpu, "side_of", side_of)
    monkeypatch.setattr(gpu, "installed", lambda module, python: module != "torchao")
    return work


def run(work: Path, *words: str) -> tuple[dict[str, Any], str]:
    assert gpu.main(["--work", str(work), "--tiny", *words]) == 0
    return json.loads((work / "gpu.json").read_text())["cases"], (work / "gpu.md").read_text()


def line_of(table: str, name: str) -> str:
    return next(line for line in table.splitlines() if line.startswith(f"| {name} |"))


def test_what_fails_is_told_and_the_others_run(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    names = "lora-8b-trl,lora-8b-recipe,lora-8b-litgpt,pretrain-1b-fp8"
    results, table = run(work, "--cases", names, "--out", str(out))
    assert {name: result["status"] for name, result in results.items()} == {
        "lora-8b-trl": "failed",
        "lora-8b-recipe": "done",
        "lora-8b-litgpt": "done",
        "pretrain-1b-fp8": "not installed",
    }
    # What the side said last, in one cell.
    failed = line_of(table, "lora-8b-trl")
    assert failed.endswith("| failed: RuntimeError: CUDA out of memory \\| tried to allocate 2 GiB |")
    assert "some progress" in (out / "lora-8b-trl.log").read_text()
    assert (out / "gpu.md").read_text() == table
    assert line_of(table, "pretrain-1b-fp8").endswith("| not installed: torchao |")
    done = line_of(table, "lora-8b-recipe")
    # 2 x 64 tokens in 2 s.
    assert "| 64 | 2.000 | 43.2% | 10.0 | 20.0 | 1,234,567 | 11.500, 7.000 |" in done
    assert line_of(table, "lora-8b-litgpt").endswith("| same rows, first loss 0.00% off lora-8b-recipe's |")


def test_a_case_ends_at_its_limit_and_others_are_compared(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "SHORTEST", 0.0)
    monkeypatch.setattr(gpu, "CASES", {name: _within(case, 1.0) for name, case in CASES.items()})
    results, table = run(work, "--cases", "single,fsdp2,fsdp1")
    assert results["fsdp2"]["status"] == "failed"
    assert "fsdp2 took more than 1 s" in line_of(table, "fsdp2")
    assert "other rows than single!" in line_of(table, "fsdp1")


def _within(case: Case, limit: float) -> Case:
    from dataclasses import replace

    return replace(case, limit=limit) if case.name == "fsdp2" else case


def test_a_second_run_goes_on_where_the_first_had_no_time(work: Path) -> None:
    results, table = run(work, "--cases", "single,zero1", "--seconds", "0")
    assert {result["note"] for result in results.values()} == {"no time was left"}
    assert line_of(table, "single").endswith("| not run: no time was left |")
    results, _ = run(work, "--cases", "single")
    before = results["single"]
    results, _ = run(work, "--seconds", "0")
    assert results["single"] == before
    assert set(results) == set(CASES)


def test_names_of_cases_and_of_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.cases_of("single,strategies")[:2] == ["single", "fsdp2"]
    assert gpu.cases_of("litgpt") == ["lora-8b-litgpt", "qlora-8b-litgpt"]
    with pytest.raises(SystemExit):
        gpu.main(["--work", "nowhere", "--cases", "nonsense"])
    assert "no case 'nonsense'" in capsys.readouterr().err


def test_a_missing_module_is_seen_in_whichever_python() -> None:
    assert gpu.installed("json", sys.executable)
    assert not gpu.installed("no_such_module_at_all", sys.executable)
    link = str(
        Path(sys.executable).parent / ".." / "bin" / Path(sys.executable).name
    )  # another name: asked, not looked up
    assert gpu.installed("json", link)
    assert not gpu.installed("no_such_module_at_all", link)


def test_an_empty_report_has_a_table() -> None:
    machine = {
        "date": "2026-01-02 03:04 UTC",
        "cpu": "a CPU",
        "gpu": None,
        "python": "3.12",
        "versions": {"torch": "2"},
    }
    text = markdown({"machine": machine, "tiny": False, "cases": {}})
    assert text.startswith("2026-01-02, no GPU: a CPU; Python 3.12, torch 2.")
