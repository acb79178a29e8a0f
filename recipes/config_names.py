"""From the name of a recipe or an overlay to its file, and the list of all that there are."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from recipes.errors import UserError, nearest
from recipes.yaml_tree import display

STAGES = ("pretrain", "sft", "distillation", "preference", "reward", "rl", "safety", "generate")
SUFFIXES = (".yaml", ".yml")


@functools.cache
def shipped_configs() -> Path:
    """The ``configs/`` that comes with the package: inside it in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def roots() -> list[Path]:
    """Folders that names are looked up in: the user's ``./configs`` first, then the shipped one."""
    own = Path.cwd() / "configs"
    return [root for root in dict.fromkeys([own, shipped_configs()]) if root.is_dir()]


def find_config(name: str, folder: Path | None = None) -> Path:
    """The file of a name: a path (``folder`` is where it starts, else the working directory), or a name below configs/.

    Raises:
        UserError: there is none; says where was looked and the nearest name.
    """
    starts = [folder or Path.cwd(), *roots()]
    for start in starts:
        for suffix in ("", *SUFFIXES):
            path = start / f"{name}{suffix}"
            if path.is_file() and path.suffix in SUFFIXES:
                return path.resolve()
    if (starts[0] / name).is_file():
        raise UserError(f"{name}: not a YAML file; a config's name ends in .yaml")
    known = [config_name(path) for root in roots() for path in _files(root)]
    looked = ", ".join(display(start) for start in starts)
    raise UserError(f"{name}: no such config{nearest(name, known)}; looked in {looked}; `recipes list` shows all")


def config_name(path: Path) -> str:
    """``sft/quickstart`` for a file below a configs/ folder, else the file's name without its suffix."""
    for root in roots():
        if path.is_relative_to(root):
            return path.relative_to(root).with_suffix("").as_posix()
    return path.stem


@dataclass(frozen=True)
class Recipe:
    """A recipe as `recipes list` shows it: what its file's header says."""

    name: str
    stage: str
    summary: str
    needs: str
    path: Path


def all_recipes() -> Iterator[Recipe]:
    """Every recipe below the configs/ folders; a name of the user's hides the shipped one."""
    seen: set[str] = set()
    for root in roots():
        for path in _files(root):
            name = config_name(path)
            stage = name.split("/")[0]
            if name in seen or not _is_recipe(path, stage, root):
                continue
            seen.add(name)
            header = read_header(path)
            yield Recipe(name, stage if "/" in name else "-", header.get("", ""), header.get("needs", "-"), path)


def part_names() -> list[str]:
    """Names of what is put on top of a recipe or into it: models, data, strategies, precisions."""
    recipes = {recipe.name for recipe in all_recipes()}
    return sorted({config_name(path) for root in roots() for path in _files(root)} - recipes)


def read_header(path: Path) -> dict[str, str]:
    """The comment that a YAML file begins with: ``""`` is its first line, then ``# Word: text`` by the word."""
    header: dict[str, str] = {}
    last = ""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("#"):
                break
            text = line.lstrip("#").strip()
            word, colon, rest = text.partition(":")
            if not header:
                header[""] = text
            elif colon and word.isalpha() and word[0].isupper():
                last = word.lower()
                header[last] = rest.strip()
            else:
                header[last] = f"{header[last]} {text}".strip()
    return header


def _files(root: Path) -> list[Path]:
    return sorted(path for suffix in SUFFIXES for path in root.rglob(f"*{suffix}"))


def _is_recipe(path: Path, stage: str, root: Path) -> bool:
    if stage in STAGES:
        return True
    # A user's own layout: whatever has a model of its own is a recipe.
    return root != shipped_configs() and any(
        line.startswith("model:") for line in path.read_text(encoding="utf-8", errors="replace").splitlines()
    )
