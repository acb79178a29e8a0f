"""one optimizer step's rows cut, packed, padded and computed in other ways: the gradient must stay what it is, in fp32

One process, the recipe's own rows, model and objective. Weights stay what they are, dropout is off, nothing is written.
For a loss of one's own: what divides by a micro-batch's tokens, or counts padding, is seen here at once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.checks import check_values
from recipes.compose import Composed, compose
from recipes.errors import UserError

if TYPE_CHECKING:
    from recipes.gradient_difference import Difference

FEWEST_ROWS = 4
"""Rows of a step that can be cut in more than one way."""

OWN = "as it is"


@dataclass(frozen=True)
class Variant:
    """Another way to compute the same gradient.

    Attributes:
        title: what is printed.
        cut: rows of a micro-batch, micro-batches.
        overrides: dotted keys and values that make it.
        wrong: what is the matter where the gradient is another one.
        against: what it is compared with: `as it is`, or `packed` (packing batch, which has the rows of packing none).
    """

    title: str
    cut: tuple[int, int]
    overrides: dict[str, Any]
    wrong: str
    against: str = OWN


def add_check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-c", "--config", action="append", default=[], metavar="NAME", help="recipe, then overlays")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of the step (default: as the recipe says)")


def run_check(args: argparse.Namespace) -> int:
    if not args.config:
        raise UserError("-c: a recipe must be named, such as recipes check invariance -c sft/quickstart")
    if args.rows is not None and args.rows < FEWEST_ROWS:
        raise UserError(f"--rows {args.rows}: at least {FEWEST_ROWS} are asked for, to cut them in more than one way")
    composed = compose(args.config, args.overrides)
    check_values(composed)
    with tempfile.TemporaryDirectory(prefix="litrecipes-invariance-") as folder:
        return _Check(args, composed, Path(folder)).run()


class _Check:
    def __init__(self, args: argparse.Namespace, composed: Composed, folder: Path) -> None:
        self.args = args
        self.folder = folder
        self.prompts = str(composed.values["data"].get("class_path", "")).endswith("PromptDataModule")
        self.batch_size, self.accumulate = _cut(composed, args.rows, self.prompts)
        backbone = composed.values["model"].get("init_args", {}).get("backbone")
        self.backbone: dict[str, Any] | None = backbone if isinstance(backbone, dict) else None

    def run(self) -> int:
        """Prints a line for each variant; 1 where one has another gradient."""
        own = Variant(OWN, (self.batch_size, self.accumulate), {}, "")
        kept = {OWN: self._gradient(own)}
        packing = None if self.prompts else kept[OWN]["packing"]
        rows = self.batch_size * (1 if self.prompts else self.accumulate)
        what = f"the answers to {rows} prompts as {self.accumulate} micro-batches" if self.prompts else (
            f"{rows} rows a step as {self.batch_size} x {self.accumulate}{f', packing {packing}' if packing else ''}"
        )  # fmt: skip
        print(f"invariance: {what}; one process, fp32, without dropout")
        cuts = answer_cuts(own.cut) if self.prompts else row_cuts(rows, own.cut)
        wrong: list[str] = []
        for variant in [*cuts, *variants(own.cut, packing, self.backbone)]:
            if variant.against not in kept:
                kept[variant.against] = self._gradient(Variant(variant.against, own.cut, {"data.packing": "batch"}, ""))
            found = self._difference(variant, kept[variant.against])
            if not found.within:
                wrong.append(f"{variant.wrong} ({variant.title}: whole gradient {found.whole:.1e})")
        if wrong:
            sys.stdout.flush()
            print(f"recipes: {wrong[0]}", file=sys.stderr)
            return 1
        print("passed")
        return 0

    def _difference(self, variant: Variant, expected: dict[str, Any]) -> Difference:
        from recipes.gradient_difference import TENSOR, WHOLE, difference

        found = difference(self._gradient(variant)["steps"][0], expected["steps"][0])
        worst, name = found.worst
        print(
            f"  {variant.title:<34} whole gradient {found.whole:.1e} (at most {WHOLE:.0e}), worst tensor {worst:.1e} "
            f"(at most {TENSOR:.0e}){'' if found.within else f', {name}'}",
            flush=True,
        )
        return found

    def _gradient(self, variant: Variant) -> dict[str, Any]:
        import torch

        from recipes.bare_run import as_overrides
        from recipes.gradient_run import alone, keep_gradients, settings

        composed = compose(self.args.config, self.args.overrides)
        overrides = [*self.args.overrides, *settings(composed, 1), *alone(*variant.cut)]
        out = self.folder / "gradient"
        keep_gradients(compose(self.args.config, [*overrides, *as_overrides(variant.overrides)]), out)
        kept: dict[str, Any] = torch.load(out, weights_only=True)
        return kept


def _cut(composed: Composed, rows: int | None, prompts: bool) -> tuple[int, int]:
    """Rows of a micro-batch (or prompts of an iteration), and micro-batches: the recipe's own, or of so many rows."""
    init_args = composed.values["data"].get("init_args", composed.values["data"])
    batch_size = init_args.get("batch_size", 8)
    accumulate = composed.values.get("trainer", {}).get("accumulate_grad_batches") or 1
    if prompts:
        return rows or batch_size, accumulate
    wanted = rows or max(FEWEST_ROWS, batch_size * accumulate)
    if wanted == batch_size * accumulate:
        return batch_size, accumulate
    size = max(size for size in range(1, min(wanted, batch_size) + 1) if wanted % size == 0)
    return size, wanted // size


