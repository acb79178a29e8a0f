"""Why a config does not fit: every wrong key and value with its place, found by walking config and signatures together.

jsonargparse checks the config; what it says of a nested mistake is a page of alternatives. This walks down to the
mistake itself.
"""

from __future__ import annotations

import argparse
import collections.abc
import dataclasses
import difflib
import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from recipes.compose import LINKED, Composed, is_class_name
from recipes.errors import UserError, near, nearest, one_line
from recipes.yaml_tree import Key, dotted

_LISTS = (list, tuple, set, collections.abc.Sequence, collections.abc.Iterable)


@dataclass(frozen=True)
class Field:
    """One argument of a class as jsonargparse sees it.

    Attributes:
        type: its type hint.
        default: its default; `inspect.Parameter.empty` where it must be given.
        help: its line of the class's docstring.
    """

    name: str
    type: Any
    default: Any
    help: str


def fields_of(kind: Any, skip: int = 0) -> dict[str, Field]:
    """The arguments of a class or function, those that it passes on to its bases included.

    Args:
        skip: so many of the first ones are given by others (an optimizer's parameters).
    """
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    add = parser.add_class_arguments if inspect.isclass(kind) else parser.add_function_arguments
    add(kind, fail_untyped=False, skip={skip} if skip else set())
    return {action.dest: _field(action.dest, action) for action in _actions(parser) if "." not in action.dest}


def group_fields(parser: ArgumentParser, group: str) -> dict[str, Field]:
    """The arguments below one top-level key of the parser (`trainer`)."""
    actions = {a.dest.removeprefix(f"{group}."): a for a in _actions(parser) if a.dest.startswith(f"{group}.")}
    return {name: _field(name, action) for name, action in actions.items() if "." not in name}


def _actions(parser: ArgumentParser) -> list[argparse.Action]:
    # An argument may be called `config` too, so what is none is told by its kind.
    other = ("_HelpAction", "_ActionHelpClassPath", "ActionConfigFile", "_ActionPrintConfig")
    return [action for action in parser._actions if type(action).__name__ not in other]


def _field(name: str, action: argparse.Action) -> Field:
    kind = getattr(action, "_typehint", None)
    record = getattr(action, "basetype", None)  # of a dataclass jsonargparse makes a group of arguments
    if record is not None:
        return Field(name, record, {}, one_line((record.__doc__ or "").partition("\n\n")[0]))
    if kind is None:
        kind = action.type if action.type is not None else Any
    required = getattr(action, "_required", False) or action.required
    default = inspect.Parameter.empty if required else action.default
    text = "" if action.help in (None, argparse.SUPPRESS) else one_line(action.help)
    return Field(name, kind, default, re.sub(r"\s*\(required.*?\)|\s*\(type: .*$", "", text))


def find_class(path: str, bases: list[type] | None = None) -> Any:
    """The class or function of a ``class_path``; a bare name is looked up among the subclasses of ``bases``.

    Raises:
        UserError: there is no such module or name in it.
    """
    module_name, _, name = path.rpartition(".")
    if not module_name:
        known = {found.__name__: found for base in bases or [] for found in _subclasses(base)}
        if path not in known:
            raise UserError(
                f"no class is named `{path}`{nearest(path, known)}; write it with its module: my_file.{path}"
            )
        return known[path]
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # Another module missing, somewhere inside the one that was asked for, is not a mistake of the config.
        if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise
        raise UserError(
            f"there is no module `{error.name}`; the working directory and installed packages are searched"
        ) from error
    if not hasattr(module, name):
        names = {other for other in dir(module) if not other.startswith("_")} | set(getattr(module, "__all__", ()))
        raise UserError(f"module `{module_name}` has no `{name}`{nearest(name, names)}")
    return getattr(module, name)


def _subclasses(base: type) -> Iterator[type]:
    yield base
    found: list[type] = type.__subclasses__(base)
    for below in found:
        yield from _subclasses(below)


