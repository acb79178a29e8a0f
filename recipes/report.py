"""recipes report: makes report.html of a run again, or compares the curves of several runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recipes.errors import UserError
from recipes.run_folder import RunFolder
from recipes.yaml_tree import display


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a run's folder, or a recipe's name below --runs_dir for its newest run (NAME/N for run N)",
    )
    parser.add_argument(
        "-o", "--out", metavar="FILE", help="default: report.html in the run's folder, or here if several"
    )
    parser.add_argument("--runs_dir", default="runs", metavar="FOLDER", help="folder of the runs (default: runs)")


def run(arguments: argparse.Namespace) -> int:
    """Writes the page and says where it is."""
    from callbacks.report_data import read_run
    from callbacks.report_page import render
    from callbacks.run_files import write_whole

    folders = [find_run_folder(name, Path(arguments.runs_dir)) for name in arguments.runs]
    if len(set(folders)) < len(folders):
        raise UserError(f"recipes report: {' '.join(arguments.runs)}: the same run twice")
    page = render([read_run(folder, status=status_of(folder)) for folder in folders])
    if arguments.out is not None:
        out = Path(arguments.out)
        out = out / "report.html" if out.is_dir() else out
    else:
        out = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    try:
        write_whole(out, page)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written: {error.strerror}") from error
    print(display(out), file=sys.stdout)
    return 0


def find_run_folder(name: str, runs_dir: Path) -> Path:
    """A run's folder by its path, or by its recipe's name.

    Raises:
        UserError: there is none.
    """
    for path in (Path(name).expanduser(), runs_dir / name):
        if (path / "metrics.csv").is_file():
            return path.resolve()
        numbered = [folder for folder in path.iterdir() if folder.name.isdigit()] if path.is_dir() else []
        logged = [folder for folder in numbered if (folder / "metrics.csv").is_file()]
        if logged:
            return max(logged, key=lambda folder: int(folder.name)).resolve()
        if path.is_dir():
            raise UserError(
                f"{name}: {display(path)} has no metrics.csv: not a run, or one that has logged nothing yet"
            )
    there = sorted({display(file.parent) for file in runs_dir.rglob("metrics.csv")}) if runs_dir.is_dir() else []
    raise UserError(f"{name}: no such run; there are: {', '.join(there[-10:]) or f'none below {display(runs_dir)}'}")


def status_of(folder: Path) -> str:
    """finished, running or unfinished."""
    run_of = RunFolder(folder, folder.parent.name)
    if run_of.finished:
        return "finished"
    return "running" if run_of.running() else "unfinished"
