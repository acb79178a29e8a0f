"""The built-in corpus: documentation and source of the installed Python's own standard library.

Real text that is on every machine, so that every recipe can run offline: the modules' source, a reference made of
their docstrings, and the language topics of ``help()``. Files are parsed, never imported, but for a few C modules
without side effects, whose docstrings exist nowhere else.

A tenth of the top-level modules is held out for validation, chosen by a hash of the name, with all their submodules
and accelerators (``decimal`` and ``_pydecimal`` go together); a paragraph that a held-out module shares with another
module is taken out of the training text. Deterministic on a given Python.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
import sysconfig
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

SPLITS = ("train", "validation")

HELD_OUT_SHARE = 0.1
"""Share of the top-level modules that is held out."""

# Tests, bundled wheels, generated tables, machine-specific settings, a text in rot13, third-party packages.
SKIPPED = {
    *("__pycache__", "_bundled", "dist-packages", "encodings", "ensurepip", "idlelib", "idle_test", "lib-dynload"),
    *("lib2to3", "pydoc_data", "site-packages", "test", "tests", "this", "turtledemo", "antigravity", "__phello__"),
    *("sitecustomize", "usercustomize", "_distutils_system_mod"),
}

# Written in C, importing them does nothing but define things.
COMPILED = (
    *("array", "binascii", "builtins", "cmath", "errno", "fcntl", "gc", "grp", "itertools", "math", "marshal", "mmap"),
    *("pwd", "resource", "select", "sys", "syslog", "termios", "time", "unicodedata", "zlib"),
)

# Names of one piece of work: its parts repeat one another's text, so that they are held out together or not at all.
FAMILIES = {
    "pyio": "io",
    "pydecimal": "decimal",
    "pydatetime": "datetime",
    "pylong": "int",
    "py_abc": "abc",
    "collections_abc": "collections",
    "bootsubprocess": "subprocess",
    "sre_compile": "re",
    "sre_constants": "re",
    "sre_parse": "re",
    "ntpath": "os",
    "posixpath": "os",
    "genericpath": "os",
    "nturl2path": "urllib",
    "cProfile": "profile",
    "pstats": "profile",
    "distutils": "sysconfig",
    "cmath": "math",
}

SHARED_PARAGRAPH = 80
"""Characters from which on a paragraph found on both sides of the split counts as the held-out module's text."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a callable: its name with any stars, and the source of its default value."""

    name: str
    default: str | None = None


@dataclass(frozen=True)
class Definition:
    """A documented class, function or method.

    Attributes:
        name: full dotted name, as a user writes it (``json.JSONDecoder.decode``).
        kind: ``class``, ``function``, ``method`` or ``property``.
        parameters: without ``self`` and ``cls``; None for classes, properties, and C functions that do not say.
        doc: the cleaned docstring.
    """

    name: str
    kind: str
    parameters: tuple[Parameter, ...] | None
    doc: str

    @property
    def signature(self) -> str:
        if self.parameters is None:
            return self.name
        shown = (p.name if p.default is None else f"{p.name}={p.default}" for p in self.parameters)
        return f"{self.name}({', '.join(shown)})"


@dataclass(frozen=True)
class Module:
    """One module: its dotted name, docstring, documented public definitions and source ("" for C modules)."""

    name: str
    doc: str
    source: str
    definitions: list[Definition] = field(default_factory=list)

    @property
    def family(self) -> str:
        top = self.name.split(".")[0].lstrip("_")
        return FAMILIES.get(top, top)


def documents(split: str) -> Iterator[dict[str, str]]:
    """The documents of ``train`` or ``validation``: ``{"text", "id"}``, in a fixed order.

    Raises:
        ValueError: an unknown split, or a Python without the source of its standard library.
    """
    check_split(split)
    foreign = _held_out_paragraphs() if split == "train" else frozenset()
    for name, text in _texts(split):
        own = text if not foreign else without_paragraphs(text, foreign)
        if own.strip():
            yield {"text": own, "id": name}


