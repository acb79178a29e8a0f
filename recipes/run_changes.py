"""What a continued run is told to do otherwise than before: other losses, models or data make it another run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml

_LOOKED_AT = ("seed_everything", "tokenizer", "sequence_length", "model", "data")
_SAID_ELSEWHERE = "model.optimizer"  # by the module, which knows what its checkpoint brought
_MOST = 4


def changes(before: str, now: str) -> list[str]:
    """``model.objective DPO -> SimPO`` of each setting that two configs differ in, of those that make the result.

    Args:
        before, now: as YAML texts.
    """
    old, new = ({key: values.get(key) for key in _LOOKED_AT} for values in map(yaml.safe_load, (before, now)))
    found = [
        f"{key} {_word(one)} -> {_word(other)}"
        for key, one, other in _differences("", old, new)
        if key != _SAID_ELSEWHERE and not key.startswith(f"{_SAID_ELSEWHERE}.")
    ]
    return found if len(found) <= _MOST else [*found[:_MOST], f"and {len(found) - _MOST} more"]


def _differences(key: str, old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    if old == new:
        return
    if not isinstance(old, dict) or not isinstance(new, dict) or old.get("class_path") != new.get("class_path"):
        yield key, old, new
        return
    for name in dict.fromkeys((*old, *new)):
        below = key if name == "init_args" else f"{key}.{name}".lstrip(".")
        yield from _differences(below, old.get(name), new.get(name))


def _word(value: Any) -> str:
    if isinstance(value, dict) and "class_path" in value:
        return str(value["class_path"]).rpartition(".")[2]
    text = " ".join(yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("...\n").split())
    return text if len(text) <= 40 else f"{text[:37]}..."
