"""A frozen model beside the one that is trained: that one without its adapter, or a copy of what it began as."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from llm_modules.zoo.adapter_config import adapter_config, is_folder, keeps_base, kind_of
from llm_modules.zoo.causal_lm import CausalLM
from llm_modules.zoo.estimate import narrowed_layers
from llm_modules.zoo.weights import weights_digest


def needs_copy(adapter: dict[str, Any] | str | None, wanted: str) -> bool:
    """Whether a frozen copy has to be made, or the model without its adapter is what it began as.

    Args:
        adapter: ``backbone.adapter`` of the config. The base of one that was trained before is not what the model
            begins as.
        wanted: ``model.reference`` of the config: ``base``; ``auto``: the base where that is what the model begins as;
            else a copy.

    Raises:
        ValueError: ``base``, of a model that has none.
    """
    config = None if adapter is None else adapter_config(adapter)
    if config is None or not keeps_base(config):
        if wanted == "base":
            why = f"this {kind_of(config)} changes the base that it is put into" if config else "there is no adapter"
            raise ValueError(f"model.reference: base, but {why}; allowed: copy, auto")
        return True
    if wanted == "base" and is_folder(adapter):
        from lightning.pytorch.utilities.rank_zero import rank_zero_warn

        rank_zero_warn(
            "model.reference: base, but backbone.adapter was trained before: what the model is compared with is not "
            "what it begins as; set copy for that"
        )
    return wanted != "base" and (wanted != "auto" or is_folder(adapter))


def identity(copy: CausalLM) -> str:
    """Of a frozen copy, before it is placed: what its weights are, for the checkpoint."""
    return f"{copy.hf.get_input_embeddings().weight.dtype} {weights_digest(copy)}"


def check_identity(saved: str | None, copy: str, key: str = "model.backbone.source") -> None:
    """Raises a ValueError for another copy than the checkpoint was made with; the key says where it comes from.
    Copies in two precisions are not compared; older checkpoints name none."""
    if saved is not None and saved != copy and saved.split()[0] == copy.split()[0]:
        raise ValueError(
            "ckpt_path: the frozen model that this one is compared with is another one than when the run began: "
            f"{key} was changed since; put it back, or export the checkpoint and begin a new run from it"
        )


def place_frozen(copy: CausalLM, trainer: Any, device: torch.device) -> None:
    """Move a frozen copy to its device, as small as it can be.

    Autocast would narrow the weights of its linear layers in each forward pass, so they are narrowed once: the numbers
    are the same. Biases, norms, embeddings and the head are left, and a copy with an adapter is.

    Raises:
        ValueError: it was narrowed for another precision.
    """
    from lightning.pytorch.plugins.precision import MixedPrecision

    plugin, layers = trainer.precision_plugin, narrowed_layers(copy.hf) if copy.adapter is None else []
    embedding: Any = copy.hf.get_input_embeddings()
    wide = wanted = embedding.weight.dtype
    if isinstance(plugin, MixedPrecision):
        wanted = torch.bfloat16 if plugin.precision == "bf16-mixed" else torch.float16
    for layer in layers:
        if layer.weight.dtype not in (wide, wanted):
            raise ValueError(
                f"trainer.precision: {plugin.precision}, but the frozen copy of this module was narrowed to "
                f"{layer.weight.dtype} for an earlier trainer; make the module anew"
            )
        layer.weight.data = layer.weight.data.to(wanted)
    copy.to(device)


@contextmanager
def still(model: CausalLM) -> Iterator[CausalLM]:
    """Inside, the model neither learns nor drops anything."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        model.train(training)


@contextmanager
def as_reference(model: CausalLM, copy: CausalLM | None) -> Iterator[CausalLM]:
    """Inside, the copy, or without one the model without its adapter: no dropout, and no gradient."""
    with still(copy or model) as asked, nullcontext() if copy else model.as_base():
        yield asked


def base_logits(model: CausalLM, hidden_CH: Tensor) -> Tensor:
    """(C, V) fp32 logits of final hidden states under the model's head without its adapter."""
    with model.as_base():
        return model.logits(hidden_CH)
