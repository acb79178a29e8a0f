"""What can be said against a config from its values alone, before anything heavy is imported."""

from __future__ import annotations

from recipes.compose import Composed
from recipes.errors import UserError
from recipes.yaml_tree import Key


def check_values(composed: Composed) -> None:
    """Checks that go over several keys.

    Raises:
        UserError: all problems, one a line.
    """
    problems = [
        f"{_key(part)}: missing; a recipe needs `{part}`" for part in ("model",) if not composed.values.get(part)
    ]
    problems += _check_windows(composed)
    problems += _check_positive(composed)
    if (composed.values.get("trainer") or {}).get("default_root_dir") is not None:
        place = composed.origin(("trainer", "default_root_dir"))
        problems.append(f"{place}: `trainer.default_root_dir` has no effect; runs are written below `runs_dir`")
    if problems:
        raise UserError("\n".join(problems))


def _key(part: str) -> str:
    return f"`{part}`"


def _check_windows(composed: Composed) -> list[str]:
    """Validation inside an accumulation window would lose the gradients so far from a checkpoint written there."""
    trainer = composed.values.get("trainer") or {}
    every, window = trainer.get("val_check_interval"), trainer.get("accumulate_grad_batches", 1)
    whole = isinstance(every, int) and not isinstance(every, bool) and isinstance(window, int)
    if not whole or window < 1 or every % window == 0:
        return []
    fix = max(1, round(every / window)) * window
    return [
        f"{composed.origin(('trainer', 'val_check_interval'))}: `trainer.val_check_interval` is {every} micro-batches, "
        f"which is no multiple of `trainer.accumulate_grad_batches`, {window}; write {fix}"
    ]


def _check_positive(composed: Composed) -> list[str]:
    problems = []
    for key in ("sequence_length",):
        value = composed.values.get(key)
        if isinstance(value, int) and value < 1:
            problems.append(f"{composed.origin(_path(key))}: `{key}` is {value}; it must be at least 1")
    return problems


def _path(key: str) -> Key:
    return tuple(key.split("."))