class Diagnosis:
    """The problems of one config.

    Args:
        parser: that refused it.
        composed: the config with its origins.
        values: its plain values.
    """

    def __init__(self, parser: ArgumentParser, composed: Composed, values: Mapping[str, Any]) -> None:
        self.composed = composed
        self.problems: list[str] = []
        self._wrong_tops: set[str] = set()
        self._found = 0  # problems, those that were said elsewhere included
        tops = {a.dest: _field(a.dest, a) for a in _actions(parser) if "." not in a.dest}
        groups = {a.dest.split(".")[0] for a in _actions(parser) if "." in a.dest}
        for name in sorted(values, key=lambda name: name not in LINKED):  # what is shared comes first
            value = values[name]
            if name in groups:
                self._mapping((name,), group_fields(parser, name), value, f"`{name}`")
            elif name in tops:
                before = self._found
                self._value((name,), tops[name].type, value)
                if self._found > before:
                    self._wrong_tops.add(name)
        for name, field in tops.items():
            if name not in groups and field.default is inspect.Parameter.empty and name not in values:
                self.problems.append(f"`{name}`: missing; a recipe needs it")

    def _say(self, key: Key, text: str) -> None:
        self._found += 1
        self.problems.append(f"{self.composed.origin(key)}: {text}")

    def _mapping(self, key: Key, fields: dict[str, Field], value: Any, owner: str) -> None:
        """A mapping of arguments: none unknown, none missing, each of its type."""
        if value is None:
            value = {}
        if not isinstance(value, Mapping):
            self._say(key, f"`{dotted(key)}` is {short(value)}; a mapping of arguments is asked for")
            return
        for name, item in value.items():
            if name in fields:
                self._value((*key, name), fields[name].type, item)
            else:
                self._unknown((*key, name), fields, owner)
        meant = {near(str(name), fields) for name in value if name not in fields}  # of which that is said already
        missing = [n for n, f in fields.items() if f.default is inspect.Parameter.empty and n not in {*value, *meant}]
        for name in missing:
            self._say(key, f"`{dotted((*key, name))}` is missing; {owner} needs it")

    def _unknown(self, key: Key, fields: dict[str, Field], owner: str) -> None:
        name = str(key[-1])
        tops = {linked: top for top, linked in LINKED.items()}
        origin = self.composed.origin(key)
        if name in tops and origin == self.composed.origin((tops[name],)):
            self._say(
                key, f"`{tops[name]}` is shared with `{key[0]}`, but {owner} has no argument `{name}`; give it one"
            )
            return
        self._say(key, f"unknown key `{dotted(key)}`{nearest(name, fields)}; {owner} has {_some(name, fields, key)}")

    def _value(self, key: Key, kind: Any, value: Any) -> None:
        """One value: as deep as config and types go together, else the whole of it."""
        if self._said_at_the_top(key):
            self._found += 1
            return
        before = self._found
        options = list(_options(kind))
        if isinstance(value, Mapping) and "class_path" in value:
            self._class(key, options, value)
        elif is_class_name(value) and _wanted_classes(options) and not _accepts(kind, value):
            self._class(key, options, {"class_path": value})
        elif (record := record_of(kind)) is not None and isinstance(value, Mapping):
            self._mapping(key, fields_of(record), value, f"`{record.__name__}`")
        elif record is not None and set(options) <= {record, type(None)} and not (value is None and len(options) > 1):
            self._say(key, f"`{dotted(key)}` is {short(value)}; allowed: {describe(kind)}")
        elif isinstance(value, list) and (items := [o for o in options if typing.get_origin(o) in _LISTS]):
            for index, item in enumerate(value):
                self._value((*key, index), (typing.get_args(items[0]) or (Any,))[0], item)
        if self._found == before and not _accepts(kind, value):
            why = _no_function(options, value) or f"allowed: {describe(kind)}"
            self._say(key, f"`{dotted(key)}` is {short(value)}; {why}")

    def _said_at_the_top(self, key: Key) -> bool:
        """Whether a value is the copy of a shared one that was found wrong already."""
        tops = {linked: top for top, linked in LINKED.items()}
        if len(key) != 3 or key[1] != "init_args" or key[2] not in tops:
            return False
        top = tops[str(key[2])]
        return top in self._wrong_tops and self.composed.origin(key) == self.composed.origin((top,))

    def _class(self, key: Key, options: list[Any], value: Mapping[str, Any]) -> None:
        path, wanted = value["class_path"], _wanted_classes(options)
        where = (*key, "class_path")
        if not isinstance(path, str):
            self._say(where, f"`{dotted(where)}` is {short(path)}; the name of a class is asked for: module.Class")
            return
        try:
            found = find_class(path, wanted)
        except UserError as error:
            self._say(where, f"`{dotted(where)}` is {path}: {error}")
            return
        if inspect.isclass(found) and wanted and not any(issubclass(found, base) for base in wanted):
            names = " or ".join(base.__name__ for base in wanted)
            self._say(where, f"`{dotted(where)}` is {path}, which is no {names}")
            return
        if not inspect.isclass(found) and wanted and not _makes(found, wanted, options):
            names = " or ".join(base.__name__ for base in wanted)
            self._say(
                where, f"`{dotted(where)}` is {path}, a {type(found).__name__}, no {names}{_wrapped(wanted, path)}"
            )
            return
        for name in value.keys() - {"class_path", "init_args", "dict_kwargs"}:
            self._say((*key, name), f"unknown key `{dotted((*key, name))}`; beside class_path there is init_args")
        skip = 1 if any(_is_callable(option) for option in options) else 0
        self._mapping(
            (*key, "init_args"), fields_of(found, skip), value.get("init_args"), f"`{path.rpartition('.')[2]}`"
        )


