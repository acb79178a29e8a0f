"""YAML read into a tree whose every value knows the file and the line, or the flag, that it came from."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from recipes.errors import UserError, nearest, one_line

Key = tuple[str | int, ...]


@dataclass(frozen=True)
class Origin:
    """Where a value was set: a file and its line (counted from 1), or a flag of the command line."""

    file: Path | None = None
    line: int = 0
    flag: str = ""

    def __str__(self) -> str:
        return self.flag if self.file is None else f"{display(self.file)}:{self.line}"

    @property
    def folder(self) -> Path:
        """Where relative names of files start."""
        return Path.cwd() if self.file is None else self.file.parent


@dataclass
class Node:
    """A value with its origin.

    Attributes:
        value: a dict of Nodes, a list of Nodes, or a scalar.
        whole: the content of a file that was named in its place; it replaces what it is put on, it is not merged.
    """

    value: Any
    origin: Origin
    whole: bool = False

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def walk(self, key: Key = ()) -> Iterator[tuple[Key, Node]]:
        """Every node below and including this one, parents first."""
        yield key, self
        if isinstance(self.value, dict | list):
            items = self.value.items() if isinstance(self.value, dict) else enumerate(self.value)
            for name, node in items:
                yield from node.walk((*key, name))

    def copy(self) -> Node:
        if isinstance(self.value, dict):
            return Node({key: node.copy() for key, node in self.value.items()}, self.origin, self.whole)
        if isinstance(self.value, list):
            return Node([node.copy() for node in self.value], self.origin)
        return Node(self.value, self.origin)


_PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, with numbers such as 1e-3, which YAML 1.1 takes for text, and dates left as text."""


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] not in ("tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp")]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^(?:[-+]?(?:[0-9][0-9_]*)\.[0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


def display(path: Path) -> str:
    """A path as short as it can be said: relative to the working directory where it lies below."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def dotted(key: Key) -> str:
    return ".".join(str(part) for part in key)


def read_yaml(path: Path) -> Node:
    """Reads one file.

    Raises:
        UserError: it is not there, not UTF-8, not YAML, or sets a key twice.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{display(path)}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{display(path)}: not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    return _parse(text, Origin(path, 1))


def read_value(text: str, flag: str) -> Node:
    """The value of a flag of the command line, read as YAML. (``""`` stays the empty text.)"""
    origin = Origin(flag=flag)
    return Node("", origin) if text == "" else _parse(text, origin)


def _parse(text: str, origin: Origin) -> Node:
    loader = _Loader(text)
    try:
        tree = loader.get_single_node()
        return Node(None, origin) if tree is None else _convert(loader, tree, origin)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Origin(origin.file, mark.line + 1 if mark else origin.line, origin.flag)
        raise UserError(f"{place}: not valid YAML: {one_line(error.problem or error)}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{origin}: not valid YAML: {one_line(error)}") from error
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{origin}: not valid YAML: {one_line(error)}") from error
    except RecursionError as error:
        raise UserError(f"{origin}: not valid YAML: an alias that contains itself, or nested too deep") from error
    finally:
        loader.dispose()


def _convert(loader: _Loader, tree: yaml.Node, parent: Origin) -> Node:
    origin = Origin(parent.file, tree.start_mark.line + 1, parent.flag)
    if not isinstance(tree, yaml.ScalarNode) and tree.tag not in _PLAIN_TAGS:
        raise UserError(f"{origin}: not valid YAML: the tag {tree.tag} is not allowed")
    if isinstance(tree, yaml.SequenceNode):
        return Node([_convert(loader, item, origin) for item in tree.value], origin)
    if not isinstance(tree, yaml.MappingNode):
        return Node(loader.construct_object(tree), origin)
    _refuse_duplicates(loader, tree, origin)
    loader.flatten_mapping(tree)  # `<<: *anchor`
    mapping: dict[str, Node] = {}
    for key_tree, value_tree in tree.value:
        # The line of a key, not of its value: a mapping's value begins a line later.
        place = Origin(origin.file, key_tree.start_mark.line + 1, origin.flag)
        mapping[str(loader.construct_object(key_tree))] = Node(_convert(loader, value_tree, place).value, place)
    return Node(mapping, origin)


def _refuse_duplicates(loader: _Loader, tree: yaml.MappingNode, origin: Origin) -> None:
    seen: dict[str, int] = {}
    for key_tree, _ in tree.value:
        line = key_tree.start_mark.line + 1
        place = Origin(origin.file, line, origin.flag)
        if not isinstance(key_tree, yaml.ScalarNode):
            raise UserError(f"{place}: a key must be a word, not a list or a mapping")
        key = str(key_tree.value)
        if key in seen and key != "<<":
            raise UserError(f"{place}: `{key}` is set a second time (first on line {seen[key]}); keep one of them")
        seen[key] = line


def unknown_key(place: Origin, key: str, name: str, allowed: list[str]) -> str:
    """The line that says that a key is unknown."""
    choices = ", ".join(allowed)
    return f"{place}: unknown key `{key}`{nearest(name, allowed)}; allowed: {choices}"
