"""recipes list: every recipe with its stage, what it does and what it needs."""

from __future__ import annotations

import argparse
import shutil
import textwrap

from recipes.config_names import Recipe, all_recipes, part_names
from recipes.errors import UserError, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", nargs="?", help="only the recipes of this stage, such as sft")
    parser.add_argument("--names", action="store_true", help="names alone, one a line")
    parser.add_argument(
        "--parts", action="store_true", help="names of overlays and parts (models, strategies, ...) too"
    )


def run(args: argparse.Namespace) -> int:
    found = list(all_recipes())
    if args.stage is not None:
        stages = {recipe.stage for recipe in found}
        if args.stage not in stages:
            there = ", ".join(sorted(stages)) or "none"
            raise UserError(f"{args.stage}: no recipe has this stage{nearest(args.stage, stages)}; there are: {there}")
        found = [recipe for recipe in found if recipe.stage == args.stage]
    if args.names:
        print(*(recipe.name for recipe in found), sep="\n")
    else:
        print(table(found, shutil.get_terminal_size((120, 24)).columns))
    if args.parts:
        print(*([] if args.names else ["", "put on top with -c, or named in a recipe:"]), *part_names(), sep="\n")
    return 0


def table(found: list[Recipe], columns: int) -> str:
    """The recipes, grouped by stage; a summary too long for the line goes on below itself."""
    if not found:
        return "no recipes; a recipe is a YAML file below ./configs"
    name_width = max(len(recipe.name) for recipe in found)
    indent = " " * (name_width + 4)
    lines: list[str] = []
    for index, recipe in enumerate(found):
        if index == 0 or recipe.stage != found[index - 1].stage:
            lines += ["", recipe.stage] if lines else [recipe.stage]
        room = max(40, columns - len(indent))
        text = textwrap.wrap(recipe.summary or "(no description)", room) or [""]
        lines.append(f"  {recipe.name:<{name_width}}  {text[0]}")
        lines += [indent + more for more in text[1:]]
        if recipe.needs:
            lines += [indent + more for more in textwrap.wrap(f"needs: {recipe.needs}", room)]
    return "\n".join(lines)