def conversations(split: str) -> Iterator[dict[str, Any]]:
    """Questions and answers about the documented names of ``train`` or ``validation``: ``{"messages", "id"}``.

    Raises:
        ValueError: as ``documents``.
    """
    from llm_modules.data.python_questions import questions, sentences

    check_split(split)
    held_out = [module for module in modules() if is_held_out(module.family)]
    if split == "validation":
        return questions(held_out)
    own = (module for module in modules() if not is_held_out(module.family))
    return questions(own, foreign=sentences(held_out))


def preferences(split: str) -> Iterator[dict[str, Any]]:
    """Questions with the right answer and a wrong one: ``{"messages", "chosen", "rejected", "id"}``.

    Raises:
        ValueError: as ``documents``.
    """
    from llm_modules.data.python_questions import with_wrong_answers

    return with_wrong_answers(conversations(split))


def check_split(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is not one of {', '.join(SPLITS)} (built-in corpus)")


def is_held_out(family: str) -> bool:
    """Whether a top-level module belongs to validation: the same answer on every machine and Python version."""
    digest = hashlib.sha256(f"held out: {family}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64


def without_paragraphs(text: str, foreign: frozenset[bytes]) -> str:
    """``text`` without the paragraphs whose fingerprint is in ``foreign``."""
    return "\n\n".join(part for part in text.split("\n\n") if _fingerprint(part) not in foreign)


@lru_cache(maxsize=1)
def _held_out_paragraphs() -> frozenset[bytes]:
    parts = (part for _, text in _texts("validation") for part in text.split("\n\n"))
    return frozenset(mark for part in parts if (mark := _fingerprint(part)))


def _fingerprint(paragraph: str) -> bytes:
    words = " ".join(paragraph.split())
    return hashlib.sha256(words.encode()).digest() if len(words) >= SHARED_PARAGRAPH else b""


def _texts(split: str) -> Iterator[tuple[str, str]]:
    held_out = split == "validation"
    for module in modules():
        if is_held_out(module.family) != held_out:
            continue
        if reference := _reference(module):
            yield f"reference/{module.name}", reference
        if module.source:
            yield f"source/{module.name}", module.source
    if not held_out:
        yield from _topics()


def _reference(module: Module) -> str:
    """The module's documentation as one page: its docstring, then each definition's signature and docstring."""
    if not module.definitions:
        return ""  # a bare module docstring is in the source already
    parts = [f"{module.name}\n{'=' * len(module.name)}"]
    if module.doc:
        parts.append(module.doc)
    for definition in module.definitions:
        indented = "\n".join(f"    {line}" if line else "" for line in definition.doc.splitlines())
        head = f"class {definition.signature}" if definition.kind == "class" else definition.signature
        parts.append(f"{head}\n{indented}")
    return "\n\n".join(parts) + "\n"


def _topics() -> Iterator[tuple[str, str]]:
    """The chapters of the language reference that ``help()`` shows. Some distributions leave them out."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        return
    seen: set[str] = set()
    for name in sorted(topics):
        text = topics[name].strip() + "\n"
        if text not in seen:
            seen.add(text)
            yield f"topic/{name}", text


@lru_cache(maxsize=1)
def modules() -> tuple[Module, ...]:
    """Every module of the corpus, sorted by name.

    Raises:
        ValueError: this Python has no readable source of its standard library (a zipped or stripped one).
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = {module.name: module for path in _source_files(root) if (module := _read(path, root))}
    if len(found) < 20:
        raise ValueError(
            f"builtin:python-docs: no standard library source in {str(root)!r} (stdlib path of {sys.executable}); "
            "use a Python that keeps its .py files"
        )
    for name in COMPILED:
        if name not in found and (compiled := _inspect(name)):
            found[name] = compiled
    return tuple(found[name] for name in sorted(found))


def _source_files(root: Path) -> Iterable[Path]:
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        generated = parts[0].startswith(("_sysconfigdata", "_sysconfig_vars", "config-"))
        if not generated and not SKIPPED.intersection(parts) and not any(p.startswith("test_") for p in parts):
            yield path


def _read(path: Path, root: Path) -> Module | None:
    """The module in a file; None where it is no UTF-8, no Python, or mostly one table."""
    try:
        source = path.read_bytes().decode("utf-8").replace("\r\n", "\n")
        tree = ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError):
        return None
    lines = source.count("\n") + 1
    longest = max(
        ((node.end_lineno or 0) - node.lineno for node in tree.body if isinstance(node, ast.Assign)), default=0
    )
    if not source.strip() or (longest > 200 and longest > 0.5 * lines):
        return None
    parts = path.relative_to(root).with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    return Module(name, ast.get_docstring(tree) or "", source, list(_definitions(tree, name)))


def _definitions(tree: ast.Module, module: str) -> Iterator[Definition]:
    if any(part.startswith("_") for part in module.split(".")):
        return  # private modules are text for pre-training, not names that anybody asks for
    seen: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            found = [_definition(node, f"{module}.{node.name}", "class")]
            methods = (child for child in node.body if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))
            if not node.name.startswith("_"):
                found += [_definition(child, f"{module}.{node.name}.{child.name}", "method") for child in methods]
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found = [_definition(node, f"{module}.{node.name}", "function")]
        else:
            continue
        for definition in found:
            if definition and definition.name not in seen:
                seen.add(definition.name)
                yield definition


