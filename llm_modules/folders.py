"""Floor 0: whether the name of a model or a tokenizer means a folder here or a hub id, for all who open one."""

from __future__ import annotations

import re
from difflib import get_close_matches
from pathlib import Path

_HUB_ID = re.compile(r"[\w.-]+(?:/[\w.-]+)?")
RUNS = "runs"
"""Where recipes write their runs, and look for the models that others made, unless they are told otherwise."""


def local_folder(source: str) -> Path | None:
    """The folder that ``source`` means; None where it is a hub id (``org/name``, or ``name`` alone).

    What lies below a folder here is no hub id, nor is a run that was not made yet: the hub would be asked for a folder
    that is mistyped or missing, many times over.

    Raises:
        ValueError: it is a path, and there is no such folder; one line without the key.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    is_id = _HUB_ID.fullmatch(source) is not None and not source.startswith(".") and not path.exists()
    if is_id and ("/" not in source or not (path.parent.is_dir() or path.parent == Path(RUNS))):
        return None
    names = [other.name for other in path.parent.iterdir() if other.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, names, n=1)
    why = f"; {path.parent} is a folder here, so this is no hub id" if is_id and path.parent.is_dir() else ""
    raise ValueError(f"no folder {source!r}{f' (did you mean {near[0]!r}?)' if near else ''}{why}")
