"""Who may import whom, and how long files and functions may be: read off the sources, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("recipes", "llm_modules", "callbacks")
FLOOR_1 = ("objectives",)
FLOOR_2 = ("zoo", "data", "generation", "evaluation", "strategies")
FLOOR_3 = ("base", "language_model", "preference", "reward", "policy", "distillation")
LONGEST_FILE, LONGEST_FUNCTION = 400, 60
FORBIDDEN_NAMES = ("utils", "helpers", "misc", "common")


def sources() -> dict[str, Path]:
    """Module name -> file, of our packages."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    found = {}
    for file in files:
        parts = file.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


SOURCES = sources()


def imports(name: str, *, only_at_import: bool = False) -> Iterator[str]:
    """The modules that a module names in its imports; for ``from package import x``, the module x where it is one.

    Args:
        only_at_import: leave out what is imported inside functions or for type checkers only.
    """
    stack: list[ast.AST] = [ast.parse(SOURCES[name].read_text(encoding="utf-8"))]
    while stack:
        node = stack.pop()
        if only_at_import and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if only_at_import and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            stack.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import on line {node.lineno}"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in SOURCES else str(node.module)
        stack.extend(ast.iter_child_nodes(node))


def floor(module: str) -> tuple[float, str]:
    """(floor, part) of a module of ours."""
    package, *rest = module.split(".")
    part = rest[0] if rest else ""
    if package == "recipes":
        return 4, "recipes"
    if package == "callbacks":
        return 3, "callbacks"
    for number, parts in ((1, FLOOR_1), (2, FLOOR_2), (3, FLOOR_3)):
        if part in parts:
            return number, part
    return 0, part


def may_import(importer: str, imported: str) -> bool:
    """The table of DESIGN's floors."""
    (own, own_part), (other, other_part) = floor(importer), floor(imported)
    if own_part == other_part or own == 4:
        return True
    if own == 3 and own_part == "callbacks":
        return other < 3
    if own == 3:
        # `base` lies under the modules; no module knows another, the data or the callbacks.
        return other_part == "base" or (other < 3 and other_part != "data")
    return other < own and not (own == 2 and other == 1) if own != 0 else other == 0


def ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_imports_go_down(name: str) -> None:
    if name == "llm_modules":  # the public names, resolved on first use
        assert not [module for module in imports(name, only_at_import=True) if ours(module)]
        return
    wrong = [module for module in imports(name) if ours(module) and module != "llm_modules"]
    assert [module for module in wrong if not may_import(name, module)] == []


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("llm_modules.batch", "llm_modules.logprobs", True),
        ("llm_modules.batch", "llm_modules.objectives", False),
        ("llm_modules.objectives.language", "llm_modules.logprobs", True),
        ("llm_modules.objectives.language", "llm_modules.zoo.backbone", False),
        ("llm_modules.zoo.backbone", "llm_modules.logprobs", True),
        ("llm_modules.zoo.backbone", "llm_modules.data", False),
        ("llm_modules.zoo.backbone", "llm_modules.objectives", False),
        ("llm_modules.language_model", "llm_modules.base", True),
        ("llm_modules.language_model", "llm_modules.generation", True),
        ("llm_modules.language_model", "llm_modules.preference", False),
        ("llm_modules.base", "llm_modules.data", False),
        ("llm_modules.base", "callbacks.samples", False),
        ("callbacks.samples", "llm_modules.generation", True),
        ("callbacks.samples", "llm_modules.language_model", False),
        ("callbacks.samples", "llm_modules.base", False),
        ("callbacks.samples", "recipes.cli", False),
        ("recipes.cli", "llm_modules.language_model", True),
    ],
)
def test_the_table(importer: str, imported: str, allowed: bool) -> None:
    assert may_import(importer, imported) is allowed


@pytest.mark.parametrize("name", sorted(n for n in SOURCES if floor(n)[0] <= 1 and n != "llm_modules"))
def test_the_lowest_floors_know_no_frameworks(name: str) -> None:
    banned = {"lightning", "datasets"} | ({"transformers"} if floor(name)[1] != "tokenizer" else set())
    assert not {module.split(".")[0] for module in imports(name)} & banned


def test_no_circles() -> None:
    graph = {name: {m for m in imports(name, only_at_import=True) if m in SOURCES and m != name} for name in SOURCES}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_files_and_functions_are_short(name: str) -> None:
    text = SOURCES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) < LONGEST_FILE
    long = {
        node.name: node.end_lineno - node.lineno + 1
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None
    }
    assert {function: lines for function, lines in long.items() if lines >= LONGEST_FUNCTION} == {}


def test_files_of_tests_are_short() -> None:
    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "tests").rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length >= LONGEST_FILE} == {}


def test_no_file_is_a_drawer() -> None:
    assert [name for name in SOURCES if name.split(".")[-1] in FORBIDDEN_NAMES] == []


def test_verbs_files_do_not_import_heavy_libraries_at_the_top() -> None:
    """`recipes --help`, `list`, `show` and completion read verbs' flags; that must not import torch."""
    heavy = {"torch", "lightning", "transformers", "datasets", "tokenizers", "numpy", "jsonargparse", "omegaconf"}
    reached, stack = set(), ["recipes.__main__"]
    stack += [
        n for n, file in SOURCES.items() if n.startswith("recipes.") and "\ndef add_arguments(" in file.read_text()
    ]
    while stack:
        name = stack.pop()
        if name in reached:
            continue
        reached.add(name)
        found = set(imports(name, only_at_import=True))
        assert not {module.split(".")[0] for module in found} & heavy, name
        stack += [module for module in found if module in SOURCES]
