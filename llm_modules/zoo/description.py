"""What a model is, as plain values: kept in checkpoints, so that one of another model can be told and named."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig

_NOT_THE_MODEL = {
    "_name_or_path",
    "transformers_version",
    "architectures",
    "dtype",
    "torch_dtype",
    "use_cache",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "task_specific_params",
    "id2label",
    "label2id",
    "problem_type",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "chunk_size_feed_forward",
    "is_encoder_decoder",
    "output_router_logits",
    "router_aux_loss_coef",
    "aux_loss_coef",
}
"""Keys of a config that may differ between two configs of one model."""

_NAMED = 6
"""Differences that a message lists before it says how many more there are."""


def describe(hf: nn.Module) -> dict[str, Any]:
    """Family, the config's values that shape the model, and the number of parameters."""
    config: PretrainedConfig = hf.config  # type: ignore[assignment]
    return {
        "model_type": config.model_type,
        "parameters": sum(p.numel() for p in hf.parameters()),
        "config": config_values(config),
    }


def config_values(config: PretrainedConfig) -> dict[str, Any]:
    """The values of a config that shape the model."""
    return _plain({k: v for k, v in config.to_dict().items() if k not in _NOT_THE_MODEL and not k.startswith("_")})


def describe_difference(saved: dict[str, Any], current: dict[str, Any]) -> str:
    """In one line what differs, ``key saved -> current``; empty if nothing does."""
    before, now = _flat(saved), _flat(current)
    if "base" in saved and "base" in current and saved["base"]["digest"] != current["base"]["digest"]:
        return f"the adapter's base is {_base(saved['base'])}, not {_base(current['base'])}"
    if before.get("model_type") != now.get("model_type"):  # then every other difference is noise
        keys = ["model_type", "parameters"]
    else:
        ignored = {"config.model_type", "base.source", "base.seed", "base.dtype", "base.as_it_is", "base.digest"}
        keys = sorted({*before, *now} - ignored, key=lambda key: (key.count("."), key))
    absent = object()
    different = [key for key in keys if before.get(key, absent) != now.get(key, absent)]
    parts = [
        f"{key.removeprefix('config.')} {before.get(key, 'absent')} -> {now.get(key, 'absent')}"
        for key in different[:_NAMED]
    ]
    if len(different) > _NAMED:
        parts.append(f"and {len(different) - _NAMED} more")
    return ", ".join(parts)


def _base(base: dict[str, Any]) -> str:
    """Where a base's weights come from, in words."""
    source = repr(base["source"]) if base["seed"] is None else f"random weights of seed {base['seed']}"
    return f"{source} (weights {base['digest'][:8]}, {base['dtype']})"


def _plain(value: Any) -> Any:
    """Only what a checkpoint opens with ``weights_only=True``, and compares equal after a round through it."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else str(value)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
