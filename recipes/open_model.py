"""From what `-m` names to a model and its tokenizer: an exported folder, a run, or a hub id."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.errors import UserError, nearest, one_line
from recipes.yaml_tree import display

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def find_model(name: str) -> Path | str:
    """The Hugging Face folder that is meant by ``name``: itself, the export of a run, or a hub id.

    Raises:
        UserError: nothing is there, or what is there is no model folder.
    """
    folder = Path(name).expanduser()
    for candidate in (folder, folder / "export"):
        if (candidate / "config.json").is_file() or (candidate / "adapter_config.json").is_file():
            return _complete(candidate)
    if (folder / "checkpoints").is_dir():
        raise UserError(f"-m {name}: a run that was not exported yet; write its model with: recipes export {name} OUT")
    if folder.suffix == ".ckpt":
        raise UserError(f"-m {name}: a checkpoint; make a model folder of it with: recipes export {name} OUT")
    if folder.is_dir():
        raise UserError(f"-m {name}: no model in this folder: neither config.json nor export/config.json")
    if _HUB_ID.fullmatch(name) and not folder.parent.is_dir():
        return name
    near = nearest(folder.name, (path.name for path in folder.parent.iterdir())) if folder.parent.is_dir() else ""
    raise UserError(f"-m {name}: no such folder{near}")


def _complete(folder: Path) -> Path:
    if not any(folder.glob("*.safetensors")):
        raise UserError(
            f"-m {display(folder)}: no weights in this folder; *.safetensors are read, other formats are not"
        )
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise UserError(
            f"-m {display(folder)}: no tokenizer in this folder; one of {', '.join(TOKENIZER_FILES)} is needed"
        )
    return folder


def find_adapters(source: Path | str, given: list[str], use: str | None) -> dict[str, Path]:
    """The folders of ``--adapter NAME=FOLDER``, the one that answers first; ``default`` is what ``-m`` names, if one.

    Raises:
        UserError: no name, the same name twice, or no adapter's folder.
    """
    found: dict[str, Path] = {}
    if given and _is_adapter(source):
        found["default"] = Path(source)
    for item in given:
        name, equals, folder = item.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--adapter {item}: NAME=FOLDER is wanted; a name is of letters, digits and _")
        if name in found:
            raise UserError(f"--adapter {item}: there is an adapter {name} already")
        try:
            place = find_model(folder)
        except UserError as error:
            raise UserError(f"--adapter {name}={str(error).removeprefix('-m ')}") from error
        if not _is_adapter(place):
            raise UserError(f"--adapter {item}: a whole model, no adapter (no adapter_config.json)")
        found[name] = Path(place)
    if use is not None and use not in found:
        names = ", ".join(found) or "none; give them with --adapter NAME=FOLDER"
        raise UserError(f"--use {use}: no such adapter; there are: {names}")
    first = use or next((name for name in found if name != "default"), None)
    return {name: found[name] for name in sorted(found, key=lambda name: name != first)}


def _is_adapter(source: Path | str) -> bool:
    return isinstance(source, Path) and (source / "adapter_config.json").is_file()


def open_model(
    source: Path | str, dtype: str, device: str, adapters: dict[str, Path] | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model, in eval mode on its device, and tokenizer.

    Args:
        source: what ``find_model`` found.
        dtype: auto (as stored), float32, bfloat16 or float16.
        device: auto (a GPU if there is one), cpu, cuda, cuda:1, ...
        adapters: what ``find_adapters`` found; the first one answers, with its tokenizer.

    Raises:
        UserError: it cannot be opened.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from llm_modules.tokenizer import load_tokenizer

    place = open_device(device)
    logging.disable_progress_bar()
    try:
        tokenizer = load_tokenizer(str(next(iter(adapters.values())) if adapters else source))
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        if adapters:
            from llm_modules.zoo import open_adapters

            for name, folder in adapters.items():
                _same_tokenizer(name, load_tokenizer(str(folder)), tokenizer)
            base = None if _is_adapter(source) else source
            return open_adapters(adapters, dtype=kind, base=base).to(place).eval(), tokenizer
        if _is_adapter(source):
            from llm_modules.zoo import open_adapter

            return open_adapter(source, dtype=kind).to(place).eval(), tokenizer
        if any(name.endswith("ForSequenceClassification") for name in _architectures(source)):
            raise ValueError("it is a classifier or a reward model, which answers nothing")
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=kind, use_safetensors=True)
    except Exception as error:
        if not isinstance(error, (OSError, ValueError, KeyError, RuntimeError)) and "Safetensor" not in repr(
            type(error)
        ):
            raise
        raise UserError(f"-m {source}: cannot be opened: {one_line(error)[:300]}") from error
    return model.to(place).eval(), tokenizer


def _architectures(source: Any) -> list[str]:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(source).architectures or []


def _same_tokenizer(name: str, own: Any, other: Any) -> None:
    """Of adapters that take turns in one conversation."""
    if own.get_vocab() != other.get_vocab() or own.chat_template != other.chat_template:
        raise ValueError(
            f"adapter {name} has another tokenizer or chat template than the one that answers; open it alone"
        )


def open_device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: not usable here: {one_line(str(error).splitlines()[0])}") from error
    return device
