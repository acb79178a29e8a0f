"""recipes check: what is to be known before a long run: `check cluster`, the machines and the network between them."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

TAKES_OVERRIDES = True  # `--dotted.key value` is understood, as by fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One check a file: `check_<name>.py` with `add_check_arguments` and `run_check`."""
    checks = parser.add_subparsers(dest="check", required=True, metavar="CHECK")
    for file in sorted(Path(__file__).parent.glob("check_*.py")):
        module = import_module(f"recipes.{file.stem}")
        text = (module.__doc__ or "").partition("\n")[0]
        name = file.stem.removeprefix("check_")
        one = checks.add_parser(name, help=text, description=text, allow_abbrev=False)
        module.add_check_arguments(one)


def run(args: argparse.Namespace) -> int:
    status: int = import_module(f"recipes.check_{args.check}").run_check(args)
    return status
