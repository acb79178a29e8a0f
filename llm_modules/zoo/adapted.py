"""A backbone whose base is frozen: what is checked of adapter and quantization, how both are put in, what they take."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llm_modules.zoo.adapter_config import (
    adapter_config,
    kind_of,
    one_line,
    virtual_tokens,
)
from llm_modules.zoo.adapters import check_adapter, make_adapter
from llm_modules.zoo.attention import NAME
from llm_modules.zoo.causal_lm import BASE_FILE, BASE_FOLDER, CausalLM
from llm_modules.zoo.configuration import local_folder, with_room
from llm_modules.zoo.description import config_values, describe_difference
from llm_modules.zoo.quantization import check_layers, dequantize, quantizable, quantize, quantized_bytes
from llm_modules.zoo.weights import cast_parameters, weights_digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llm_modules.zoo.backbone import Backbone

PROVED = frozenset({
    "ADALORA", "BOTTLENECK", "IA3", "LN_TUNING", "LORA", "OFT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "VERA",
    "BOFT", "C3A", "FOURIERFT", "HRA", "LOHA", "LOKR", "MISS", "RANDLORA", "TRAINABLE_TOKENS", "VBLORA",
})  # fmt: skip
"""Methods for which the tests prove that the model computes what peft's does; others are tried when it is built."""

PROVED_QUANTIZED = frozenset({
    "ADALORA", "BOTTLENECK", "IA3", "LN_TUNING", "LORA", "OFT", "PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "VERA",
})  # fmt: skip

_SIZES: dict[str, tuple[int, int]] = {}
"""Of adapters that were tried already, in this process."""


def check_adapted(
    backbone: Backbone, config: PretrainedConfig, vocabulary: int, sequence_length: int, precision: str
) -> list[str]:
    """What is wrong with adapter and quantization, before weights load; one line each."""
    try:
        adapted_sizes(backbone, with_room(config, vocabulary))
        if isinstance(backbone.adapter, str):
            saved_base(Path(backbone.adapter).expanduser())
    except ValueError as error:
        return [str(error)]
    if backbone.adapter is None:
        return []
    wanted, problems = adapter_config(backbone.adapter), []
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    more = virtual_tokens(wanted)
    if more and positions is not None and sequence_length <= positions < sequence_length + more:
        problems.append(
            f"backbone.adapter: {more} virtual tokens before rows of {sequence_length} tokens exceed the model's "
            f"{positions} positions; lower num_virtual_tokens or sequence_length"
        )
    whole = kind_of(wanted) == "LN_TUNING" or getattr(wanted, "modules_to_save", None)
    if whole and backbone.dtype in ("bfloat16", "float16") and precision == "32-true":
        problems.append(
            f"backbone.dtype: {backbone.dtype}, but whole modules are trained, in float32; set trainer.precision "
            "bf16-mixed, or leave dtype out"
        )
    if kind_of(wanted) == "PREFIX_TUNING" and backbone.attention != NAME:
        problems.append(f"backbone.attention: {backbone.attention!r} has no prefixes; prefix tuning needs {NAME!r}")
    return problems


def adapted_sizes(backbone: Backbone, config: PretrainedConfig) -> tuple[int, int]:
    """Number of all parameters and of the trained ones, of a config with its final vocabulary.

    Raises:
        ValueError: adapter and quantization do not go with the model.
    """
    from llm_modules.zoo.estimate import meta_model, parameter_count

    given = backbone.adapter
    key = json.dumps([given, backbone.quantization is not None, config.to_dict()], sort_keys=True, default=str)
    if key not in _SIZES or isinstance(given, str):  # a folder may have changed
        if backbone.quantization is not None:
            check_layers(meta_model(config))
        if given is None:
            _SIZES[key] = parameter_count(meta_model(config)), 0
        else:
            _SIZES[key] = check_adapter(given, config, backbone.quantization is not None)
    return _SIZES[key]


def memory_of_base(backbone: Backbone, config: PretrainedConfig, parameters: int, trained: int, precision: str) -> int:
    """Bytes of the weights: a quantized or a half-precision base, and the adapter in full precision."""
    from llm_modules.zoo.backbone import TRUE_PRECISION
    from llm_modules.zoo.estimate import meta_model

    size = getattr(torch, backbone.dtype or TRUE_PRECISION.get(precision, "float32")).itemsize
    adapter = getattr(torch, TRUE_PRECISION.get(precision, "float32")).itemsize
    total = (parameters - trained) * size + trained * adapter
    if backbone.quantization is not None:
        for linear in quantizable(meta_model(config)).values():
            total += quantized_bytes(backbone.quantization, linear.weight) - linear.weight.numel() * size
    return total


def adapt(
    backbone: Backbone,
    model: CausalLM,
    base: dict[str, Any],
    *,
    seed: int,
    precision: str,
    dequantize: bool = False,
) -> None:
    """Freeze, quantize and adapt a model that was just built, in place.

    Args:
        base: what its weights are (``base_of``).
        seed, precision, dequantize: as of ``Backbone.build``, whose errors are raised.
    """
    from llm_modules.zoo.backbone import TRUE_PRECISION

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if backbone.adapter is not None:
        _check_base(backbone.adapter, base)
        _try(backbone, model)
    if backbone.quantization is not None:
        _quantize(backbone, model, precision, dequantize)
    if backbone.adapter is None:
        return
    dtype = getattr(torch, TRUE_PRECISION.get(precision, "float32"))
    model.adapt(make_adapter(backbone.adapter, model.hf, seed=seed, dtype=dtype), base)


