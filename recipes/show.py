"""recipes show: a recipe's file and what it resolves to, each value with its origin; with --model or --data, built."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from recipes.compose import TOP_LEVEL, Composed, compose
from recipes.redaction import redact_config
from recipes.yaml_tree import Key, display

TAKES_OVERRIDES = True  # `--dotted.key value` is understood, as by fit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", help="the recipe: a path, or a name below configs/")
    parser.add_argument("-c", "--config", action="append", default=[], metavar="OVERLAY", help="put on top, in order")
    parser.add_argument("--model", action="store_true", help="build the model: parameters, operations, memory")
    parser.add_argument("--data", action="store_true", help="prepare the data: its audit and decoded examples")


def run(args: argparse.Namespace) -> int:
    names = [args.name, *args.config]
    composed = compose(names, args.overrides, allowed=None)
    if composed.values.keys() & TOP_LEVEL.keys():  # else it is a part, such as models/llama-1m
        composed = compose(names, args.overrides)
    if args.model or args.data:
        from recipes.preview import preview

        preview(composed, model=args.model, data=args.data)
        return 0
    for file in composed.files:
        print(f"# --- {display(file)}")
        print(file.read_text(encoding="utf-8").rstrip() + "\n")
    print("# --- resolves to")
    print(with_origins(composed))
    return 0


def with_origins(composed: Composed) -> str:
    """The merged config as YAML, each line that holds a value with a comment that says where the value is from."""
    lines = _lines(redact_config(composed, composed.values), ())
    width = min(72, max((len(text) for text, _ in lines), default=0))
    shown = []
    for text, key in lines:
        origin = "" if key is None else f"# {composed.origin(key)}"
        shown.append(f"{text:<{width}}  {origin}".rstrip())
    return "\n".join(shown)


def _lines(value: Any, key: Key, indent: str = "") -> list[tuple[str, Key | None]]:
    """Lines of YAML, each with the key that it is about (None: a heading)."""
    lines: list[tuple[str, Key | None]] = []
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in items:
        head = f"{indent}-" if isinstance(value, list) else f"{indent}{_scalar(name)}:"
        below = (*key, name)
        if not isinstance(item, dict | list) or not item:
            lines.append((f"{head} {_scalar(item)}", below))
            continue
        inner = _lines(item, below, indent + "  ")
        if isinstance(value, list):  # the first line of an item goes behind its dash
            text, first = inner[0]
            inner[0] = (f"{head} {text.strip()}", first)
        else:
            lines.append((head, None))
        lines += inner
    return lines


def _scalar(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**9)
    return text.removesuffix("\n").removesuffix("\n...")
