"""Trained adapters opened for generation: one in its base, or several, one of which speaks at a time."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llm_modules.zoo.adapted import saved_base
from llm_modules.zoo.adapter_config import (
    LIBRARY_ERRORS,
    config_of_folder,
    kind_of,
    name_targets,
    one_line,
    virtual_tokens,
)
from llm_modules.zoo.adapters import Adapter
from llm_modules.zoo.bottleneck import KIND, WEIGHTS_FILE
from llm_modules.zoo.causal_lm import BASE_FOLDER
from llm_modules.zoo.description import describe_difference
from llm_modules.zoo.quantization import quantize
from llm_modules.zoo.weights import cast_parameters, weights_digest

_UNREADABLE = (*LIBRARY_ERRORS, OSError, SafetensorError)


def open_adapter(folder: str | Path, dtype: Any = "auto") -> Any:
    """The model of an adapter's folder, for generation: its base (quantized, if it was trained so) with the adapter.

    Returns:
        transformers' model; peft's around it where there are virtual tokens.

    Raises:
        ValueError: the base is not there, is another one, or the adapter does not fit it.
    """
    folder = Path(folder)
    config = config_of_folder(folder)
    if virtual_tokens(config):
        return open_adapters({"default": folder}, dtype)
    hf, saved = _base({"default": folder}, None, dtype)
    name_targets(config, hf)
    adapter = Adapter(hf, config, seed=0, dtype=hf.dtype if saved.get("quantization") is None else torch.float32)
    adapter.load(folder)
    return hf


def open_adapters(folders: Mapping[str, str | Path], dtype: Any = "auto", *, base: str | Path | None = None) -> Any:
    """Several adapters in one base, which is loaded once; the first speaks until ``set_adapter(name)`` is called.

    Args:
        folders: of the adapters, by the names that they get.
        dtype: of the base's weights; auto: as they are stored.
        base: its folder or hub id; None: that of the first adapter.

    Returns:
        peft's model.

    Raises:
        ValueError: the base is not there, an adapter was trained on another one, or cannot be beside the others.
    """
    from peft import PeftModel

    paths = {name: Path(folder).expanduser() for name, folder in folders.items()}
    configs = {name: config_of_folder(folder) for name, folder in paths.items()}
    kinds = {name: kind_of(config) for name, config in configs.items()}
    if KIND in kinds.values():
        raise ValueError("bottleneck adapters are not peft's, and cannot be switched; open it alone")
    if len(set(kinds.values())) > 1:
        listed = ", ".join(f"{name} is {kind}" for name, kind in kinds.items())
        raise ValueError(f"adapters of several kinds cannot be in one base: {listed}; open them apart")
    hf, _ = _base(paths, base, dtype)
    model: Any = None
    for name, folder in paths.items():
        name_targets(configs[name], hf if model is None else model.get_base_model())
        try:
            if model is None:
                model = PeftModel.from_pretrained(hf, str(folder), adapter_name=name)
            else:
                model.load_adapter(str(folder), adapter_name=name)
        except _UNREADABLE as error:
            raise ValueError(f"{folder}: does not fit this base: {one_line(error)}") from error
        _check_names(model, name, folder)
    return model


def _check_names(model: Any, name: str, folder: Path) -> None:
    """peft passes over what a file lacks, and over what the model has no place for."""
    from peft import get_peft_model_state_dict

    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        different = sorted(own.keys() ^ set(file.keys()))
    if different:
        raise ValueError(f"{folder}: is of another layout than its base; it differs in {different[0]}")


def _base(paths: Mapping[str, Path], given: str | Path | None, dtype: Any) -> tuple[Any, dict[str, Any]]:
    """The base of all these adapters, quantized if they were trained so, and what the first says of it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    said = {folder: saved_base(folder) for folder in paths.values()}
    first, saved = next(((folder, about) for folder, about in said.items() if about), (next(iter(said)), {}))
    source = str(given) if given is not None else _source(first)
    try:
        stored = AutoConfig.from_pretrained(source).dtype or torch.float32
        # The digest is of the weights in the dtype in which they were trained on.
        trained = getattr(torch, saved["dtype"]) if saved else stored
        hf: Any = AutoModelForCausalLM.from_pretrained(source, dtype=trained, use_safetensors=True)
    except _UNREADABLE as error:
        raise ValueError(f"{first}: its base {source!r} cannot be opened: {one_line(error)}") from error
    here = {**saved, "source": source, "seed": None, "digest": weights_digest(hf) if saved else None}
    for folder, about in said.items():
        if about and (difference := describe_difference({"base": about}, {"base": here})):
            raise ValueError(f"{folder}: {difference}")
    wanted = stored if dtype == "auto" else dtype
    if wanted != hf.dtype:
        cast_parameters(hf, wanted)
    if saved.get("quantization"):
        quantize(hf, saved["quantization"], hf.dtype)
    return hf, saved


def _source(folder: Path) -> str:
    """Where an adapter's base is: inside its folder, or where its config says."""
    inside = folder / BASE_FOLDER
    source = str(inside) if inside.is_dir() else config_of_folder(folder).base_model_name_or_path
    if source is None:
        raise ValueError(f"{folder}: its adapter_config.json names no base (base_model_name_or_path)")
    return source
