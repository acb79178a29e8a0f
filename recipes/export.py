"""`recipes export`: write a checkpoint's model as an ordinary Hugging Face folder."""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.errors import UserError, nearest, one_line
from recipes.yaml_tree import display

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PREFIX = "model.hf."
"""Names of the model's weights in a checkpoint begin with it."""

CHECKPOINT_KEY, CHECKPOINT_FORMAT = "litrecipes", 1

_STEP = re.compile(r"step-(\d+)\.ckpt")

EPILOG = """examples:
  recipes export runs/sft/quickstart/0 my-model                the run's best checkpoint (else its last)
  recipes export runs/sft/quickstart/0 my-model --which last
  recipes export runs/x/0/checkpoints/step-00000500.ckpt my-model --dtype bfloat16
  recipes export runs/x/0 my-model --merge                     an adapter, merged into its base
  recipes export runs/x/0 my-model --average 5                 the mean of the weights of its last 5 checkpoints"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument("checkpoint", metavar="CKPT", help="a .ckpt file or a run's folder")
    parser.add_argument("out", metavar="OUT", help="folder to write; it must not exist or be empty")
    parser.add_argument("--which", choices=("best", "last"), help="of a run's checkpoints (default: best, else last)")
    parser.add_argument(
        "--average", type=int, metavar="K", help="the mean of the weights of the K newest checkpoints up to this one"
    )
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="auto: as they are stored"
    )
    parser.add_argument("--tokenizer", metavar="FOLDER", help="if the run's tokenizer lies elsewhere now")
    parser.add_argument(
        "--merge", action="store_true", help="of a run with an adapter: an ordinary folder, the adapter merged into it"
    )
    parser.add_argument("--base", metavar="FOLDER", help="if the base of a run with an adapter lies elsewhere now")
    parser.add_argument("--overwrite", action="store_true", help="replace a model folder that is there")


def run(args: argparse.Namespace) -> int:
    """Runs the verb; returns the exit status."""
    path = find_checkpoint(Path(args.checkpoint).expanduser(), args.which, args.average)
    out = Path(args.out).expanduser()
    check_out(out, args.overwrite)
    paths = checkpoints_up_to(path, args.average) if args.average else [path]
    from transformers.utils import logging

    logging.disable_progress_bar()
    checkpoint = read_checkpoint(path)
    tokenizer = open_tokenizer(checkpoint[CHECKPOINT_KEY], args.tokenizer, path)
    facts = facts_of(checkpoint, path, paths)
    weights = weights_of(checkpoint, paths)
    if "adapter" in checkpoint[CHECKPOINT_KEY]:
        count = _export_adapter(args, checkpoint[CHECKPOINT_KEY], weights, tokenizer, facts, path)
    elif args.merge or args.base:
        raise UserError(f"{'--merge' if args.merge else '--base'}: {path.name} holds a whole model, no adapter")
    else:
        weights = {name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)}
        model = build_model(checkpoint[CHECKPOINT_KEY], weights, path)
        if args.dtype != "auto":
            cast(model, args.dtype)
        write(model, tokenizer, facts, out, model.save_pretrained)
        count = sum(parameter.numel() for parameter in model.parameters())
    source = display(path.absolute()) if len(paths) == 1 else f"the mean of {len(paths)} checkpoints"
    print(f"{display(out.absolute())}: {count:,} parameters of {source}")
    return 0


def _export_adapter(
    args: argparse.Namespace,
    about: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    facts: dict[str, Any],
    path: Path,
) -> int:
    """Writes what a checkpoint with an adapter gives; returns the number of parameters written."""
    from llm_modules.zoo import save_adapted
    from recipes.export_adapter import build

    merge = args.merge or "score" in about["backbone"]  # as whoever scores opens it
    if args.dtype != "auto" and not merge:
        raise UserError(f"--dtype {args.dtype}: an adapter is written as it was trained; it goes with --merge")
    out = Path(args.out).expanduser()
    model, backbone = build(about, weights, tokenizer, path, base=args.base, merge=merge)
    if merge:
        if args.dtype != "auto":
            cast(model.hf, args.dtype)
        write(model.hf, tokenizer, {**facts, "base": model.base_name}, out, model.save_pretrained)
        return sum(parameter.numel() for parameter in model.hf.parameters())
    assert model.adapter is not None
    built = {name: about["adapter"][name] for name in ("seed", "precision")} | {"place": out, "tokenizer": tokenizer}
    facts |= {"adapter": model.adapter.kind, "base": model.base_name}
    write(model.hf, tokenizer, facts, out, partial(save_adapted, model, backbone, **built))
    return sum(value.numel() for value in weights.values())


# --- what is asked for ----------------------------------------------------------------------------------------------


def find_checkpoint(path: Path, which: str | None, average: int | None) -> Path:
    """The checkpoint file that is meant.

    Raises:
        UserError: there is none.
    """
    if average is not None and average < 1:
        raise UserError(f"--average {average}: at least 1 checkpoint is averaged")
    if path.is_file() or path.suffix == ".ckpt":
        if which is not None:
            raise UserError(f"--which {which}: goes with a run's folder, {path} is one checkpoint")
        if not path.exists():
            near = (
                nearest(path.name, (file.name for file in path.parent.glob("*.ckpt"))) if path.parent.is_dir() else ""
            )
            raise UserError(f"{path}: no such checkpoint{near}")
        return path.resolve()
    if not path.is_dir():
        near = nearest(path.name, (file.name for file in path.parent.iterdir())) if path.parent.is_dir() else ""
        raise UserError(f"{path}: no such checkpoint or run{near}")
    folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    best, steps = folder / "best.ckpt", steps_of(folder)
    if which == "best" and average is not None:
        raise UserError("--which best: --average takes the newest checkpoints, not the best one")
    if which != "last" and average is None and best.exists():
        return best.resolve()
    if which == "best":
        raise UserError(f"--which best: {folder} has no best.ckpt; use --which last")
    if not steps:
        raise UserError(f"{path}: no checkpoint in it (looked for checkpoints/step-*.ckpt)")
    return steps[-1].resolve()


def steps_of(folder: Path) -> list[Path]:
    """A folder's checkpoints by step, oldest first."""
    found = [(int(match[1]), path) for path in folder.glob("*.ckpt") if (match := _STEP.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def checkpoints_up_to(path: Path, count: int) -> list[Path]:
    """The ``count`` newest checkpoints of a folder, of which ``path`` is the newest.

    Raises:
        UserError: there are fewer.
    """
    steps = steps_of(path.parent)
    if path not in steps:
        raise UserError(
            f"--average {count}: {path.name} is no checkpoint by step (step-00000100.ckpt); name one of these"
        )
    found = steps[: steps.index(path) + 1]
    if len(found) < count:
        raise UserError(
            f"--average {count}: {display(path.parent)} has {len(found)} up to {path.name}; a run keeps more with "
            f"--checkpoint.keep_last {count}"
        )
    return found[-count:]


def check_out(out: Path, overwrite: bool) -> None:
    """Refuses to write over anything but a model folder, and that only if asked."""
    if out.is_file():
        raise UserError(f"{out}: a file; name a folder to write")
    if not out.is_dir() or not any(out.iterdir()):
        return
    if not overwrite:
        raise UserError(f"{out}: is there and not empty; name another folder, or --overwrite")
    if not any((out / name).is_file() for name in ("config.json", "adapter_config.json")):
        raise UserError(f"--overwrite: {out} is no model folder (it has no config.json); remove it yourself")


# --- from the checkpoint to a model ---------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint of ours, opened without executing anything.

    Raises:
        ValueError: truncated, damaged, of another program, or holding code.
    """
    from callbacks import AtomicCheckpointIO

    checkpoint = AtomicCheckpointIO().load_checkpoint(path)
    about = checkpoint.get(CHECKPOINT_KEY)
    if about is None:
        raise UserError(f"{path}: not a checkpoint of LitRecipes (no {CHECKPOINT_KEY!r} entry in it)")
    if about["format"] > CHECKPOINT_FORMAT:
        raise UserError(f"{path}: made by a newer LitRecipes (format {about['format']}); update the package")
    if not any(name.startswith((PREFIX, "model.virtual.")) for name in checkpoint["state_dict"]):
        raise UserError(f"{path}: holds no weights named {PREFIX}*, as those of a language model are")
    return checkpoint


def weights_of(checkpoint: dict[str, Any], paths: list[Path]) -> dict[str, torch.Tensor]:
    """The model's weights by their names in the checkpoint: of the last of ``paths``, or the mean of all of these.

    Raises:
        ValueError: one of them cannot be read or is of another model.
    """
    from callbacks.export import mean_of_checkpoints
    from llm_modules.zoo import describe_difference

    state = checkpoint["state_dict"]
    if len(paths) > 1:
        for path in paths[:-1]:
            other = read_checkpoint(path)[CHECKPOINT_KEY]["backbone"]
            if difference := describe_difference(other, checkpoint[CHECKPOINT_KEY]["backbone"]):
                raise UserError(f"--average: {path.name} is of another model than {paths[-1].name}: {difference}")
        state = mean_of_checkpoints(paths)
    return {name: value for name, value in state.items() if name.startswith("model.")}


def build_model(about: dict[str, Any], weights: dict[str, torch.Tensor], path: Path) -> PreTrainedModel:
    """transformers' model with the checkpoint's weights; nothing is initialized.

    Raises:
        UserError: the weights do not fit the config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from llm_modules.zoo.reward_model import classifier

    config, score = _config(about["config"], path), about["backbone"].get("score")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    try:
        if score is not None:
            return classifier(config, weights, score)
        report = model.load_state_dict(weights, strict=False, assign=True)
    except RuntimeError as error:
        raise UserError(f"{path}: the weights do not fit the model: {one_line(error)[:300]}") from error
    # A tied head is not stored twice.
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    missing = [name for name in report.missing_keys if name not in tied]
    if missing or report.unexpected_keys:
        raise UserError(
            f"{path}: weights of another layout: missing {_some(missing)}; unexpected {_some(report.unexpected_keys)}"
        )
    model.tie_weights()
    dtypes = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(dtypes) == 1:
        model.config.dtype = dtypes.pop()
    return model.eval()


def _config(values: dict[str, Any], path: Path) -> PretrainedConfig:
    from transformers import CONFIG_MAPPING

    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise UserError(
            f"{path}: a model of type {kind!r}, whose code is its own; only families of transformers export"
        )
    return CONFIG_MAPPING[kind].from_dict(values)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "") or "none"


def cast(model: PreTrainedModel, dtype: str) -> None:
    """The weights, not the buffers: rotary frequencies in half precision put tokens at wrong positions."""
    import torch

    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)


