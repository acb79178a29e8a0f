"""The help of fit, validate, test and predict: short by default, and of any key in full when it is asked for."""

from __future__ import annotations

import inspect
import shutil
import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from recipes.command_line import FLAGS, SWITCHES, Command
from recipes.compose import TOP_LEVEL, compose, long_key
from recipes.errors import UserError, nearest

if TYPE_CHECKING:
    from recipes.diagnose import Field

_OFTEN = {
    "--trainer.max_steps": "optimizer steps of the run",
    "--trainer.max_epochs": "or: passes over the data",
    "--trainer.accumulate_grad_batches": "micro-batches of one optimizer step (the gradient does not depend on it)",
    "--trainer.val_check_interval": "micro-batches between validations",
    "--trainer.precision": "32-true, bf16-mixed, bf16-true or 16-mixed",
    "--trainer.devices": "processes, or GPUs, of one machine",
    "--trainer.strategy": "auto, ddp, ...",
    "--data.batch_size": "rows of a micro-batch, on each device",
    "--data.sources": "files, folders, globs or hub ids: '[{path: my.jsonl}]'",
    "--model.backbone": "the model: a file such as models/llama-1m.yaml",
    "--model.backbone.source": "or: the folder or hub id of a pretrained model",
    "--model.optimizer.lr": "learning rate",
    "--checkpoint.every_n_steps": "optimizer steps between checkpoints",
    "--seed_everything": TOP_LEVEL["seed_everything"],
    "--tokenizer": TOP_LEVEL["tokenizer"],
    "--sequence_length": TOP_LEVEL["sequence_length"],
    "--runs_dir": TOP_LEVEL["runs_dir"],
}


def show_help(command: Command) -> int:
    """Prints the help that is asked for."""
    print(short_help(command.verb) if not command.help else key_help(command))
    return 0


def short_help(verb: str) -> str:
    """One screen: no Lightning is imported for it."""
    from recipes.trainer_verbs import VERBS

    flags = {f"{flag} {value}": text for flag, (value, text) in FLAGS.items()} | SWITCHES
    flags["--help KEY"] = "every argument below a key: trainer, checkpoint, model, data, model.backbone, ..., or full"
    return "\n".join(
        [
            f"usage: recipes {verb} -c NAME [-c OVERLAY ...] [--dotted.key value ...]",
            "",
            f"{VERBS[verb][:1].upper()}{VERBS[verb][1:]}.",
            "",
            "flags:",
            *_columns(flags),
            "",
            "a recipe has (YAML; recipes show NAME prints one):",
            *_columns(TOP_LEVEL),
            "",
            "keys that are often set (any key of the recipe can be; leave init_args out; key+ appends to a list):",
            *_columns(_OFTEN),
            "",
            "A run writes runs/<recipe>/<n>/: config.yaml, metrics.csv, checkpoints/, export/, ...",
            "Tokenizing is done once and cached. To do it ahead of a run, on any machine: recipes prepare data -c NAME",
        ]
    )


def key_help(command: Command) -> str:
    """Every argument of the class at a key of the recipe, with its type, default and meaning."""
    from lightning.pytorch import Trainer

    from callbacks import StepCheckpoint
    from recipes.diagnose import fields_of

    composed = compose(command.configs, command.overrides) if command.configs else None
    key = str(command.help).removeprefix("--")
    found: dict[str, dict[str, Field]] = {"trainer": fields_of(Trainer), "checkpoint": fields_of(StepCheckpoint)}
    if composed is not None:
        found |= _class_fields(composed.values, "")
    if key == "full":
        return "\n\n".join(_describe(name, fields) for name, fields in found.items())
    long = key if composed is None else long_key(composed.root, key)
    for name in (key, long):
        if name in found:
            return _describe(name, found[name])
    for name in (key, long):
        owner, _, last = name.rpartition(".")
        owner = owner.removesuffix(".init_args")
        if owner in found and last in found[owner]:
            return _describe(owner, {last: found[owner][last]})
    hint = "" if composed is not None else "; name a recipe with -c to ask about its model and data"
    raise UserError(f"--help {key}: nothing is known of it{nearest(key, found)}{hint}; there are: {', '.join(found)}")


def _class_fields(value: Any, key: str) -> dict[str, dict[str, Field]]:
    """The arguments of every class and record that the config names, by its key."""
    from recipes.diagnose import fields_of, find_class, record_of

    found: dict[str, dict[str, Field]] = {}
    if not isinstance(value, Mapping):
        return found
    fields: dict[str, Field] = {}
    inner, prefix = value, key
    if "class_path" in value:
        kind = find_class(str(value["class_path"]))
        fields = found[key] = fields_of(kind)
        inner, prefix = value.get("init_args") or {}, f"{key}.init_args"
    for name, item in inner.items():
        below = f"{prefix}.{name}" if prefix else str(name)
        record = record_of(fields[name].type) if name in fields else None
        if record is not None:
            found[below] = fields_of(record)
        found |= _class_fields(item, below)
    return found


def _describe(name: str, fields: dict[str, Field]) -> str:
    from recipes.diagnose import describe, short

    shown = name.replace(".init_args", "")
    lines = [f"{shown}:"]
    width = max(60, shutil.get_terminal_size((120, 24)).columns) - 8
    for field in fields.values():
        default = "must be given" if field.default is inspect.Parameter.empty else f"default {short(field.default)}"
        lines.append(f"  --{shown}.{field.name}  ({describe(field.type)}; {default})")
        lines += textwrap.wrap(field.help, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join(lines)


def _columns(rows: Mapping[str, str]) -> list[str]:
    width = max(len(name) for name in rows)
    return [f"  {name:<{width}}  {text}" for name, text in rows.items()]
