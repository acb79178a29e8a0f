"""A recipe as a managed job of SkyPilot: machines of any cloud, recovered and resumed after a preemption."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from recipes.errors import UserError
from recipes.launch_plan import Plan, Shell, add_common_arguments, as_yaml, folded, make_plan
from recipes.launch_torchrun import ELASTIC, JOIN_SECONDS, PORT, export_line, timeouts

RUNS = "/runs"
_SETUP = "pip install torch==2.13.0 && pip install -c constraints.txt ."
JOB = Shell('"$SKYPILOT_TASK_ID"')  # the same after a recovery


def add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--gpu", metavar="NAME", help="kind of GPU, such as H100")
    parser.add_argument("--infra", metavar="PLACE", help="cloud[/region[/zone]] or k8s/CONTEXT (default: the cheapest)")
    parser.add_argument("--cpus", metavar="N", help="cores of a node; 16+ for at least 16")
    parser.add_argument("--mem", metavar="GB", help="memory of a node; 64+ for at least 64")
    parser.add_argument(
        "--spot", action="store_true", help="machines that may be taken away; the job goes on elsewhere"
    )
    parser.add_argument("--volume", metavar="NAME", help="volume of SkyPilot (sky volumes apply) for runs/")
    parser.add_argument("--image", metavar="IMAGE", help="docker image, such as docker:NAME")
    text = "what installs LitRecipes in the work folder, which is copied (default: pip)"
    parser.add_argument("--setup", metavar="COMMAND", default=_SETUP, help=text)
    parser.add_argument("--env", action="append", default=[], metavar="NAME", help="variable that the job needs")
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="after crashes (default: 3)")


def launch(args: argparse.Namespace) -> int:
    plan = make_plan(args, ".")
    text = as_yaml([task(plan, args)])
    if args.dry_run:
        print(text, end="")
        return 0
    print(plan.summary(), file=sys.stderr)
    sky = shutil.which("sky")
    if sky is None:
        raise UserError("sky: not found on this machine; --dry-run prints the task, for sky jobs launch FILE")
    named = [word for name in args.env for word in ("--env", name)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / f"{plan.slug}.yaml"
        file.write_text(text, encoding="utf-8")
        return subprocess.run([sky, "jobs", "launch", "--yes", "--detach-run", *named, str(file)]).returncode


def task(plan: Plan, args: argparse.Namespace) -> dict[str, Any]:
    """SkyPilot's task."""
    if plan.accelerated and not args.gpu:
        raise UserError("--gpu: which GPU is wanted, such as H100? (--trainer.accelerator cpu: none)")
    if not args.volume and (args.spot or plan.nodes > 1):
        why = "--spot" if args.spot else "--nodes"
        raise UserError(f"--volume: {why} needs a folder for runs/ that all machines, and those after them, write to")
    resources: dict[str, Any] = {
        "infra": args.infra,
        "accelerators": f"{args.gpu}:{plan.devices}" if plan.accelerated else None,
        "cpus": args.cpus,
        "memory": args.mem,
        "image_id": args.image,
        "use_spot": True if args.spot else None,
        "job_recovery": {"max_restarts_on_errors": args.max_restarts},
    }
    whole: dict[str, Any] = {
        "name": plan.slug,
        "workdir": plan.directory,
        "num_nodes": plan.nodes,
        "resources": {key: value for key, value in resources.items() if value is not None},
        "volumes": {RUNS: args.volume} if args.volume else None,
        # Null: the value is that of the machine which submits (sky jobs launch --env NAME).
        "envs": dict.fromkeys(args.env) or None,
        "setup": args.setup + "\n",
        "run": _run(plan, args),
    }
    return {key: value for key, value in whole.items() if value is not None}


def _run(plan: Plan, args: argparse.Namespace) -> str:
    lines = [export_line(args.interface)]
    lines.append('MASTER="$(echo "$SKYPILOT_NODE_IPS" | sed -n 1p)"')
    words = ["exec", "python", "-m", ELASTIC, "--nnodes", str(plan.nodes)]
    words += ["--nproc-per-node", str(plan.devices), "--max-restarts", "0", "--rdzv-backend", "c10d"]
    words += ["--rdzv-endpoint", Shell(f'"$MASTER:{PORT}"'), "--rdzv-id", JOB]
    words += ["--rdzv-conf", Shell(f'"is_host=$((SKYPILOT_NODE_RANK == 0)),{timeouts(JOIN_SECONDS)}"')]
    more = [("runs_dir", RUNS)] if args.volume else []
    return "\n".join([*lines, folded([*words, "-m", "recipes", *plan.words(JOB, more=more)])]) + "\n"