def open_tokenizer(about: dict[str, Any], other: str | None, path: Path) -> PreTrainedTokenizerBase:
    """The run's tokenizer with the chat template that was trained.

    Raises:
        UserError, ValueError: it is not where it was.
    """
    from llm_modules.tokenizer import load_tokenizer

    try:
        tokenizer = load_tokenizer(other or about["tokenizer"])
    except ValueError as error:
        hint = "" if other else "; say where it is now with --tokenizer"
        raise UserError(f"{one_line(error)}{hint}") from error
    size = about["config"].get("vocab_size")
    if size is not None and len(tokenizer) > size:
        raise UserError(
            f"tokenizer: {len(tokenizer)} tokens, but the model of {path.name} has {size}; it is another one"
        )
    if about.get("chat_template") is not None:
        tokenizer.chat_template = about["chat_template"]
    return tokenizer


def facts_of(checkpoint: dict[str, Any], path: Path, paths: list[Path]) -> dict[str, Any]:
    """What is known of the training, for the model card: from the checkpoint, and the run's folder if it is there."""
    from callbacks.export import describe_run

    step = int(checkpoint["global_step"])
    facts: dict[str, Any] = {"tokens_seen": checkpoint[CHECKPOINT_KEY]["tokens_seen"], "step": step}
    if len(paths) > 1:
        facts["weights"] = f"mean of {len(paths)} checkpoints"
    facts["score"] = "score" in checkpoint[CHECKPOINT_KEY]["backbone"]
    run = path.parent.parent
    facts |= {name: value for name, value in describe_run(run).items() if value is not None}
    if len(paths) == 1 and (run / "metrics.csv").is_file():
        facts["metrics"] = metrics_at(run / "metrics.csv", step)
    return facts


