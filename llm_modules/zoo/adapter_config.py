"""From what a recipe says of an adapter to its config; every mistake is one line, before weights load."""

from __future__ import annotations

import dataclasses
import importlib
import json
import logging
import re
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from torch import nn

from llm_modules.zoo.bottleneck import CONFIG_FILE, KIND, WEIGHTS_FILE, BottleneckConfig, targets_of
from llm_modules.zoo.configuration import nearest

if TYPE_CHECKING:
    from peft import PeftConfig
    from transformers import PreTrainedModel

# It is imported by peft, and says at each start which faster kernels there might be.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

_NOT_HERE = {
    "MULTITASK_PROMPT_TUNING": "it needs the task of each row",
    "POLY": "it needs the task of each row",
    "CPT": "it needs the types of the prompt's tokens",
    "CARTRIDGE": "its keys and values are made from a text",
    "ADAPTION_PROMPT": "it replaces attention layers by copies that know no packed rows",
    "XLORA": "it runs the model twice a step",
    "SHADOW": "it runs a second model beside the first",
    "MIXED": "it is several adapters at once",
    "OSF": "it replaces the base's weights",
}
"""Methods of peft that do more than put layers into a model, and why they cannot be trained here."""

_NEEDS_DATA = {"eva": "a pass over the data", "corda": "a pass over the data", "lora_ga": "gradients of the data"}
"""Initializations of LoRA that need more than the weights."""

CHANGES_BASE = ("pissa", "olora")
"""Initializations of LoRA that take what the adapter begins with out of the base's weights."""

_VIRTUAL = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING")

_DEFAULT_VIRTUAL_TOKENS = 20

LIBRARY_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RuntimeError, NotImplementedError, AssertionError)
"""What peft raises for a value that does not go with the model."""


def adapter_config(given: dict[str, Any] | str) -> PeftConfig | BottleneckConfig:
    """A new config of what ``backbone.adapter`` says: a class and its arguments, or the folder of a trained adapter.

    Raises:
        ValueError: no such class, folder or argument, or a value that the class refuses.
    """
    if find_spec("peft") is None:
        raise ValueError("backbone.adapter: needs `pip install peft`; or set it to null")
    if is_folder(given):
        config: Any = config_of_folder(given)
        if kind_of(config) == "P_TUNING" or getattr(config, "prefix_projection", False):
            raise ValueError(
                f"backbone.adapter: {given!r} holds the virtual tokens, without the network that made them; go on from "
                "the run's checkpoint (--ckpt_path)"
            )
        return config
    values: dict[str, Any] = {"class_path": given} if isinstance(given, str) else dict(given)
    path, arguments = values.pop("class_path", None), dict(values.pop("init_args", None) or {})
    if not isinstance(path, str):
        raise ValueError("backbone.adapter: no class_path; name a config class, such as peft.LoraConfig, or a folder")
    if values:
        raise ValueError(f"backbone.adapter: unknown key {sorted(values)[0]!r}; allowed: class_path, init_args")
    kind = _config_class(path)
    fields = {field.name: field for field in dataclasses.fields(kind) if field.init}
    for key in arguments:
        if key not in fields:
            raise ValueError(f"backbone.adapter: {kind.__name__} has no argument {key!r}{nearest(key, sorted(fields))}")
    return _made(kind, _with_defaults(kind, arguments, fields))


def is_folder(given: Any) -> TypeGuard[str]:
    """Whether ``backbone.adapter`` is the folder of a trained adapter, and no class."""
    return isinstance(given, str) and not re.fullmatch(r"(?:[A-Za-z_]\w*\.)*[A-Z]\w*", given)


