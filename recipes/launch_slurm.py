"""A recipe as a batch script of Slurm: one task a device; saved, requeued and resumed when its time is over."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys

from recipes.errors import UserError
from recipes.launch_plan import Plan, Shell, add_common_arguments, folded, make_plan, shell_line

JOB = Shell('"slurm-$SLURM_JOB_ID"')  # the same after a requeue
_OWN = {
    "nodes": "--nodes",
    "ntasks-per-node": "--devices",
    "ntasks": "--nodes and --devices",
    "signal": "--save-before",
}


def add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    ask = parser.add_argument_group("what is asked of Slurm")
    ask.add_argument("--partition", metavar="NAME", help="the queue")
    ask.add_argument("--account", metavar="NAME", help="who pays")
    ask.add_argument("--time", metavar="D-HH:MM:SS", help="longest time of one start; the job goes on in the next")
    ask.add_argument("--gpus", type=int, metavar="N", help="GPUs of a node (default: as many as --devices; 0: none)")
    ask.add_argument("--cpus", type=int, metavar="N", help="cores of a task")
    ask.add_argument("--mem", metavar="SIZE", help="memory of a node, such as 200G")
    ask.add_argument("--constraint", metavar="FEATURE", help="features that a node must have")
    ask.add_argument("--sbatch", action="append", default=[], metavar="KEY=VALUE", help="any other option of sbatch")
    ask.add_argument(
        "--save-before", type=int, default=90, metavar="S", help="seconds before the end to save at (default: 90)"
    )
    where = parser.add_argument_group("where Python is (default: the one that runs this, at the same path)")
    where.add_argument("--module", action="append", default=[], metavar="NAME", help="environment module to load")
    where.add_argument("--venv", metavar="FOLDER", help="virtual environment to activate")
    where.add_argument("--container", metavar="IMAGE", help="image for srun --container-image (pyxis)")
    where.add_argument("--container-mounts", metavar="LIST", help="folders for srun --container-mounts")
    where.add_argument("--workdir", default=None, metavar="FOLDER", help="where the job works (default: here)")


def launch(args: argparse.Namespace) -> int:
    plan = make_plan(args, os.path.abspath(args.workdir or os.getcwd()))
    text = batch_script(plan, args)
    if args.dry_run:
        print(text, end="")
        return 0
    print(plan.summary(), file=sys.stderr)
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise UserError("sbatch: not found on this machine; --dry-run prints the script, to submit where Slurm is")
    done = subprocess.run([sbatch, "--parsable"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"sbatch: {' '.join(done.stderr.split()) or f'ended with status {done.returncode}'}")
    number = done.stdout.strip().split(";")[0]
    print(f"job {number}; squeue -j {number} shows it, scancel {number} ends it after a checkpoint", file=sys.stderr)
    print(number)
    return 0


def batch_script(plan: Plan, args: argparse.Namespace) -> str:
    """The whole script."""
    lines = ["#!/bin/bash", *(_directive(key, value) for key, value in _options(plan, args).items())]
    lines += ["set -euo pipefail"]
    if args.module:
        lines.append(f"module load {shell_line(args.module)}")
    if args.venv:
        lines.append(f"source {shell_line([os.path.join(args.venv, 'bin/activate')])}")
    lines += [
        'MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)"',
        "MASTER_PORT=$((15000 + SLURM_JOB_ID % 10000))",
        "export MASTER_ADDR MASTER_PORT",
    ]
    if args.interface:
        lines.append(f"export GLOO_SOCKET_IFNAME={args.interface} NCCL_SOCKET_IFNAME={args.interface}")
    if args.cpus:
        lines.append(f"export OMP_NUM_THREADS={args.cpus}")
    lines.append(folded(["exec", *_srun(args), _python(args), "-m", "recipes", *plan.words(JOB)]))
    return "\n".join(lines) + "\n"


def _options(plan: Plan, args: argparse.Namespace) -> dict[str, str | None]:
    """The options of sbatch; None: a switch."""
    gpus = (plan.devices if plan.accelerated else 0) if args.gpus is None else args.gpus
    options: dict[str, str | None] = {
        "job-name": plan.slug,
        "partition": args.partition,
        "account": args.account,
        "nodes": str(plan.nodes),
        "ntasks-per-node": str(plan.devices),
        "gpus-per-node": str(gpus) if gpus else None,
        "cpus-per-task": str(args.cpus) if args.cpus else None,
        "mem": args.mem,
        "time": args.time,
        "constraint": args.constraint,
        "chdir": plan.directory,
        "signal": f"USR1@{args.save_before}",
        "open-mode": "append",
    }
    options = {key: value for key, value in options.items() if value is not None} | {"requeue": None}
    for text in args.sbatch:
        key, equals, value = text.lstrip("-").partition("=")
        if not re.fullmatch(r"[a-z][a-z-]*", key):
            raise UserError(f"--sbatch {text}: an option of sbatch is asked for, such as qos=high or exclusive")
        if key in _OWN:
            raise UserError(f"--sbatch {text}: {key} is set by {_OWN[key]}")
        options[key] = value if equals else None
    if "no-requeue" in options:
        options.pop("requeue")
    return options


def _directive(key: str, value: str | None) -> str:
    if value is None:
        return f"#SBATCH --{key}"
    if "\n" in value or '"' in value:
        raise UserError(f"{key}: {value!r} has a line break or a quotation mark, which a batch script cannot hold")
    return f'#SBATCH --{key}="{value}"' if re.search(r"\s|#", value) else f"#SBATCH --{key}={value}"


def _srun(args: argparse.Namespace) -> list[str]:
    """srun with what it does not take over from sbatch; one task that fails ends the others."""
    words = ["srun", "--kill-on-bad-exit=1"]
    if args.cpus:
        words.append(f"--cpus-per-task={args.cpus}")
    if args.container_mounts and not args.container:
        raise UserError("--container-mounts: goes with --container")
    if args.container:
        words.append(f"--container-image={args.container}")
    if args.container_mounts:
        words.append(f"--container-mounts={args.container_mounts}")
    return words


def _python(args: argparse.Namespace) -> str:
    return "python" if args.venv or args.container or args.module else sys.executable
