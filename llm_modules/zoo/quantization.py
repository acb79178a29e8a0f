"""A frozen base in 4 or 8 bits, through bitsandbytes, on a CPU and on a GPU (QLoRA, arXiv 2305.14314).

Weights are quantized on the CPU, so that they are the same bits on every device. Only linear layers inside the decoder
are; embeddings, norms, routers' and experts' stacked weights and the output head stay as they are.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn

from llm_modules.zoo.configuration import nearest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Quantization = Literal["nf4", "nf4-double", "fp4", "int8"]

_BLOCK = 64
"""Weights that share a scale in 4 bits (bitsandbytes' default)."""

_SCALE_BLOCK = 256
"""Scales that share a scale of their own under double quantization."""


def check_quantization(kind: str, *, head: str = "chunked") -> None:
    """Raise a ValueError for a quantization that there is not, or that is not installed."""
    kinds = list(get_args(Quantization))
    if kind not in kinds:
        raise ValueError(f"backbone.quantization: unknown value {kind!r}{nearest(str(kind), kinds)}")
    if find_spec("bitsandbytes") is None:
        raise ValueError(f"backbone.quantization: {kind} needs `pip install bitsandbytes`; or set it to null")


def quantizable(hf: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that are quantized, by name."""
    head = hf.get_output_embeddings()
    return {name: m for name, m in hf.named_modules() if isinstance(m, nn.Linear) and m is not head}


def check_layers(hf: PreTrainedModel) -> None:
    """Raise a ValueError where a family has no linear layer (GPT-2's are of a class of their own)."""
    if not quantizable(hf):
        raise ValueError(
            f"backbone.quantization: {type(hf).__name__} has no torch.nn.Linear to quantize; set it to null"
        )


def quantized_bytes(kind: str, weight: Tensor) -> int:
    """Bytes of a quantized matrix with its scales."""
    size = weight.numel()
    if kind == "int8":
        return size + 4 * weight.shape[0]
    scales = -(-size // _BLOCK)
    if kind == "nf4-double":
        return size // 2 + scales + 4 * -(-scales // _SCALE_BLOCK)
    return size // 2 + 4 * scales


@torch.no_grad()
def quantize(hf: PreTrainedModel, kind: Quantization, compute_dtype: torch.dtype) -> None:
    """Replace the decoder's linear layers by quantized ones, in place; biases stay.

    Args:
        compute_dtype: of the matrix products (what autocast would use, or the weights' own dtype).
    """
    check_layers(hf)
    for name, linear in quantizable(hf).items():
        owner, _, leaf = name.rpartition(".")
        setattr(hf.get_submodule(owner), leaf, _quantized(linear, kind, compute_dtype))
    # What peft asks before it puts its layers for bitsandbytes in.
    setattr(hf, "is_loaded_in_8bit" if kind == "int8" else "is_loaded_in_4bit", True)


@torch.no_grad()
def dequantize(hf: PreTrainedModel) -> None:
    """Put ordinary linear layers back, in place, with the values that the quantized ones computed with (in fp32)."""
    for name, module in list(hf.named_modules()):
        if not isinstance(module, nn.Linear) or type(module.weight) is nn.Parameter:
            continue
        weight = dequantized(module).float()
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=module.bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.data.float(), requires_grad=False)
        owner, _, leaf = name.rpartition(".")
        setattr(hf.get_submodule(owner), leaf, linear)
    for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        if hasattr(hf, flag):
            delattr(hf, flag)


def dequantized(module: Any) -> Tensor:
    """(out, in) weight of a quantized layer as its matrix product sees it."""
    from bitsandbytes import functional

    if type(module.weight).__name__ == "Params4bit":
        return functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    return module.weight.data.float() * (module.row_scales[:, None].float() / 127)


def _quantized(linear: nn.Linear, kind: Quantization, compute_dtype: torch.dtype) -> nn.Module:
    import bitsandbytes as bnb

    has_bias = linear.bias is not None
    if kind == "int8":
        made: Any = _int8_class()(
            linear.in_features, linear.out_features, bias=has_bias, has_fp16_weights=False, device="meta"
        )
        made.weight = bnb.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False, has_fp16_weights=False)
    else:
        double = kind == "nf4-double"
        made = bnb.nn.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=has_bias,
            compute_dtype=compute_dtype,
            compress_statistics=double,
            quant_type="fp4" if kind == "fp4" else "nf4",
            device="meta",
        )
        made.weight = bnb.nn.Params4bit(
            linear.weight.data.cpu(),
            requires_grad=False,
            compress_statistics=double,
            quant_type="fp4" if kind == "fp4" else "nf4",
            module=made,
        )
        # On some CPUs a forward pass without gradients (a validation) would put the weights into another layout, in
        # which the next training step has no gradient.
        made.support_avx512bf16_for_cpu = False
    made.compute_dtype = compute_dtype
    made.weight = made.weight.to("cpu")  # quantizes
    if kind == "int8":  # where they stay when a strategy puts another parameter in the place of bitsandbytes' own
        made.register_buffer("row_scales", made.weight.SCB, persistent=False)
    if has_bias:
        made.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return made.train(linear.training)


def _int8_class() -> type:
    import bitsandbytes as bnb
    from bitsandbytes.autograd._functions import MatMul8bitFp

    class Linear8bit(bnb.nn.Linear8bitLt):
        """LLM.int8 (arXiv 2208.07339) on a GPU; on a CPU its weights with products in the compute dtype.

        bitsandbytes' own layer computes otherwise in training than in evaluation on a CPU, and its backward pass fails
        under autocast.
        """

        compute_dtype: torch.dtype
        row_scales: Tensor
        weight: Any

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, enabled=False):
                hidden = x.to(self.compute_dtype)
                bias = None if self.bias is None else self.bias.to(self.compute_dtype)
                self.state.CB, self.state.SCB = self.weight.data, self.row_scales
                if not x.is_cpu:
                    self.weight.CB = self.weight.SCB = None
                    return super().forward(hidden).to(x.dtype)
                return MatMul8bitFp.apply(hidden, self.weight, None, bias, self.state).to(x.dtype)

    return Linear8bit
