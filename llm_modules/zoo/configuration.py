"""From what a recipe says of a model to a transformers config; every mistake is one line, before weights load."""

from __future__ import annotations

import dataclasses
import json
import re
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llm_modules import folders

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ALLOWED_SOURCES = "allowed: a Hugging Face folder or a hub id (org/name)"

_OLDER_KEYS = {"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "sliding_window_pattern"}
"""Keys that are no fields of a config class (any more) and that transformers still reads."""

_UNDECLARED_KEYS = {"qwen3_moe": {"head_dim"}}
"""Keys that are no fields of a family's config class and that its layers read (published configs have them)."""

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

VOCABULARY_MULTIPLE = 64
"""Random embeddings get a multiple of this many rows: matrix products like it."""


def nearest(name: str, allowed: list[str]) -> str:
    """``; did you mean 'x'?``, or what is allowed, for the end of an error message."""
    match = get_close_matches(name, allowed, n=1)
    if match:
        return f"; did you mean {match[0]!r}?"
    return f"; allowed: {', '.join(allowed)}" if len(allowed) <= 40 else ""


def rounded_vocabulary(tokens: int) -> int:
    return -(-tokens // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def with_room(config: PretrainedConfig, tokens: int) -> PretrainedConfig:
    """The config, its vocabulary grown if the tokenizer has more ``tokens``."""
    text = config.get_text_config()
    if tokens > text.vocab_size:
        text.vocab_size = rounded_vocabulary(tokens)
    return config


def local_folder(source: str) -> Path | None:
    """The folder that ``source`` means; None where it is a hub id.

    Raises:
        ValueError: it is a path, or no hub id of an organization, and there is no such folder.
    """
    if "/" not in source and not Path(source).expanduser().is_dir():
        raise ValueError(f"backbone.source: no folder {source!r}; {ALLOWED_SOURCES}")
    try:
        return folders.local_folder(source)
    except ValueError as error:
        raise ValueError(f"backbone.source: {error}; {ALLOWED_SOURCES}") from error


def config_of_preset(preset: dict[str, Any], vocabulary: int) -> PretrainedConfig:
    """The config of a preset; without ``vocab_size`` the tokenizer's size, rounded up.

    Raises:
        ValueError: no or an unknown ``model_type``, an unknown key, a value that the family refuses.
    """
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    values = dict(preset)
    model_type = values.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ValueError("backbone.config: no model_type; name a family of transformers, for example model_type: llama")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        hint = nearest(model_type, sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        raise ValueError(f"backbone.config.model_type: no causal language model {model_type!r} in transformers{hint}")
    values.setdefault("vocab_size", rounded_vocabulary(vocabulary))
    for name in SPECIAL_IDS:  # a family's own defaults are ids of another vocabulary
        values.setdefault(name, None)
    return _made(CONFIG_MAPPING[model_type], values, preset)


def config_of_source(source: str, overrides: dict[str, Any], trust_remote_code: bool) -> PretrainedConfig:
    """The config of a folder or hub id, with ``overrides`` put on top.

    Raises:
        ValueError: nothing there, code of its own that is not trusted, or an override that the family refuses.
    """
    from transformers import AutoConfig

    folder = local_folder(source)
    if folder is not None and not (folder / "config.json").is_file():
        raise ValueError(f"backbone.source: {source!r} has no config.json; it is not a Hugging Face model folder")
    if not trust_remote_code and folder is not None and "auto_map" in _read_json(folder / "config.json"):
        model_type = _read_json(folder / "config.json").get("model_type")
        from transformers import CONFIG_MAPPING

        if model_type not in CONFIG_MAPPING:
            raise ValueError(
                f"backbone.source: {source!r} brings code of its own, which is not run; if you trust it, set "
                "backbone.trust_remote_code: true"
            )
    try:
        config = AutoConfig.from_pretrained(str(folder or source), trust_remote_code=trust_remote_code)
    except Exception as error:  # the hub's errors share no base class
        raise ValueError(f"backbone.source: cannot open {source!r}: {_one_line(error)}") from error
    if not overrides:
        return config
    if overrides.get("model_type", config.model_type) != config.model_type:
        raise ValueError(
            f"backbone.config.model_type: {overrides['model_type']!r}, but {source!r} is of {config.model_type!r}; "
            "leave it out"
        )
    values = {**config.to_dict(), **overrides}
    values.pop("model_type", None)
    return _made(type(config), values, overrides)


def check_weights(source: str) -> None:
    """Raise a ValueError if a local folder holds no safetensors. (A hub's files are checked when they load.)"""
    folder = local_folder(source)
    if folder is not None and not any(folder.glob("*.safetensors")):
        others = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt*")))
        there = f" (only {', '.join(others[:3])}, which could execute code)" if others else ""
        raise ValueError(f"backbone.source: no *.safetensors in {source!r}{there}; set init: random, or convert it")


def check_sizes(config: PretrainedConfig, *, vocabulary: int, sequence_length: int, resizable: bool) -> list[str]:
    """What does not fit: positions and vocabulary; one line each."""
    text = config.get_text_config()
    problems = []
    positions = getattr(text, "max_position_embeddings", None)
    if positions is not None and sequence_length > positions:
        problems.append(
            f"sequence_length: {sequence_length} tokens, but the model has {positions} positions; lower it, or raise "
            f"backbone.config.{_own_name(text, 'max_position_embeddings')}"
        )
    size = getattr(text, "vocab_size", None)
    if size is not None and vocabulary > size and not resizable:
        problems.append(
            f"backbone.config.vocab_size: {size}, but the tokenizer has {vocabulary} tokens; leave it out, or set at "
            f"least {vocabulary}"
        )
    return problems


def attention_dropout(config: PretrainedConfig) -> str | None:
    """The key of this config's attention dropout, if it is not zero."""
    text = config.get_text_config()
    for key in ("attention_dropout", "attn_pdrop", "attn_dropout", "attention_probs_dropout_prob"):
        if getattr(text, key, None):
            return key
    return None


def _made(kind: type, values: dict[str, Any], given: dict[str, Any]) -> PretrainedConfig:
    try:
        config = kind(**values)
    except Exception as error:  # huggingface_hub's validation errors are plain Exceptions
        raise ValueError(f"backbone.config: {_one_line(error)}") from error
    known = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else []
    undeclared = _UNDECLARED_KEYS.get(kind.model_type, ())  # type: ignore[attr-defined]
    known = sorted({*known, *undeclared, *kind.attribute_map, *_OLDER_KEYS, "model_type"})  # type: ignore[attr-defined]
    for key in given if len(known) > len(_OLDER_KEYS) + 1 else ():
        # A key that nobody reads becomes a plain attribute; an older name that is still read does not.
        if key not in known and key in vars(config):
            raise ValueError(f"backbone.config: unknown key {key!r} of {kind.model_type!r}{nearest(key, known)}")  # type: ignore[attr-defined]
    return config


def _own_name(config: PretrainedConfig, key: str) -> str:
    """What this family calls a common key (GPT-2: ``n_positions``)."""
    return config.attribute_map.get(key, key)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error


def _one_line(error: BaseException) -> str:
    """The last line of a validation error holds the reason, the first of others."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return re.sub(r"^\w+Error: ", "", lines[-1] if lines[0].endswith(":") else lines[0])
