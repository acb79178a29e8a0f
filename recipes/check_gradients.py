"""the gradient of all ranks against that of one process on the same rows, tensor by tensor, in fp32

N ranks under the recipe's own strategy take an optimizer step's rows, accumulation included; then one process takes the
same rows, cut into other micro-batches. Weights stay what they are, dropout is off, nothing is written. Started plainly
it starts the ranks itself; under torchrun or srun it uses those that are there.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recipes.checks import check_values
from recipes.compose import Composed, compose
from recipes.errors import UserError
from recipes.own_process import run_own

_MOST = 5  # tensors that are named where the check fails


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", action="append", default=[], metavar="NAME", help="recipe, then overlays")
    parser.add_argument("--devices", metavar="N", help="processes, each with its device (default: as the recipe says)")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="optimizer steps' rows to compare (1)")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of a part: where its gradients go
    parser.add_argument("--cut", help=argparse.SUPPRESS)  # of the part that is one process: micro-batch x accumulation


def run_check(args: argparse.Namespace) -> int:
    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: at least 1 is asked for")
    if not args.config:
        raise UserError("-c: a recipe must be named, such as recipes check gradients -c sft/quickstart --devices 2")
    if args.devices is not None:
        args.overrides.append(("trainer.devices", args.devices))
    composed = compose(args.config, args.overrides)
    check_values(composed)
    if args.out is not None:
        _part(args, composed, args.out)
        return 0
    from recipes.cluster_world import find_world

    world = find_world()
    with tempfile.TemporaryDirectory(prefix="litrecipes-gradients-") as folder:
        check = _Check(args, Path(folder))
        if world.size == 1:
            status = check.part("ranks")
            return status or check.judge()
        _part(args, composed, Path(folder) / "ranks")  # this process is one of the ranks
        # The others' part is done; rank 0 has the gradient and judges it.
        return check.judge() if world.rank == 0 else 0


def _part(args: argparse.Namespace, composed: Composed, out: Path) -> None:
    from recipes.gradient_run import alone, keep_gradients, settings

    overrides = [*args.overrides, *settings(composed, args.steps)]
    if args.cut is not None:
        batch_size, accumulate = map(int, args.cut.split("x"))
        overrides += alone(batch_size, accumulate)
    keep_gradients(compose(args.config, overrides), out)


class _Check:
    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args = args
        self.folder = folder

    def part(self, name: str, cut: str | None = None) -> int:
        """Runs a part in a process of its own, with the ranks that it starts; its status, and what is wrong is said."""
        words = ["check", "gradients", "--steps", str(self.args.steps), "--out", str(self.folder / name)]
        words += [] if cut is None else ["--cut", cut]
        status = run_own(words, self.args.config, self.args.overrides).returncode
        if status < 0:
            what = "the ranks" if cut is None else "one process on all rows"
            return _fail(f"{what}: ended by signal {-status} (9: by the system, for memory, or with another rank)")
        return status

    def judge(self) -> int:
        """Compares with one process; says what is found."""
        ranks = self._read("ranks")
        rows, same, other = cuts(ranks)
        if status := self.part("one", cut=other):
            return status
        processes = ranks["processes"]
        size, one = other.split("x")
        what = f"{rows} rows a step as {ranks['replicas']} x {ranks['batch_size']} x {ranks['accumulate']}"
        if ranks["prompts"]:
            what, size = f"the answers to {rows} prompts in {ranks['replicas']} x {ranks['accumulate']} parts", ""
        print(
            f"gradients: {processes} process{'es' * (processes > 1)} ({ranks['strategy']}, {ranks['device']}), {what}; "
            f"one process as {size and f'{size} x '}{one}; fp32"
        )
        if processes == 1:
            print("one process: nothing is synchronized, and only the micro-batches are compared; see --devices")
        wrong = self._differences(ranks, self._read("one"))
        if not wrong:
            print("passed")
            return 0
        if (apart := ranks_differ(ranks)) is not None:
            return _fail(apart)
        return _fail(self._micro_batches(ranks, same) or wrong)

    def _micro_batches(self, ranks: Mapping[str, Any], same: str) -> str | None:
        """What is said where one process with the ranks' own micro-batches has the ranks' gradient."""
        from recipes.gradient_difference import difference

        if self.part("same", cut=same):
            return None
        pairs = zip(ranks["steps"], self._read("same")["steps"], strict=True)
        if not all(difference(actual, expected).within for actual, expected in pairs):
            return None
        cut, size = ("answers", "") if ranks["prompts"] else ("rows", f", of {ranks['batch_size']} rows")
        return (
            f"the gradient depends on how {cut} are cut into micro-batches: one process with the ranks' own{size}, "
            "has the ranks' gradient; something is divided by, or averaged over, a micro-batch"
        )

    def _differences(self, ranks: Mapping[str, Any], one: Mapping[str, Any]) -> str | None:
        """Prints them step by step; the first one that is too large, in words."""
        from recipes.gradient_difference import TENSOR, WHOLE, difference

        wrong = ranks_differ(ranks)
        for step, (actual, expected) in enumerate(zip(ranks["steps"], one["steps"], strict=True), 1):
            found = difference(actual, expected)
            (worst, name), rounding = found.worst, found.rounding
            left_out = f"; {rounding} zero but for rounding, in the whole only" if rounding else ""
            print(
                f"step {step}: whole gradient {found.whole:.1e} (at most {WHOLE:.0e}); worst of {len(found.tensors)} "
                f"tensors {worst:.1e} (at most {TENSOR:.0e}), {name}{left_out}"
            )
            if found.within:
                continue
            for value, other in found.tensors[1:_MOST]:
                print(f"        {value:.1e} {other}")
            wrong = wrong or (
                f"the ranks' gradient is not that of one process: step {step}, whole {found.whole:.1e}, worst "
                f"{worst:.1e} in {name}"
            )
        return wrong

    def _read(self, name: str) -> dict[str, Any]:
        import torch

        kept: dict[str, Any] = torch.load(self.folder / name, mmap=True, weights_only=True)
        return kept


def cuts(ranks: Mapping[str, Any]) -> tuple[int, str, str]:
    """(rows of a step; the ranks' own micro-batches, and others, for one process: ``batch_size x accumulation``)."""
    batch_size, parts = ranks["batch_size"], ranks["replicas"] * ranks["accumulate"]
    if ranks["prompts"]:
        return batch_size, f"{batch_size}x{parts}", f"{batch_size}x{1 if parts > 1 else 2}"
    rows = parts * batch_size
    other = other_cut(batch_size, rows)
    return rows, f"{batch_size}x{rows // batch_size}", f"{other}x{rows // other}"


def other_cut(batch_size: int, rows: int) -> int:
    """Rows of a micro-batch that divide the step as well, and are not the recipe's own where that is possible."""
    divisors = [size for size in range(1, rows + 1) if rows % size == 0]
    smaller = [size for size in divisors if size < batch_size]
    larger = [size for size in divisors if size > batch_size]
    return (smaller[-1:] or larger[:1] or [batch_size])[0]


def ranks_differ(kept: Mapping[str, Any]) -> str | None:
    """Which rank has another gradient than rank 0 where all are to have the same, in words."""
    from recipes.gradient_difference import ROUNDING, TENSOR

    for step, (gradients, apart) in enumerate(zip(kept["steps"], kept["ranks"], strict=True), 1):
        total = sum(float(gradient.double().norm()) ** 2 for gradient in gradients.values()) ** 0.5
        worst, rank, name = 0.0, 0, ""
        for tensor, distances in apart.items():
            # Of a tensor that is zero but for rounding, the rounding need not be the same.
            norm = max(float(gradients[tensor].double().norm()), ROUNDING * total) or 1.0
            for number, distance in enumerate(distances):
                value = math.inf if math.isnan(distance / norm) else distance / norm
                if value > worst:
                    worst, rank, name = value, number, tensor
        if worst > TENSOR:
            return f"rank {rank} has another gradient than rank 0: step {step}, {worst:.1e} in {name}"
    return None


def _fail(reason: str) -> int:
    sys.stdout.flush()
    print(f"recipes: {reason}", file=sys.stderr)
    return 1