def config_of_folder(given: str | Path) -> PeftConfig | BottleneckConfig:
    """The config of a trained adapter, ready to be trained on.

    Raises:
        ValueError: there is no adapter in the folder.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise ValueError(
            f"backbone.adapter: no folder {str(given)!r}; allowed: a class_path of a config (peft.LoraConfig) with "
            "its init_args, or the folder of a trained adapter"
        )
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / file).is_file():
            raise ValueError(f"backbone.adapter: no {file} in {str(folder)!r}; it is no adapter in safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as weights:  # its header says how long the file must be
            weights.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"backbone.adapter: {WEIGHTS_FILE} in {str(folder)!r} is broken: {one_line(error)}") from error
    try:
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        assert isinstance(values, dict)
        if values.get("peft_type") == KIND:
            known = {field.name for field in dataclasses.fields(BottleneckConfig)}
            return _made(BottleneckConfig, {key: value for key, value in values.items() if key in known})
        from peft import PeftConfig

        config = PeftConfig.from_pretrained(str(folder))
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise ValueError(f"backbone.adapter: {CONFIG_FILE} in {str(folder)!r}: {one_line(error)}") from error
    config.inference_mode = False
    _refuse_what_is_not_here(config)
    return config


def _config_class(path: str) -> Any:
    """The class of a ``class_path``; a bare name is one of peft's, or ours."""
    from peft import PeftConfig

    module_name, _, name = path.rpartition(".")
    ours = {"BottleneckConfig": "llm_modules.zoo.bottleneck"}
    module_name = module_name or ours.get(name, "peft")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(f"backbone.adapter.class_path: {path!r}: there is no module {module_name!r}") from error
    found = getattr(module, name, None)
    if not isinstance(found, type) or not issubclass(found, PeftConfig | BottleneckConfig):
        if module_name != "peft":
            raise ValueError(
                f"backbone.adapter.class_path: {path!r} is no config of an adapter; such as peft.LoraConfig"
            )
        known = sorted(
            n for n in dir(module) if n.endswith("Config") and n not in ("PeftConfig", "PromptLearningConfig")
        )
        raise ValueError(f"backbone.adapter.class_path: {path!r} is no config of peft{_nearest_class(name, known)}")
    return found


def _nearest_class(name: str, known: list[str]) -> str:
    """Nobody remembers which letters of LoHaConfig are capitals."""
    small = {other.lower(): other for other in known}
    return f"; did you mean {small[name.lower()]!r}?" if name.lower() in small else nearest(name, known)


def _with_defaults(kind: Any, given: dict[str, Any], fields: Iterable[str]) -> dict[str, Any]:
    """What people expect where peft has no default or another one."""
    values, fields = dict(given), set(fields)
    if kind is BottleneckConfig:
        return values
    values.setdefault("task_type", "CAUSAL_LM")
    own_targets = kind.__name__ in ("IA3Config", "LNTuningConfig", "TrainableTokensConfig", "BeftConfig")
    if "target_modules" in fields and not own_targets and not values.get("target_parameters"):
        values["target_modules"] = values.get("target_modules") or "all-linear"
    if "total_step" in fields:
        values.setdefault("total_step", 10**9)  # the run's length, when it is known
    if "num_virtual_tokens" in fields:
        values.setdefault("num_virtual_tokens", _DEFAULT_VIRTUAL_TOKENS)
    return values


def _made(kind: Any, values: dict[str, Any]) -> Any:
    import warnings

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = kind(**values)
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"backbone.adapter: {kind.__name__}: {one_line(error)}") from error
    if kind is not BottleneckConfig:
        _refuse_what_is_not_here(config)
    return config


def _refuse_what_is_not_here(config: Any) -> None:
    kind, name = str(getattr(config.peft_type, "value", config.peft_type)), type(config).__name__
    if kind in _NOT_HERE:
        raise ValueError(f"backbone.adapter: {name} cannot be trained here: {_NOT_HERE[kind]}")
    initialization = str(getattr(config, "init_lora_weights", "")).lower()
    if initialization in _NEEDS_DATA:
        raise ValueError(
            f"backbone.adapter: init_lora_weights {initialization!r} needs {_NEEDS_DATA[initialization]}, which is not "
            "made before training; allowed: true, gaussian, orthogonal, pissa, pissa_niter_N, olora"
        )
    if getattr(config, "alora_invocation_tokens", None):
        raise ValueError(
            "backbone.adapter: alora_invocation_tokens: activated LoRA cannot be trained here; leave it out"
        )
    if kind == "ADALORA" and config.init_r <= config.target_r:
        raise ValueError(
            f"backbone.adapter: init_r {config.init_r} must be above target_r {config.target_r}, to which it is pruned"
        )


