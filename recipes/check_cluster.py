"""processes, devices, network, code, packages and run folder, from inside a job (torchrun, srun)

`recipes fit --preflight 60` makes the same check before it trains. Every process reports in; rank 0 says in a line what
is missing or differs, and all end with status 2, soon, where training would hang until a collective's time-out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from recipes.compose import Composed, compose
from recipes.errors import RankError, UserError
from recipes.ranks import told_folder

if TYPE_CHECKING:
    from torch.distributed import TCPStore

    from recipes.cluster_world import World

_LINGER = 3.0  # seconds that the others stay, for rank 0 to say what is wrong before the launcher ends it with them
_GRACE = 10.0  # seconds that a process which did its part in time may take to say so
_NEWS = 15.0  # seconds between two lines about who is waited for


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", action="append", default=[], metavar="NAME", help="recipe, then overlays")
    parser.add_argument("--timeout", type=int, default=60, metavar="S", help="wait so long for each process (60 s)")
    parser.add_argument("--mebibytes", type=int, default=64, metavar="N", help="of the all-reduce (default: 64)")


def run_check(args: argparse.Namespace) -> int:
    if min(args.timeout, args.mebibytes) < 1:
        raise UserError("--timeout, --mebibytes: at least 1 is asked for")
    preflight(compose(args.config, args.overrides), args.timeout, args.mebibytes)
    return 0


def preflight(composed: Composed, seconds: float, mebibytes: int = 64) -> None:
    """Checks the processes of this job, their machines, and the network between them.

    Args:
        composed: the recipe; of it are read the run folder's place, the accelerator, the user's own modules.
        seconds: how long a process is waited for, in the rendezvous and in the all-reduce.
        mebibytes: size of the all-reduced tensor.

    Raises:
        UserError: something is wrong, on rank 0 (one line a problem).
        SystemExit: something is wrong, on the other ranks, which leave the words to rank 0.
    """
    if told_folder() is None:  # else a process that rank 0 started, after this check
        from recipes.cluster_world import find_world, open_store

        world = find_world()
        _Preflight(world, open_store(world, seconds), composed, seconds, mebibytes).run()


class _Preflight:
    """The check, on one rank. Rank 0 decides: it reads what all have written, and writes down what is wrong."""

    def __init__(self, world: World, store: TCPStore, composed: Composed, seconds: float, mebibytes: int) -> None:
        self.world = world
        self.store = store
        self.composed = composed
        self.seconds = seconds
        self.mebibytes = mebibytes
        self.runs_dir = Path(composed.values.get("runs_dir") or "runs")
        self.hangs = False
        accelerator = (composed.values.get("trainer") or {}).get("accelerator", "auto")
        self.device = _device(str(accelerator))

    def run(self) -> None:
        from recipes.cluster_report import machines
        from recipes.cluster_world import wait_until_closed

        reports = self._reports()
        lines = [f"cluster: {self.world.size} process{'es' * (self.world.size > 1)}", *machines(reports)]
        if self.world.size > 1:
            lines += ["code, packages and recipe: the same everywhere", self._all_reduce(reports)]
        else:
            lines.append("one process: start this with srun or torchrun to check what is between several")
        if self.world.rank == 0:
            print("\n".join([*lines, f"{self.runs_dir}/: all write to it"]), file=sys.stderr)
            self._collect("left", time.monotonic() + _GRACE)
        else:
            self.store.set(f"left/{self.world.rank}", "")
        del self.store
        if self.world.rank > 0:
            wait_until_closed(self.world)

    def _reports(self) -> dict[int, dict[str, Any]]:
        """What each rank says of its machine; only rank 0 knows all of them."""
        from recipes.cluster_folder import SharedFolder
        from recipes.cluster_report import describe, problems

        end = time.monotonic() + self.seconds
        folder = SharedFolder(self.runs_dir)
        try:
            if self.world.rank == 0:
                self.store.set("folder", folder.make())
            else:
                folder.name = self._get("folder").decode()
            own = describe(self.world, self.composed, self.device)
            own["problem"] = own["problem"] or folder.use(self.world.rank)
            self.store.set(f"report/{self.world.rank}", json.dumps(own))

            def judge() -> list[str]:
                texts, missing = self._collect("report", end)
                reports.update({rank: json.loads(text) for rank, text in texts.items()})
                if missing:
                    late = f"within {self.seconds:.0f} s; see the logs of their nodes"
                    return [f"{self.world.names(missing)} did not come {late}", *problems(reports)]
                return problems(reports) or folder.unseen(self.world)

            reports: dict[int, dict[str, Any]] = {}
            self._agree("reports", judge)
        finally:
            if self.world.rank == 0:
                folder.remove()
        return reports or {self.world.rank: own}

    def _all_reduce(self, reports: dict[int, dict[str, Any]]) -> str:
        """An all-reduce whose result is known, with a limit to its time. Returns what rank 0 says of it."""
        from recipes.cluster_reduce import Reduction

        reduction = Reduction(self.world, self.store, self.device, self.mebibytes, self.seconds)
        end = time.monotonic() + self.seconds + _GRACE
        result = reduction.run()
        self.hangs = reduction.hangs
        with contextlib.suppress(RuntimeError):  # rank 0 is gone; that is said below
            self.store.set(f"result/{self.world.rank}", json.dumps(result))

        def judge() -> list[str]:
            texts, missing = self._collect("result", end)
            if missing:
                hosts = ", ".join(sorted({reports[rank]["host"] for rank in missing}))
                return [
                    f"{self.world.names(missing)} ({hosts}) died or hung in the all-reduce over {reduction.backend}"
                ]
            results = {rank: json.loads(text) for rank, text in texts.items()}
            return reduction.problems(results, {rank: report["host"] for rank, report in reports.items()})

        self._agree("results", judge)
        return reduction.summary(result)

    # --- between the ranks ------------------------------------------------------------------------------------------

    def _agree(self, stage: str, judge: Callable[[], list[str]]) -> None:
        """Rank 0 judges; all go on, or all end."""
        if self.world.rank == 0:
            found = judge()
            self.store.set(f"verdict/{stage}", json.dumps(found))
            if found:
                self._await_readers()
                self._end(found)
            return
        if json.loads(self._get(f"verdict/{stage}")):
            self.store.set(f"heard/{self.world.rank}", "")
            time.sleep(_LINGER)
            self._end([])

    def _await_readers(self) -> None:
        """On rank 0: until those who are there have read the verdict; from a closed store one reads a C++ stack."""
        here = [rank for rank in range(1, self.world.size) if self.store.check([f"report/{rank}"])]
        end = time.monotonic() + _LINGER / 2
        while time.monotonic() < end and not all(self.store.check([f"heard/{rank}"]) for rank in here):
            time.sleep(0.02)

    def _end(self, lines: list[str]) -> NoReturn:
        if self.hangs:  # a thread is stuck in a collective; the interpreter would wait for it
            for line in lines:
                print(f"recipes: {line}", file=sys.stderr, flush=True)
            os._exit(2)
        if lines:
            raise RankError("\n".join(lines))
        raise SystemExit(2)

    def _get(self, key: str) -> bytes:
        """A value that rank 0 sets, after it has waited for others."""
        try:
            self.store.wait([key], timedelta(seconds=2 * self.seconds + 2 * _GRACE))
            return self.store.get(key)
        except RuntimeError:
            self._end([f"rank 0 at {self.world.address} ended, or lost its connection, in the check of the cluster"])

    def _collect(self, kind: str, end: float) -> tuple[dict[int, bytes], list[int]]:
        """On rank 0: what the ranks have set until the time is over, and the ranks that have not."""
        missing, texts = list(range(self.world.size)), {}
        news = time.monotonic() + _NEWS
        if kind == "left":
            missing.remove(0)
        while True:
            for rank in list(missing):
                if self.store.check([f"{kind}/{rank}"]):
                    texts[rank] = self.store.get(f"{kind}/{rank}")
                    missing.remove(rank)
            if not missing or time.monotonic() > end:
                return texts, missing
            if time.monotonic() > news:
                print(f"waiting for {self.world.names(missing)}", file=sys.stderr, flush=True)
                news += _NEWS
            time.sleep(0.1)


def _device(accelerator: str) -> str:
    """``cuda`` or ``cpu``: what the ranks will train on."""
    if accelerator == "cpu":
        return "cpu"
    import torch

    return "cuda" if accelerator in ("gpu", "cuda") or torch.cuda.is_available() else "cpu"
