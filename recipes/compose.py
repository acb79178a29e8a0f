"""A recipe's YAML, overlays and flags merged into one config that knows where each value came from. No torch here.

The rules, in order: a mapping is merged into a mapping; anything else replaces; ``key+`` appends to a list (or merges
into what a file brought); another ``class_path`` drops the earlier class's arguments; the name of a .yaml file stands
for its content and replaces what was there; ``${a.b}`` and ``${oc.env:NAME,default}`` are filled in last.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from recipes.config_names import SUFFIXES, config_name, find_config
from recipes.errors import UserError, one_line
from recipes.yaml_tree import Key, Node, Origin, dotted, read_value, read_yaml, unknown_key

TOP_LEVEL = {
    "seed_everything": "seed of weights, data order and dropout",
    "tokenizer": "folder, hub id or builtin:bytes; set once for model and data",
    "sequence_length": "longest row in tokens; set once for model and data",
    "model": "the LightningModule: class_path and init_args",
    "data": "the LightningDataModule: class_path and init_args",
    "trainer": "Lightning's Trainer: max_steps, precision, devices, strategy, ...",
    "checkpoint": "when checkpoints are written and how many are kept",
    "leave_out": "default callbacks that are not wanted: [ExportFolder, ...]",
    "runs_dir": "folder that runs are written below",
}
LINKED = {"seed_everything": "seed", "tokenizer": "tokenizer", "sequence_length": "sequence_length"}
_CLASS_KEYS = {"class_path", "init_args", "dict_kwargs"}
_CLASS_NAME = re.compile(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*")
_REFERENCE = re.compile(r"(?<!\\)\$\{([A-Za-z_][\w.]*)\}")


@dataclass
class Composed:
    """A merged config.

    Attributes:
        name: of the recipe, which names its runs' folder too.
        files: recipe and overlays, in the order they were put on top of one another.
        root: the merged tree.
        values: the same as plain values, interpolations filled in and links made.
    """

    name: str
    files: list[Path]
    root: Node
    values: dict[str, Any] = field(default_factory=dict)

    def origin(self, key: Key) -> Origin:
        """Where a key was set, or the nearest key above it."""
        node = self.root
        origin = node.origin
        for part in key:
            try:
                node = node.value[part]
            except (KeyError, IndexError, TypeError):
                break
            origin = node.origin
        return origin


def compose(
    names: Sequence[str],
    overrides: Sequence[tuple[str, str]] = (),
    allowed: Sequence[str] | None = tuple(TOP_LEVEL),
) -> Composed:
    """Merges configs and flags.

    Args:
        names: the recipe, then its overlays; paths or names below configs/.
        overrides: dotted keys and their values as YAML text; short forms such as ``data.batch_size`` are understood.
        allowed: the top-level keys that there are; None: any.

    Raises:
        UserError: a file or key is wrong; one line a problem.
    """
    root = Node({}, Origin(flag="command line"))
    files = [find_config(name) for name in names]
    for file in files:
        tree = expand_files(read_yaml(file))
        if tree.value is None:
            raise UserError(f"{Origin(file, 1)}: the file is empty")
        if not isinstance(tree.value, dict):
            raise UserError(f"{tree.origin}: a config is a mapping of keys, not a {type(tree.value).__name__}")
        root = merge(root, tree)
    for key, text in _classes_first(overrides):
        root = merge(root, _override(root, key, text))
    resolve_pluses(root)
    if allowed is not None:
        _check_top_level(root, allowed)
    composed = Composed(_run_name(files), files, root)
    link(composed)
    composed.values = interpolate(root)
    return composed


def _run_name(files: list[Path]) -> str:
    """The recipe's name; that of the run where the config is one that a run left behind."""
    if not files:
        return "recipe"
    folder = files[0].parent
    if files[0].name == "config.yaml" and (folder / "environment.json").is_file():
        import json

        return str(json.loads((folder / "environment.json").read_text(encoding="utf-8")).get("recipe", "config"))
    return config_name(files[0])


# --- merging --------------------------------------------------------------------------------------------------------


def merge(base: Node, over: Node) -> Node:
    """``over`` put on top of ``base``; neither is changed."""
    if over.whole:
        return over.copy()
    if isinstance(over.value, dict) and is_class_name(base.value):
        base = Node({"class_path": base}, base.origin)
    if over.value is not None and isinstance(base.value, dict) and "class_path" in base.value:
        over = _as_class(base, over)
    if not isinstance(base.value, dict) or not isinstance(over.value, dict) or _replaces(base, over):
        return over.copy()
    merged = {key: node.copy() for key, node in base.value.items()}
    for key, node in sorted(over.value.items(), key=lambda item: item[0].endswith("+")):
        name, plus = key.removesuffix("+"), key.endswith("+")
        if plus and name in merged:
            merged[name] = _append(merged[name], node, name)
        elif plus:
            merged[key] = _append(merged[key], node, name) if key in merged else node.copy()
        else:
            merged.pop(f"{name}+", None)
            merged[name] = merge(merged[name], node) if name in merged else node.copy()
    return Node(merged, over.origin)


