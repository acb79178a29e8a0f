"""A recipe under torchrun: on this machine, or as the command of each node; elastic, restarted after a crash."""

from __future__ import annotations

import argparse
import os
import re
import sys
from typing import NoReturn

from recipes.errors import UserError
from recipes.launch_plan import Plan, add_common_arguments, folded, make_plan, new_job

PORT = 29500
# torchrun's agent would keep one store over all restarts, with the addresses of dead processes: gloo then fails
# at the first restart, or hangs. This gives each start a store, and a port, of its own.
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
JOIN_SECONDS = 300  # how long a node waits for others that a scheduler starts; torchrun's own default is 600
_BY_HAND = 120  # and for others that somebody starts
ELASTIC = "recipes.elastic"  # torchrun, which takes the same arguments


def add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, elastic=True)
    parser.add_argument("--master", metavar="HOST[:PORT]", help=f"where node 0 can be reached (default port: {PORT})")
    parser.add_argument("--node-rank", type=int, metavar="R", help="run the command of this node here (0: the master)")
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="after crashes (default: 3)")
    text = f"seconds that a node waits for the others to be started (default: {_BY_HAND})"
    parser.add_argument("--join", type=int, default=_BY_HAND, metavar="S", help=text)
    parser.add_argument("--local-addr", metavar="ADDRESS", help="of this node, where its name does not lead to it")
    parser.add_argument(
        "--job", metavar="NAME", help="of an earlier launch, to go on with its run (default: a new one)"
    )


def launch(args: argparse.Namespace) -> int:
    plan = make_plan(args, os.getcwd())
    if args.job is not None and not re.fullmatch(r"[\w.-]+", args.job):
        raise UserError(f"--job {args.job}: letters, digits, dots, dashes and underscores are allowed")
    job = args.job or new_job(plan)
    if plan.nodes > 1 and args.master is None:
        raise UserError("--master: with several nodes, the host name of node 0 must be given")
    if args.master is not None and not re.fullmatch(r"[^:]+(:\d+)?|\[[\da-fA-F:]+\](:\d+)?", args.master):
        raise UserError(f"--master {args.master}: a host is asked for, or HOST:PORT with a number for the port")
    if args.join < 1:
        raise UserError(f"--join {args.join}: a number of seconds is asked for, at least 1")
    if args.local_addr and args.node_rank is None:
        raise UserError("--local-addr: is of one node; say which one by --node-rank")
    if args.node_rank is not None and not 0 <= args.node_rank < plan.nodes:
        raise UserError(f"--node-rank {args.node_rank}: there is no such node; allowed: 0 to {plan.nodes - 1}")
    if plan.nodes > 1 and args.node_rank is not None and args.job is None:
        raise UserError("--job: with --node-rank, all nodes must name the same job; any name that is new will do")
    commands = {rank: torchrun(plan, job, args, rank) for rank in ((0, 1) if plan.nodes > 1 else (0,))}
    if args.dry_run:
        print(_printed(plan, commands, args.interface))
        return 0
    if plan.nodes > 1 and args.node_rank is None:
        raise UserError("--node-rank: which node is this? --dry-run prints the command of each")
    print(plan.summary(), file=sys.stderr)
    return _become(commands[min(args.node_rank or 0, 1)], plan, args.interface)


def _become(command: list[str], plan: Plan, interface: str | None) -> NoReturn:
    """Runs a command in the place of this process, so that signals go straight to it."""
    environment = os.environ | variables(interface)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // plan.devices)))
    sys.stdout.flush()
    os.execve(command[0], command, environment)


def torchrun(plan: Plan, job: str, args: argparse.Namespace, rank: int, python: str = sys.executable) -> list[str]:
    """The command of a node.

    Args:
        rank: 0 for the node that the others meet at, anything else for those.
    """
    nodes = f"{plan.least}:{plan.nodes}" if plan.elastic else str(plan.nodes)
    if plan.nodes == 1:
        place, conf = "localhost:0", f"join_timeout={args.join}"
    else:
        host, _, port = args.master.partition(":")
        # Said, not guessed from names: a host of several names would not know itself.
        place, conf = f"{host}:{port or PORT}", f"is_host={int(rank == 0)},{timeouts(args.join)}"
    rendezvous = ["--rdzv-backend", "c10d", "--rdzv-endpoint", place, "--rdzv-id", job, "--rdzv-conf", conf]
    if args.local_addr:
        rendezvous += ["--local-addr", args.local_addr]
    sizes = ["--nnodes", nodes, "--nproc-per-node", str(plan.devices), "--max-restarts", str(args.max_restarts)]
    return [python, "-m", ELASTIC, *sizes, *rendezvous, "-m", "recipes", *plan.words(job)]


def timeouts(join: int) -> str:
    """Of the rendezvous, as torchrun's `--rdzv-conf` has them: to reach the master, and until all have come."""
    return f"join_timeout={join},read_timeout={join}"


def _printed(plan: Plan, commands: dict[int, list[str]], interface: str | None) -> str:
    texts = [f"# {plan.summary()}"]
    for rank, command in commands.items():
        others = "1" if plan.nodes == 2 else f"1 to {plan.nodes - 1}"
        if plan.nodes > 1:
            texts.append("# node 0, the master" if rank == 0 else f"# each of the others (node {others})")
        texts += [export_line(interface), folded(command)]
    return "\n".join(texts)


def variables(interface: str | None) -> dict[str, str]:
    """What torchrun needs in its environment."""
    sockets = {"GLOO_SOCKET_IFNAME": interface, "NCCL_SOCKET_IFNAME": interface} if interface else {}
    return FRESH_STORE | sockets


def export_line(interface: str | None) -> str:
    """The same for a shell."""
    return " ".join(["export", *(f"{key}={value}" for key, value in variables(interface).items())])
