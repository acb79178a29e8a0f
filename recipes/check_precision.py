"""the same steps under each precision: loss against fp32, speed and memory

Each precision trains from the same weights on the same rows, in a process of its own. One that the hardware refuses is
shown with the reason. Mixed precisions and fp8, which keep weights in fp32, are to cost no accuracy: where one of them
ends further from 32-true than --limit, or any loss is not finite, the check fails (status 1).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from recipes.checks import check_values
from recipes.compose import Composed, compose
from recipes.errors import UserError
from recipes.own_process import run_own

REFERENCE = "32-true"
USUAL = ("bf16-mixed", "bf16-true", "16-mixed", "fp8")
QUANTIZED = ("nf4", "nf4-double", "fp4", "int8")
_WITHOUT_OVERLAY = ("16-true", "64-true")  # values of trainer.precision that hardly anybody wants
_TAIL = 4  # the loss at the end is the mean over the last quarter of the steps


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", action="append", default=[], metavar="NAME", help="recipe, then overlays")
    usual = f"{REFERENCE}, {', '.join(USUAL)}; with an adapter also {', '.join(QUANTIZED)}"
    names = f"overlays of configs/precision, with commas between (default: {usual})"
    parser.add_argument("--precisions", metavar="NAMES", help=names)
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="optimizer steps of each (20)")
    limit = "difference to 32-true that fails the check, of mixed precisions and fp8 (1 %%)"
    parser.add_argument("--limit", type=float, default=1.0, metavar="PERCENT", help=limit)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)  # of a part: where its numbers go
    parser.add_argument("--only", help=argparse.SUPPRESS)  # of a part: its precision


def run_check(args: argparse.Namespace) -> int:
    if args.steps < 2:
        raise UserError(
            f"--steps {args.steps}: at least 2 are asked for, as the first one does not count for the speed"
        )
    if not args.limit > 0:
        raise UserError(f"--limit {args.limit}: a percentage above 0 is asked for")
    if not args.config:
        raise UserError("-c: a recipe must be named, such as recipes check precision -c sft/quickstart")
    composed = compose(args.config, args.overrides)
    check_values(composed)
    if args.out is not None:
        return _part(args, composed)
    from recipes.cluster_world import find_world

    if find_world().size > 1:
        raise UserError("check precision: starts its processes itself; start it once, outside of torchrun and srun")
    names = _names(args.precisions, composed)
    with tempfile.TemporaryDirectory(prefix="litrecipes-precision-") as folder:
        return _Check(args, composed, Path(folder)).run(names)


def _names(given: str | None, composed: Composed) -> list[str]:
    """The precisions, the reference first.

    Raises:
        UserError: one is not known.
    """
    backbone = _backbone(composed) or {}
    asked = [*USUAL, *(QUANTIZED if backbone.get("adapter") else ())]
    if given is not None:
        asked = [name.strip() for name in given.split(",") if name.strip()]
        if not asked:
            raise UserError("--precisions: none is named; such as --precisions 32-true,bf16-mixed")
    names = [REFERENCE, *(name for name in dict.fromkeys(asked) if name != REFERENCE)]
    for name in names:
        overlay(name)
    return names


def overlay(name: str) -> list[tuple[str, str]]:
    """What a precision sets, as overrides.

    Raises:
        UserError: there is no such overlay.
    """
    from recipes.bare_run import as_overrides
    from recipes.config_names import find_config
    from recipes.yaml_tree import read_yaml

    if name in _WITHOUT_OVERLAY:
        return as_overrides({"trainer.precision": name})
    return as_overrides(_flat(read_yaml(find_config(f"precision/{name}")).plain()))


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


def _backbone(composed: Composed) -> dict[str, Any] | None:
    backbone = (composed.values["model"].get("init_args") or {}).get("backbone")
    return backbone if isinstance(backbone, dict) else None


def _part(args: argparse.Namespace, composed: Composed) -> int:
    from recipes.bare_run import as_overrides, bare
    from recipes.precision_run import train

    # What an overlay in the recipe has set: each precision begins from none.
    plain: dict[str, Any] = {"trainer.precision": REFERENCE}
    if _backbone(composed) is not None:
        plain |= {"model.backbone.quantization": None, "model.backbone.dtype": None, "model.backbone.fp8": False}
    overrides = [*args.overrides, *as_overrides(plain), *overlay(args.only), *bare(args.steps)]
    train(compose(args.config, overrides), args.out)
    return 0


class _Check:
    def __init__(self, args: argparse.Namespace, composed: Composed, folder: Path) -> None:
        self.args = args
        self.composed = composed
        self.folder = folder
        self.problems: list[str] = []
        self.reference: dict[str, Any] = {}

    def run(self, names: list[str]) -> int:
        for name in names:
            print(f"{name}: {self.args.steps} steps", file=sys.stderr, flush=True)
            measured, reason, status = self._measure(name)
            if name == REFERENCE:
                if measured is None:
                    print(f"recipes: {reason}", file=sys.stderr)
                    return status
                self.reference = measured
                print(self._head(measured), flush=True)
            print(self._row(name, measured, reason, status), flush=True)
        sys.stdout.flush()
        for problem in self.problems:
            print(f"recipes: {problem}", file=sys.stderr)
        return 1 if self.problems else 0

    def _measure(self, name: str) -> tuple[dict[str, Any] | None, str, int]:
        """What one precision measured; or why it did not, and its status."""
        out = self.folder / f"{name.replace('/', '-')}.json"
        words = ["check", "precision", "--steps", str(self.args.steps), "--only", name, "--out", str(out)]
        done = run_own(words, self.args.config, self.args.overrides, captured=True)
        if done.returncode == 0:
            return json.loads(out.read_text(encoding="utf-8")), "", 0
        said = [line.removeprefix("recipes: ") for line in done.stderr.splitlines() if line.startswith("recipes: ")]
        if done.returncode == 2 and said:
            return None, "; ".join(said), 2
        print(done.stderr, end="", file=sys.stderr)
        return None, f"ended with status {done.returncode}, see above", 1

    def _head(self, measured: dict[str, Any]) -> str:
        processes = f", {measured['processes']} processes" if measured["processes"] > 1 else ""
        memory = "of the process" if measured["device"] == "cpu" else "of the device"
        return (
            f"{self.composed.name}, {self.args.steps} steps on {measured['device']}{processes}; loss: mean over the "
            f"last {self._tail()}; peak memory {memory}\n"
            f"{'precision':<12}{'loss':>10}{'difference':>13}{'in %':>10}{'tokens/s':>12}{'peak GiB':>10}"
        )

    def _tail(self) -> int:
        return max(1, self.args.steps // _TAIL)

    def _row(self, name: str, measured: dict[str, Any] | None, reason: str, status: int) -> str:
        """A line of the table; what is wrong is noted."""
        if measured is None:
            if status != 2:
                self.problems.append(f"{name}: {reason}")
            return f"{name:<12}{'refused' if status == 2 else 'failed'}: {reason}"
        loss, expected = (_mean(values["losses"][-self._tail() :]) for values in (measured, self.reference))
        apart, percent = loss - expected, 100 * (loss - expected) / expected if expected else math.nan
        if not all(math.isfinite(value) for value in measured["losses"]):
            self.problems.append(f"{name}: the loss is not finite")
        elif keeps_accuracy(name) and not abs(percent) <= self.args.limit:
            self.problems.append(
                f"{name}: the loss is {percent:+.2f} % from {REFERENCE}'s, beyond {self.args.limit:g} %"
            )
        speed, memory = measured["tokens_per_second"], measured["peak_bytes"] / 2**30
        differences = f"{'-':>13}{'-':>10}" if name == REFERENCE else f"{apart:>+13.4f}{percent:>+10.2f}"
        return f"{name:<12}{loss:>10.4f}{differences}{speed:>12,.0f}{memory:>10.2f}"


def keeps_accuracy(name: str) -> bool:
    """Whether a precision keeps its weights in fp32, and so is to lose nothing."""
    return name.endswith("-mixed") or name == "fp8"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