def _as_class(base: Node, over: Node) -> Node:
    """The short forms of a change to a class: its name alone, or its arguments without ``init_args``."""
    if is_class_name(over.value):
        return Node({"class_path": over}, over.origin)
    if isinstance(over.value, dict) and "class_path" not in over.value:
        short = {key: node for key, node in over.value.items() if key.removesuffix("+") not in _CLASS_KEYS}
        if short:
            rest = {key: node for key, node in over.value.items() if key not in short}
            arguments = rest.get("init_args", Node({}, over.origin))
            rest["init_args"] = Node({**arguments.value, **short}, arguments.origin)
            return Node(rest, over.origin)
    return over


def _is_class(node: Node) -> bool:
    """Whether a value is a class with its arguments, or the name of a class alone."""
    return is_class_name(node.value) or (isinstance(node.value, dict) and "class_path" in node.value)


def is_class_name(value: Any) -> bool:
    """Whether a value reads as the name of a class: ``AdamW``, ``my_loss.MyLoss``."""
    return isinstance(value, str) and _CLASS_NAME.fullmatch(value) is not None


def _replaces(base: Node, over: Node) -> bool:
    """Whether a mapping replaces another because it names another class."""
    if "class_path" not in over.value or "class_path" not in base.value:
        return "class_path" in over.value and bool(base.value)
    new, old = str(over.value["class_path"].value), str(base.value["class_path"].value)
    # A bare name stands for the class of that name.
    return new != old and not ("." not in new and old.endswith(f".{new}"))


def _append(base: Node, over: Node, name: str) -> Node:
    if isinstance(base.value, dict) and isinstance(over.value, dict):
        return merge(base, over)
    if base.value is not None and not isinstance(base.value, list):
        raise UserError(f"{over.origin}: `{name}+` appends to a list, but `{name}` ({base.origin}) is no list")
    added = over.value if isinstance(over.value, list) else [over]
    return Node([node.copy() for node in [*(base.value or []), *added]], over.origin)


def resolve_pluses(node: Node) -> None:
    """Makes what is left of ``key+`` (nothing was there to append to) into lists or mappings of their own, in place."""
    if isinstance(node.value, list):
        for item in node.value:
            resolve_pluses(item)
    if not isinstance(node.value, dict):
        return
    for key in [key for key in node.value if key.endswith("+")]:
        over, name = node.value.pop(key), key.removesuffix("+")
        node.value[name] = _append(node.value.get(name, Node(None, over.origin)), over, name)
    for value in node.value.values():
        resolve_pluses(value)


def expand_files(node: Node, seen: tuple[Path, ...] = ()) -> Node:
    """Puts the content of .yaml files in the place of their names, which are relative to the file that names them."""
    if isinstance(node.value, dict):
        return Node(
            {key: value if _is_path_key(key) else expand_files(value, seen) for key, value in node.value.items()},
            node.origin,
        )
    if isinstance(node.value, list):
        return Node([expand_files(item, seen) for item in node.value], node.origin)
    if not isinstance(node.value, str) or not node.value.endswith(SUFFIXES) or "\n" in node.value:
        return node
    try:
        path = find_config(node.value, node.origin.folder)
    except UserError as error:
        raise UserError(f"{node.origin}: {error}") from error
    if path in seen:
        raise UserError(f"{node.origin}: {node.value} refers to itself")
    content = expand_files(read_yaml(path), (*seen, path))
    return Node(content.value, content.origin, whole=True)


def _is_path_key(key: str) -> bool:
    """Keys whose text names a file to be opened by whoever reads the key, not a part of the config."""
    return key.removesuffix("+").endswith(("path", "file", "dir"))


# --- flags ----------------------------------------------------------------------------------------------------------


