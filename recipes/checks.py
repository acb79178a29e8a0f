"""What can be said against a config from its values alone, before anything heavy is imported."""

from __future__ import annotations

from typing import Any

from recipes.compose import Composed
from recipes.config_names import config_name
from recipes.errors import UserError
from recipes.yaml_tree import Key, Node, dotted, read_yaml

_LARGEST_SEED = 2**32 - 1  # of numpy's generator


def check_values(composed: Composed) -> None:
    """Checks that go over several keys.

    Raises:
        UserError: all problems, one a line.
    """
    problems = [
        f"{_key(part)}: missing; a recipe needs `{part}`" for part in ("model",) if not composed.values.get(part)
    ]
    problems += _check_windows(composed)
    problems += _check_overlays(composed)
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
    for key in ("sequence_length", "trainer.accumulate_grad_batches"):
        value: Any = composed.values
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if isinstance(value, int) and value < 1:
            problems.append(f"{composed.origin(_path(key))}: `{key}` is {value}; it must be at least 1")
    seed = composed.values.get("seed_everything")
    if isinstance(seed, int) and not 0 <= seed <= _LARGEST_SEED:
        place = composed.origin(("seed_everything",))
        problems.append(f"{place}: `seed_everything` is {seed}; allowed: 0 to {_LARGEST_SEED}")
    return problems


def _check_overlays(composed: Composed) -> list[str]:
    """Overlays that contradict each other. Of two the later wins, where it sets all that the earlier one has set."""
    return [
        *_two_adapters(composed),
        *_two_precisions(composed),
        *_fsdp1_quantized(composed),
        *_more_than_single(composed),
    ]


def _of_kind(composed: Composed, kind: str) -> list[tuple[str, list[tuple[Key, Node]]]]:
    """The overlays of one folder of configs/, in order, each once: name, and the values that it sets."""
    files = [path for path in dict.fromkeys(composed.files) if path.parent.name == kind]
    return [(config_name(path), _leaves(read_yaml(path))) for path in files]


def _leaves(root: Node) -> list[tuple[Key, Node]]:
    return [(key, node) for key, node in root.walk() if not isinstance(node.value, dict | list)]


def _two_adapters(composed: Composed) -> list[str]:
    overlays = _of_kind(composed, "adapters")
    names = [name for name, leaves in overlays if any(key[-2:] == ("adapter", "class_path") for key, _ in leaves)]
    if len(names) < 2:
        return []
    return [
        f"-c {names[-1]}: contradicts -c {names[-2]}: a model is trained with one adapter; leave one of them out "
        "(to quantize the base there are -c precision/nf4 and its like)"
    ]


def _two_precisions(composed: Composed) -> list[str]:
    """A quantized base stays where another precision is put on top: neither what the one says nor the other."""
    overlays = _of_kind(composed, "precision")
    in_force = {node.origin for _, node in _leaves(composed.root)}
    for name, leaves in overlays[:-1]:
        stays = [f"`{dotted(key)}`" for key, node in leaves if node.origin in in_force]
        if 0 < len(stays) < len(leaves):
            return [_contradiction(overlays[-1][0], name, stays)]
    # An adapter's overlay may quantize the base, too: adapters/qlora.
    now = composed.values.get("trainer", {}).get("precision")
    for name, leaves in _of_kind(composed, "adapters"):
        wanted = [node for key, node in leaves if key == ("trainer", "precision")]
        stays = [f"`{dotted(key)}`" for key, node in leaves if key[-1] == "quantization" and node.origin in in_force]
        if overlays and stays and wanted and wanted[0].origin not in in_force and wanted[0].value != now:
            return [_contradiction(overlays[-1][0], name, stays)]
    return []


def _contradiction(later: str, earlier: str, stays: list[str]) -> str:
    return (
        f"-c {later}: contradicts -c {earlier}, of which {', '.join(stays)} would stay; leave one of them out, and set "
        "what is to differ by a flag"
    )


def _fsdp1_quantized(composed: Composed) -> list[str]:
    """Found here, before processes are started."""
    trainer, model = composed.values.get("trainer") or {}, composed.values.get("model") or {}
    strategy = trainer.get("strategy")
    name = strategy.get("class_path") if isinstance(strategy, dict) else None
    backbone = (model.get("init_args") or model).get("backbone") if isinstance(model, dict) else None
    quantized = isinstance(backbone, dict) and backbone.get("quantization")
    if not quantized or not str(name).endswith(".FSDP1Strategy"):
        return []
    return [
        f"{composed.origin(('trainer', 'strategy'))}: `trainer.strategy`: FSDP1 lays weights of one dtype end to end, "
        f"and a base in {quantized} is of several; use strategies/fsdp2, which shards each by itself"
    ]


def _more_than_single(composed: Composed) -> list[str]:
    """`strategies/single` leaves the choice to Lightning, which takes ddp for more than one device."""
    strategy = composed.origin(("trainer", "strategy"))
    single = strategy.file is not None and config_name(strategy.file) == "strategies/single"
    trainer = composed.values.get("trainer") or {}
    for key in ("devices", "num_nodes") if single else ():
        value = trainer.get(key, 1)
        if value not in (1, "1"):
            return [
                f"{composed.origin(('trainer', key))}: `trainer.{key}` is {value}, which contradicts "
                f"-c strategies/single ({strategy}); name another strategy, such as -c strategies/ddp"
            ]
    return []


def _path(key: str) -> Key:
    return tuple(key.split("."))