def _definition(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, name: str, kind: str) -> Definition | None:
    doc = ast.get_docstring(node)
    if not doc or not doc.strip() or node.name.startswith("_"):
        return None
    if isinstance(node, ast.ClassDef):
        return Definition(name, kind, None, doc)
    marks = {ast.unparse(mark).rpartition(".")[2] for mark in node.decorator_list}
    if marks & {"property", "cached_property", "abstractproperty", "DynamicClassAttribute"}:
        return Definition(name, "property", None, doc)
    if marks & {"setter", "deleter", "overload"}:
        return None
    static = "staticmethod" in marks
    parameters = list(_parameters(node.args))
    return Definition(name, kind, tuple(parameters[1:] if kind == "method" and not static else parameters), doc)


def _parameters(arguments: ast.arguments) -> Iterator[Parameter]:
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    for place, (argument, default) in enumerate(zip(positional, defaults, strict=True), 1):
        yield Parameter(argument.arg, None if default is None else ast.unparse(default))
        if place == len(arguments.posonlyargs):
            yield Parameter("/")
    if arguments.vararg:
        yield Parameter(f"*{arguments.vararg.arg}")
    elif arguments.kwonlyargs:
        yield Parameter("*")
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield Parameter(argument.arg, None if default is None else ast.unparse(default))
    if arguments.kwarg:
        yield Parameter(f"**{arguments.kwarg.arg}")


def _inspect(name: str) -> Module | None:
    """A module written in C, from its docstrings; None where this Python has none."""
    try:
        module = importlib.import_module(name)
    except ImportError:
        return None
    found: list[Definition] = []
    for key in sorted(vars(module)):
        value = vars(module)[key]
        if key.startswith("_") or not callable(value):
            continue
        kind = "class" if inspect.isclass(value) else "function"
        owner = key if name == "builtins" else f"{name}.{key}"
        if getattr(value, "__module__", name) != name or (kind == "class" and issubclass(value, BaseException)):
            continue
        found += _described(value, owner, kind)
        if kind == "class":
            methods = ((part, vars(value)[part]) for part in sorted(vars(value)) if not part.startswith("_"))
            found += [
                d
                for part, method in methods
                if callable(method)
                for d in _described(method, f"{owner}.{part}", "method")
            ]
    return Module(name, inspect.cleandoc(module.__doc__ or ""), "", found)


def _described(value: Any, name: str, kind: str) -> list[Definition]:
    doc = value.__doc__
    if not isinstance(doc, str) or not doc.strip():
        return []
    parameters: tuple[Parameter, ...] | None = None
    if kind != "class":
        try:
            shown = inspect.signature(value).parameters.values()
        except (TypeError, ValueError, AttributeError):  # C functions without a text signature, or with a broken one
            return [Definition(name, kind, None, inspect.cleandoc(doc))]
        parameters = tuple(
            Parameter(str(p).split("=")[0], None if p.default is p.empty else repr(p.default))
            for p in shown
            if p.name not in ("self", "cls")
        )
    return [Definition(name, kind, parameters, inspect.cleandoc(doc))]