def metrics_at(path: Path, step: int) -> dict[str, float]:
    """The last losses and perplexities logged up to a checkpoint's step. (A row's step is counted before its own.)

    A validation's say of which step they are, where it is an earlier one.
    """
    found: dict[str, tuple[float, int]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if not (row.get("step") or "").isdigit() or int(row["step"]) >= step:
                continue
            for name, value in row.items():
                if name and name.startswith(("train/", "val/", "test/")) and value:
                    found[name] = float(value), int(row["step"]) + 1
    return {
        name if at == step or name.startswith("train/") else f"{name} (at step {at:,})": value
        for name, (value, at) in found.items()
    }


# --- writing --------------------------------------------------------------------------------------------------------


def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    facts: dict[str, Any],
    out: Path,
    save: Callable[[Path], None],
) -> None:
    """Writes the folder under a temporary name and renames it, so that it is there whole or not at all.

    Args:
        save: writes the weights into the folder that it is given.

    Raises:
        UserError: the disk is full or not writable; what was there is as it was.
    """
    from safetensors import SafetensorError

    from llm_modules.generation import set_end_tokens
    from llm_modules.model_card import write_model_card

    temporary = out.with_name(f".{out.name}-partial-{os.getpid()}")
    set_end_tokens(model, tokenizer)
    try:
        temporary.mkdir(parents=True)
        save(temporary)
        tokenizer.save_pretrained(str(temporary))
        write_model_card(temporary, facts)
        _put(temporary, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        raise UserError(f"{out}: cannot be written: {reason}; nothing was changed") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put(temporary: Path, out: Path) -> None:
    """The temporary folder in the place of ``out``."""
    old = out.with_name(f".{out.name}-old-{os.getpid()}")
    if out.is_dir():
        out.rename(old)
    try:
        temporary.rename(out)
    except OSError:
        if old.is_dir():
            old.rename(out)
        raise
    if old.is_dir():
        shutil.rmtree(old, ignore_errors=True)
        if old.exists():
            print(f"recipes: {old} could not be removed", file=sys.stderr)