def _quantize(backbone: Backbone, model: CausalLM, precision: str, back: bool) -> None:
    assert backbone.quantization is not None
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}.get(precision)
    weight = model.hf.get_output_embeddings().weight
    quantize(model.hf, backbone.quantization, mixed or weight.dtype)  # type: ignore[arg-type]
    if back:
        dequantize(model.hf)


def base_of(backbone: Backbone, hf: PreTrainedModel, *, seed: int) -> dict[str, Any]:
    """What the weights under an adapter are, in plain values: kept in checkpoints and in the adapter's folder."""
    source = None
    if backbone.source is not None:
        folder = local_folder(backbone.source)
        source = backbone.source if folder is None else str(folder.absolute())
    untouched = backbone.pretrained
    if untouched:  # no overrides that matter, and no rows for new tokens
        stored = replace(backbone, config=None).model_config(vocabulary=0)
        untouched = config_values(stored) == config_values(hf.config)
    return {
        "source": source,
        "seed": None if backbone.pretrained else seed,
        "digest": weights_digest(hf),
        "dtype": str(hf.get_output_embeddings().weight.dtype).removeprefix("torch."),
        "as_it_is": bool(untouched),
        "quantization": backbone.quantization,
    }


def _check_base(given: dict[str, Any] | str, base: dict[str, Any]) -> None:
    """Refuse to go on with an adapter on another base than it was trained on, where its folder says which."""
    folder = Path(given).expanduser() if isinstance(given, str) else None
    if folder is None or not (saved := saved_base(folder)):
        return
    if difference := describe_difference({"base": saved}, {"base": {**base, "quantization": saved["quantization"]}}):
        raise ValueError(f"backbone.adapter: {str(given)!r}: {difference}")


def saved_base(folder: Path) -> dict[str, Any]:
    """What an adapter's folder says of its base; empty where it does not (plain peft's).

    Raises:
        ValueError: the file is broken.
    """
    file = folder / BASE_FILE
    if not file.is_file():
        return {}
    try:
        saved = json.loads(file.read_text(encoding="utf-8"))
        return {key: saved[key] for key in ("source", "seed", "digest", "dtype", "as_it_is", "quantization")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"backbone.adapter: {BASE_FILE} in {str(folder)!r} is broken: {one_line(error)}") from error


def _try(backbone: Backbone, model: CausalLM) -> None:
    """Of a method that the tests do not prove, a small copy is tried.

    Raises:
        ValueError: it does not compute what peft's model does, or fails.
    """
    assert backbone.adapter is not None
    kind = kind_of(adapter_config(backbone.adapter))
    if kind in (PROVED if backbone.quantization is None else PROVED_QUANTIZED):
        return
    from llm_modules.zoo.probe import adapter_problem

    if problem := adapter_problem(model.hf.config, backbone.attention, backbone.adapter, backbone.quantization):
        raise ValueError(f"backbone.adapter: {kind} cannot be trained here: {problem}")


def save_adapted(
    model: CausalLM,
    backbone: Backbone,
    folder: str | Path,
    place: str | Path | None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    precision: str,
    scalar: bool = False,
) -> None:
    """Write an adapter's folder, and into its ``base/`` the base where it is nowhere else.

    Of a reward model, the ordinary folder with the adapter merged into it: its head was trained, too, and whoever
    scores opens classifiers.

    Args:
        folder: made if missing.
        place: where the folder will lie in the end, if it is renamed.
        tokenizer, seed, precision, scalar: what the model was built with.

    Raises:
        ValueError: a reward model's adapter cannot be merged.
    """
    if scalar:
        merged(model, backbone, tokenizer=tokenizer, seed=seed, precision=precision).save_pretrained(folder)
        return
    model.save_adapter(folder, place)
    assert model.base is not None
    if not model.base["as_it_is"]:
        bare = replace(backbone, adapter=None, quantization=None, compile=False, activation_checkpointing=False)
        base = bare.build(tokenizer=tokenizer, sequence_length=1, seed=seed, precision=precision)
        base.save_pretrained(Path(folder) / BASE_FOLDER)


def merged(
    model: CausalLM, backbone: Backbone, *, tokenizer: PreTrainedTokenizerBase, seed: int, precision: str
) -> CausalLM:
    """A reward model in fp32 with its adapter merged into it; the given one stays as it is. Arguments and errors:
    ``save_adapted``."""
    plain = replace(backbone, compile=False, activation_checkpointing=False)
    whole = plain.build(
        tokenizer=tokenizer, sequence_length=1, seed=seed, precision=precision, dequantize=True, scalar=True
    )
    assert whole.adapter is not None
    assert model.adapter is not None
    whole.load_state_dict(model.state_dict())
    whole.adapter.load_state(model.adapter.state())
    cast_parameters(whole.hf, torch.float32)
    whole.adapter.merge()
    return whole
