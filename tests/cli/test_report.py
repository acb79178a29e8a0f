"""`recipes report`: from a run's name or folder to its page."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from recipes.__main__ import main


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of a recipe, of which the newer one was stopped; one that has logged nothing."""
    for number in (0, 1, 9, 10, 11):
        folder = tmp_path / "runs" / "sft" / "x" / str(number)
        folder.mkdir(parents=True)
        if number != 11:
            (folder / "metrics.csv").write_text(f"step,time,train/loss\n0,1.0,{number}.5\n")
    (tmp_path / "runs" / "sft" / "x" / "9" / "finished").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


@pytest.mark.parametrize("name", ["runs/sft/x/9", "sft/x/9"])
def test_makes_the_report_of_a_run(runs: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", name]) == 0
    assert capsys.readouterr().out == "runs/sft/x/9/report.html\n"
    text = (runs / "sft" / "x" / "9" / "report.html").read_text()
    assert "9.5" in text
    assert ">finished<" in text


def test_a_recipe_is_its_newest_run_that_has_logged_something(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "sft/x"]) == 0
    assert capsys.readouterr().out == "runs/sft/x/10/report.html\n"
    assert ">unfinished<" in (runs / "sft" / "x" / "10" / "report.html").read_text()


def test_compares_runs_in_a_file_of_its_own(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "sft/x/0", "sft/x/1", "--out", "compared/runs.html"]) == 0
    assert capsys.readouterr().out == "compared/runs.html\n"
    assert "<h1>2 runs</h1>" in (runs.parent / "compared" / "runs.html").read_text()
    assert main(["report", "sft/x/0", "sft/x/1"]) == 0
    assert (runs.parent / "report.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["sft/y"], "sft/y: no such run; there are: runs/sft/x/0, runs/sft/x/1, runs/sft/x/10, runs/sft/x/9"),
        (["sft/x/11"], "sft/x/11: runs/sft/x/11 has no metrics.csv"),
        (["sft/x/0", "runs/sft/x/0"], "the same run twice"),
        (["sft/x/0", "-o", "runs/sft/x/0/metrics.csv/report.html"], "cannot be written: "),
        (["sft/x/0", "--runs_dir", "none"], "sft/x/0: no such run; there are: none below none"),
    ],
)
@pytest.mark.usefixtures("runs")
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.usefixtures("runs")
def test_it_does_not_wait_for_torch() -> None:
    code = (
        "import sys; from recipes.__main__ import main; status = main(['report', 'sft/x']); "
        "sys.exit(status or any(name in sys.modules for name in ('torch', 'lightning', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