def _makes(function: Any, wanted: list[type], options: list[Any]) -> bool:
    """Whether a function stands for a class: it says that it returns one of those, or a callable is asked for."""
    made = getattr(function, "__annotations__", {}).get("return")
    returns = inspect.isclass(made) and any(issubclass(made, base) for base in wanted)
    return callable(function) and (isinstance(made, str) or returns or any(_is_callable(option) for option in options))


def _wrapped(wanted: list[type], path: str) -> str:
    """How a function is given where the wanted class has one for functions."""
    if [base.__name__ for base in wanted] != ["Reward"]:
        return ""
    reward = "llm_modules.evaluation.FunctionReward"
    return f"; a function goes in {{class_path: {reward}, init_args: {{function: {path}}}}}"


def _some(name: str, fields: dict[str, Field], key: Key) -> str:
    """The arguments that there are, or, of many, those most like the name."""
    if len(fields) <= 12:
        return ", ".join(fields) or "no arguments"
    alike = difflib.get_close_matches(name, list(fields), n=6, cutoff=0.0)
    owner = dotted(tuple(part for part in key[:-1] if part != "init_args"))
    return f"{', '.join(alike)}, ... (`recipes fit --help {owner}` lists all {len(fields)})"


def _options(kind: Any) -> Iterator[Any]:
    """The members of a union, or the type itself."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        for member in typing.get_args(kind):
            yield from _options(member)
    else:
        yield kind


def record_of(kind: Any) -> Any:
    """The dataclass that a type asks for, or None."""
    return next(
        (option for option in _options(kind) if inspect.isclass(option) and dataclasses.is_dataclass(option)), None
    )


def _is_callable(kind: Any) -> bool:
    return typing.get_origin(kind) in (Callable, typing.get_origin(Callable[[], int]))


def _no_function(options: list[Any], value: Any) -> str:
    """Why a name means no function, where one is asked for; empty where that is not what is wrong."""
    if not isinstance(value, str) or "." not in value or not any(map(_is_callable, options)):
        return ""
    try:
        found = find_class(value)
    except UserError as error:
        return str(error)
    return "" if callable(found) else f"a function is asked for, and this is of type {type(found).__name__}"


def _wanted_classes(options: list[Any]) -> list[type]:
    """The classes of which a subclass is asked for; of a callable that which it returns."""
    wanted = []
    for option in options:
        if _is_callable(option):
            returned = (typing.get_args(option) or (Any,))[-1]
            wanted += _wanted_classes(list(_options(returned)))
        elif (
            inspect.isclass(option)
            and option.__module__ not in ("builtins", "pathlib")
            and typing.get_origin(option) is None
        ):
            wanted.append(option)
    return wanted


def _accepts(kind: Any, value: Any) -> bool:
    if value is None and kind in (bool, int, float, str):
        return False  # which jsonargparse says of a class's argument only
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    try:
        parser.add_argument("--value", type=kind)
    except ValueError:
        return True  # a type that jsonargparse does not check
    try:
        parser.parse_object(Namespace(value=deepcopy(value)))  # it changes what it is given
    except (argparse.ArgumentError, TypeError, ValueError):
        return False
    return True


def describe(kind: Any) -> str:
    """A type in words: ``a whole number or nothing``."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", type(None): "null"}
    names = []
    for option in _options(kind):
        origin, arguments = typing.get_origin(option), typing.get_args(option)
        if option in words:
            names.append(words[option])
        elif origin is typing.Literal:
            names += [str(argument) for argument in arguments]
        elif _is_callable(option) and (made := _wanted_classes([option])):
            names.append(f"a class_path of {made[0].__name__}")
        elif origin in _LISTS and arguments:
            names.append(f"a list of ({describe(arguments[0])})")
        elif inspect.isclass(option) and dataclasses.is_dataclass(option):
            names.append(f"a mapping of {', '.join(fields_of(option))}")
        elif inspect.isclass(option):
            names.append(f"a class_path of {option.__name__}" if option.__module__ != "builtins" else option.__name__)
        else:
            names.append(re.sub(r"\b(?:\w+\.)+(\w+)", r"\1", str(option)))
    return " or ".join(dict.fromkeys(names))


def short(value: Any) -> str:
    """A value, cut where it is long."""
    text = one_line(repr(value))
    return text if len(text) <= 60 else f"{text[:57]}..."