def _classes_first(overrides: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """A flag ``--data.class_path`` before those below ``data.``, which are meant for that class: a class drops the
    arguments that another was given."""
    found: list[tuple[str, str]] = []
    for key, text in overrides:
        place = len(found)
        if key.endswith(".class_path"):
            own, keys = _short(key), [_short(other) for other, _ in found]
            owner = own.removesuffix("class_path")
            place = next((at for at, other in enumerate(keys) if other.startswith(owner) and other != own), place)
        found.insert(place, (key, text))
    return found


def _short(key: str) -> str:
    return ".".join(part for part in key.split(".") if part != "init_args")


def _override(root: Node, key: str, text: str, flag: str = "") -> Node:
    """The tree that sets one dotted key, in the long form that the config has at that place."""
    flag = flag or f"--{key}"
    parts = key.split(".")
    if not all(parts):
        raise UserError(f"{flag}: not a key; write --trainer.max_steps 10")
    node: Node | None = root
    full: list[str] = []
    for part in parts:
        name = part.removesuffix("+")
        if node is not None and name not in _CLASS_KEYS and _is_class(node):
            full.append("init_args")
            node = node.value.get("init_args") if isinstance(node.value, dict) else None
        if node is not None and isinstance(node.value, list):
            return _override_item(root, full, parts[parts.index(part) :], text, flag)
        full.append(part)
        node = node.value.get(name) if node is not None and isinstance(node.value, dict) else None
    if _is_path_key(parts[-1]) and text != "null":
        value = Node(text, Origin(flag=flag))  # as it is: `*.jsonl` would be an alias in YAML
    else:
        value = expand_files(read_value(text, flag))
    return _nest(full, value)


def _override_item(root: Node, full: list[str], rest: list[str], text: str, flag: str) -> Node:
    """A flag that goes through a list: ``--data.sources.0.path x`` replaces the list by one with that item changed."""
    items = root
    for part in full:
        items = items.value[part]
    index = rest[0]
    if not index.isdigit() or int(index) >= len(items.value):
        has = f"0 to {len(items.value) - 1}" if items.value else "none"
        raise UserError(f"{flag}: `{dotted(tuple(full))}` is a list; `{index}` is not one of its items ({has})")
    changed = [item.copy() for item in items.value]
    if len(rest) == 1:
        changed[int(index)] = expand_files(read_value(text, flag))
    else:
        item = changed[int(index)]
        over = _override(item, ".".join(rest[1:]), text, flag)
        changed[int(index)] = merge(item, over)
    return _nest(full, Node(changed, items.origin))


def _nest(key: Sequence[str], value: Node) -> Node:
    for part in reversed(key):
        value = Node({part: value}, value.origin)
    return value


# --- the whole ------------------------------------------------------------------------------------------------------


def _check_top_level(root: Node, allowed: Sequence[str]) -> None:
    lines = [
        unknown_key(node.origin, key, key, list(allowed)) for key, node in root.value.items() if key not in allowed
    ]
    if lines:
        raise UserError("\n".join(lines))


def link(composed: Composed) -> None:
    """Copies what model and data share from the top level to both.

    Raises:
        UserError: one of them has another value of its own.
    """
    problems = []
    for top, name in LINKED.items():
        shared = composed.root.value.get(top)
        if shared is None or shared.value is None:
            continue
        for part in ("model", "data"):
            target = composed.root.value.get(part)
            if target is None or not isinstance(target.value, dict) or "class_path" not in target.value:
                continue
            arguments = target.value.get("init_args")
            if arguments is None or arguments.value is None:
                arguments = target.value["init_args"] = Node({}, target.origin)
            own = arguments.value.get(name)
            if own is not None and own.plain() != shared.plain():
                problems.append(
                    f"{own.origin}: `{part}.init_args.{name}` is {own.plain()!r}, but `{top}` ({shared.origin}), which "
                    f"model and data share, is {shared.plain()!r}; set `{top}` alone"
                )
            arguments.value[name] = shared.copy()
    if problems:
        raise UserError("\n".join(problems))


def interpolate(root: Node) -> dict[str, Any]:
    """The plain values with ``${...}`` filled in (omegaconf's syntax; short forms of keys are understood)."""
    values = root.plain()
    texts = [(key, node) for key, node in root.walk() if isinstance(node.value, str) and "${" in node.value]
    if not texts:
        return values
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    lengthened = _substitute(root, values)
    config = OmegaConf.create(lengthened)
    for key, node in texts:
        try:
            OmegaConf.select(config, "".join(f"[{part}]" for part in key), throw_on_missing=True)
        except OmegaConfBaseException as error:
            reason = one_line(str(error).splitlines()[0])
            raise UserError(f"{node.origin}: `{dotted(key)}` is {node.value!r}: {reason}") from error
    resolved = OmegaConf.to_container(config, resolve=True)
    assert isinstance(resolved, dict)
    return resolved  # type: ignore[return-value]


def _substitute(root: Node, value: Any) -> Any:
    """Writes references in the long form: ``${data.batch_size}`` as ``${data.init_args.batch_size}``."""
    if isinstance(value, dict):
        return {key: _substitute(root, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_substitute(root, item) for item in value]
    if not isinstance(value, str):
        return value
    return _REFERENCE.sub(lambda match: "${" + long_key(root, match[1]) + "}", value)


def long_key(root: Node, key: str) -> str:
    """``model.optimizer.lr`` as ``model.init_args.optimizer.init_args.lr`` where these are classes."""
    node: Node | None = root
    full: list[str] = []
    for part in key.split("."):
        if node is not None and part not in _CLASS_KEYS and _is_class(node):
            full.append("init_args")
            node = node.value.get("init_args") if isinstance(node.value, dict) else None
        full.append(part)
        node = node.value.get(part) if node is not None and isinstance(node.value, dict) else None
    return ".".join(full)
