"""recipes launch: start a recipe on a cluster: slurm, torchrun, kubernetes, skypilot; --dry-run prints the job."""

from __future__ import annotations

import argparse
from importlib import import_module

TAKES_OVERRIDES = True  # `--dotted.key value` is understood, as by fit
LAUNCHERS = {
    "slurm": "submit to Slurm; saves, requeues and resumes when the time is over or the job is preempted",
    "torchrun": "run on this machine, or print the command of each node; restarts and resumes after a crash",
    "kubernetes": "a JobSet with its volumes, applied with kubectl",
    "skypilot": "a managed job of SkyPilot",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    launchers = parser.add_subparsers(dest="launcher", required=True, metavar="LAUNCHER")
    for name, text in LAUNCHERS.items():
        one = launchers.add_parser(name, help=text, description=text, allow_abbrev=False)
        import_module(f"recipes.launch_{name}").add_launcher_arguments(one)


def run(args: argparse.Namespace) -> int:
    status: int = import_module(f"recipes.launch_{args.launcher}").launch(args)
    return status
