"""Less memory for what the backward pass needs: compute it again, or keep it in host memory."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Checkpointing = bool | int | Literal["selective"]

_SMALLEST = 1024
"""Bytes of a tensor that is worth a copy."""


def check_checkpointing(how: Checkpointing, compiled: bool) -> None:
    """Raises ValueError for a value that does not exist, or that does nothing."""
    if isinstance(how, str) and how != "selective":
        raise ValueError(
            f"backbone.activation_checkpointing: unknown value {how!r}; allowed: true, false, selective, a number"
        )
    if not isinstance(how, bool | str) and how < 1:
        raise ValueError(
            f"backbone.activation_checkpointing: {how} is not allowed; 1 or more (every n-th block), or a word"
        )
    if how == "selective" and compiled:
        raise ValueError(
            "backbone.activation_checkpointing: selective does not go with compile, whose blocks hide their operators; "
            "set it to true, or to 2 (every second block)"
        )


def recomputed(how: Checkpointing, layers: int) -> range:
    """Numbers of the blocks that are computed again."""
    if isinstance(how, bool | str):
        return range(layers if how else 0)
    return range(0, layers, how)


def checkpoint_activations(hf: PreTrainedModel, how: Checkpointing) -> None:
    """Blocks keep their input and are computed again in the backward pass (arXiv 1604.06174).

    Args:
        how: True: every block; a number n: every n-th block; ``selective``: in every block, but the outputs of matrix
            products and attention are kept, so that only what is cheap is computed again (arXiv 2205.05198, section 5).

    Raises:
        ValueError: the family does not support it.
    """
    if not hf.supports_gradient_checkpointing:
        raise ValueError(f"backbone.activation_checkpointing: {type(hf).__name__} does not support it; set it to false")
    settings: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        from torch.utils.checkpoint import create_selective_checkpoint_contexts

        settings["context_fn"] = partial(create_selective_checkpoint_contexts, kept_operators())
    # Its name until transformers 5.2x, and since.
    enable = getattr(hf, "activation_checkpointing_enable", None) or hf.gradient_checkpointing_enable
    enable(settings)
    if not isinstance(how, bool | str):
        from transformers.modeling_layers import GradientCheckpointingLayer

        blocks = [module for module in hf.modules() if isinstance(module, GradientCheckpointingLayer)]
        for number, block in enumerate(blocks):
            block.gradient_checkpointing = number in recomputed(how, len(blocks))


def kept_operators() -> list[Any]:
    """What selective checkpointing does not compute again: nearly all of a block's FLOPs."""
    import torch.nn.attention.varlen  # (defines the operator)

    import llm_modules.zoo.attention  # noqa: F401  (defines the operator)

    aten = torch.ops.aten
    return [
        aten._scaled_mm.default,  # in fp8
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.torch_attn._varlen_attn.default,
        torch.ops.litrecipes.document_attention.default,
    ]


class OutputsKept(TorchDispatchMode):
    """Counts the bytes that selective checkpointing would keep."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self._kept = set(kept_operators())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in self._kept:
            outputs = result if isinstance(result, tuple | list) else (result,)
            self.bytes += sum(output.nbytes for output in outputs if isinstance(output, Tensor))
        return result


class ActivationOffload(torch.autograd.graph.saved_tensors_hooks):
    """What is kept for the backward pass goes to host memory (pinned, where there is an accelerator), and comes back.

    Unlike ``torch.autograd.graph.save_on_cpu``, parameters stay: they are in memory anyway, and a copy of a gathered
    one would be of a whole block. A context manager, around the forward pass.
    """

    def __init__(self, blocks: list[nn.Module]) -> None:
        self._parameters: set[int] = set()
        self._pin = torch.accelerator.is_available()
        for block in blocks:
            block.register_forward_pre_hook(self._note)  # after those that gather its weights
        super().__init__(self._out, self._back)

    def _note(self, block: nn.Module, arguments: Any) -> None:
        self._parameters.update(_place(parameter) for parameter in block.parameters())

    def __enter__(self) -> None:
        self._parameters.clear()
        super().__enter__()

    def _out(self, tensor: Tensor) -> tuple[torch.device | None, Tensor]:
        if type(tensor) is not Tensor or tensor.nbytes < _SMALLEST or _place(tensor) in self._parameters:
            return None, tensor
        copy = torch.empty(tensor.size(), dtype=tensor.dtype, layout=tensor.layout, pin_memory=self._pin)
        copy.copy_(tensor, non_blocking=self._pin)  # on the stream of the computation: in order with the way back
        return tensor.device, copy

    @staticmethod
    def _back(kept: tuple[torch.device | None, Tensor]) -> Tensor:
        device, tensor = kept
        return tensor if device is None else tensor.to(device, non_blocking=True)


def _place(tensor: Any) -> int:
    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local.untyped_storage().data_ptr()