def kind_of(config: Any) -> str:
    """``LORA``, ``ADALORA``, ``BOTTLENECK``, ...: peft's name of the method."""
    return KIND if isinstance(config, BottleneckConfig) else str(getattr(config.peft_type, "value", config.peft_type))


def virtual_tokens(config: Any) -> int:
    """Positions that the method puts before each document; 0 for most."""
    return int(config.num_virtual_tokens) if kind_of(config) in _VIRTUAL else 0


def changes_base(config: Any) -> bool:
    """Whether the initialization changes the base's weights."""
    return str(getattr(config, "init_lora_weights", "")).lower().startswith(CHANGES_BASE)


def keeps_base(config: Any) -> bool:
    """Whether the model with the adapter switched off is the one that it was put into, also after training."""
    return not changes_base(config) and getattr(config, "bias", "none") == "none"  # else the base's biases are trained


def unmergeable(config: Any) -> str | None:
    """Why an adapter of this kind cannot be put into the base's weights, as far as that is known of it; or None."""
    if kind_of(config) == KIND:
        return "it is not linear in what it is given"
    return "its virtual tokens are no weights of the base" if virtual_tokens(config) else None


def name_targets(config: Any, hf: PreTrainedModel) -> None:
    """Fill in targets that depend on the model, and refuse those that match nothing.

    Raises:
        ValueError: a name that no module has.
    """
    if isinstance(config, BottleneckConfig):
        if not targets_of(hf, config):
            raise ValueError(_nothing("target_modules", config.target_modules, hf))
        for name in config.target_modules or ():
            _check_name("target_modules", name, hf)
        return
    if kind_of(config) == "LN_TUNING" and config.target_modules is None:
        config.target_modules = sorted(
            {name.rpartition(".")[2] for name, m in hf.named_modules() if type(m).__name__.endswith("Norm")}
        )
    for key in ("target_modules", "feedforward_modules", "modules_to_save"):
        wanted = getattr(config, key, None)
        if isinstance(wanted, str) and wanted != "all-linear":
            try:
                found = any(re.fullmatch(wanted, name) for name, _ in hf.named_modules())
            except re.error as error:
                raise ValueError(f"backbone.adapter.{key}: {wanted!r} is no regular expression: {error}") from error
            if not found:
                raise ValueError(_nothing(key, wanted, hf))
        elif not isinstance(wanted, str):
            for name in wanted or ():
                _check_name(key, str(name), hf)
    stacked = [name for name, p in hf.named_parameters() if p.ndim == 3]
    for name in getattr(config, "target_parameters", None) or ():  # peft would only warn
        if not any(own == name or own.endswith(f".{name}") for own, _ in hf.named_parameters()):
            there = sorted({".".join(own.split(".")[-3:]) for own in stacked}) or "no stacked ones in this model"
            raise ValueError(
                f"backbone.adapter.target_parameters: {name!r} matches no parameter; there are "
                f"{there if isinstance(there, str) else ', '.join(there)}"
            )


def _check_name(key: str, wanted: str, hf: nn.Module) -> None:
    if not any(name == wanted or name.endswith(f".{wanted}") for name, _ in hf.named_modules()):
        raise ValueError(_nothing(key, wanted, hf))


def _nothing(key: str, wanted: Any, hf: nn.Module) -> str:
    """What is there, where a target matches nothing."""
    there = sorted({name.rpartition(".")[2] for name, m in hf.named_modules() if name and _has_weights(m)})
    hint = nearest(wanted, there).split(";")[-1].strip() if isinstance(wanted, str) else ""
    hint = f" ({hint})" if hint.startswith("did you mean") else ""
    return f"backbone.adapter.{key}: {wanted!r} matches no module{hint}; there are {', '.join(there)}"


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False))


def one_line(error: BaseException) -> str:
    """A library's message without its line breaks, cut where it is long."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:297]}..."