def answer_cuts(own: tuple[int, int]) -> list[Variant]:
    """Of a recipe of reinforcement learning: the answers of an iteration in other micro-batches."""
    wrong = "the gradient depends on how answers are cut into micro-batches: something is averaged over a micro-batch"
    counts = [count for count in (1, 2, 4) if count != own[1]][:2]
    return [Variant(f"{count} micro-batches", (own[0], count), {}, wrong) for count in counts]


def row_cuts(rows: int, own: tuple[int, int]) -> list[Variant]:
    """The rows of a step, which a recipe cuts as ``own``, in other micro-batches."""
    found = []
    sizes = [size for size in range(1, own[0] + 1) if rows % size == 0 and size != own[0]]
    for size in sorted({sizes[0], sizes[-1]}, reverse=True) if sizes else [2]:
        cut = (size, rows // size)
        wrong = (
            f"the gradient depends on how rows are cut into micro-batches: with {cut[0]} x {cut[1]} it is another one "
            f"than with {own[0]} x {own[1]}; something is divided by, or averaged over, a micro-batch"
        )
        found.append(Variant(f"micro-batches of {size}", cut, {}, wrong))
    return found


def variants(own: tuple[int, int], packing: str | None, backbone: dict[str, Any] | None) -> list[Variant]:
    """What else is compared, of a recipe with this packing and backbone."""
    found = []
    if packing is not None:
        wrong = "the gradient depends on padding: something scores, or counts, positions that are padding"
        against = OWN if packing == "batch" else "packed"
        found.append(Variant("padded against packed", own, {"data.packing": "none"}, wrong, against))
    if backbone is not None:
        head = "chunked" if backbone.get("head", "chunked") == "plain" else "plain"
        wrong = f"the gradient depends on backbone.head: with {head} it is another one"
        found.append(Variant(f"head {head}", own, {"model.backbone.head": head}, wrong))
        again = not backbone.get("activation_checkpointing", False)
        wrong = "the gradient depends on backbone.activation_checkpointing: a block computed again gives something else"
        title = f"activation checkpointing {'on' if again else 'off'}"
        found.append(Variant(title, own, {"model.backbone.activation_checkpointing": again}, wrong))
    return found
