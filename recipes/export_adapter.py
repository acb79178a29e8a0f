"""`recipes export` of a checkpoint that holds an adapter: a folder for peft, or (`--merge`) an ordinary one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from recipes.errors import UserError, one_line

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from llm_modules.zoo import Backbone, CausalLM

_TOLERANCE = 1e-4
"""A merged model's logits may differ by this share of the largest; more is no rounding."""


def build(
    about: dict[str, Any],
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    *,
    base: str | None,
    merge: bool,
) -> tuple[CausalLM, Backbone]:
    """The model that was trained: its base built again, and the checkpoint's adapter in it.

    Args:
        about: the checkpoint's own entry.
        weights: the adapter's, by their names in the checkpoint.
        base: if the base's folder lies elsewhere now.
        merge: with ordinary layers, where they were quantized, and merged.

    Raises:
        UserError, ValueError: the base is not where it was, or is another one; the adapter cannot be merged.
    """
    import torch

    from llm_modules.zoo import Backbone, describe_difference
    from llm_modules.zoo.weights import cast_parameters

    kept = about["adapter"]
    backbone = Backbone(**{**kept["backbone"], "compile": False, "activation_checkpointing": False})
    backbone.source = base or (about["backbone"]["base"]["source"] if backbone.source is not None else None)
    try:
        model = backbone.build(
            tokenizer=tokenizer,
            sequence_length=1,
            seed=kept["seed"],
            precision=kept["precision"],
            dequantize=merge,
            scalar="score" in about["backbone"],
        ).eval()
    except ValueError as error:
        hint = "" if base or backbone.source is None else "; say where the base is now with --base"
        raise UserError(f"{path}: its base cannot be built again: {one_line(error)}{hint}") from error
    if difference := describe_difference(about["backbone"], model.description()):
        raise UserError(f"{path}: {difference}")
    try:
        model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()})
    except RuntimeError as error:
        raise UserError(f"{path}: the adapter does not fit the model: {one_line(error)[:300]}") from error
    assert model.adapter is not None
    model.adapter.load_state(kept["state"])
    if merge:
        cast_parameters(model.hf, torch.float32)
        _merge(model)
    return model, backbone


def _merge(model: CausalLM) -> None:
    """Merge, and see that the model still says the same."""
    import torch

    assert model.adapter is not None
    ids = torch.arange(24)[None] % int(model.hf.config.get_text_config().vocab_size)
    with torch.no_grad():
        before = model.hf(input_ids=ids, use_cache=False).logits
        model.adapter.merge()
        after = model.hf(input_ids=ids, use_cache=False).logits
    difference = float((after - before).abs().max() / before.abs().max())
    if not difference <= _TOLERANCE:
        raise UserError(
            f"--merge: the merged model's logits differ by {difference:.1e}: a shared weight (tied embeddings?) has "
            "an adapter at one of its places only; export without --merge"
        )
