"""Matrix products of the decoder's linear layers in fp8, through torchao; weights, gradients and optimizer in fp32.

Input, weight and gradient of each product are scaled by their largest value and rounded to 8 bits (e4m3; e5m2 for
gradients) as they are needed (arXiv 2209.05433, with scales made anew each time). Names and checkpoints stay as they
are, and what leaves is an ordinary model.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

if TYPE_CHECKING:
    from llm_modules.zoo.causal_lm import CausalLM

Float8 = bool | Literal["emulated"]

_MULTIPLE = 16
"""Sizes of matrices that a GPU multiplies in fp8 are multiples of this."""


def check_float8(kind: Any, *, frozen: bool) -> None:
    """Raise a ValueError for a value that there is not, that is not installed, or not for this model.

    Args:
        frozen: whether the backbone has an adapter or a quantized base.
    """
    if kind not in (False, True, "emulated"):
        raise ValueError(f"backbone.fp8: {kind!r} is not allowed; true, false or emulated")
    if kind and frozen:
        raise ValueError("backbone.fp8: not with an adapter or a quantized base; take precision/bf16-mixed instead")
    if kind and find_spec("torchao") is None:
        raise ValueError("backbone.fp8: needs torchao; pip install 'litrecipes[fp8]', or set it to false")


def use_float8(model: CausalLM, *, emulated: bool) -> int:
    """Let the linear layers of the decoder blocks multiply in fp8, in place; embeddings and head stay as they are.

    Args:
        emulated: round to fp8 and multiply in the higher precision: the same rounding on any device, without the speed.

    Returns:
        How many layers do.

    Raises:
        ValueError: none can.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    # Packed rows have any number of tokens: where these are summed over, they are padded to a multiple.
    config = Float8LinearConfig(emulate=emulated, pad_inner_dim=True)
    before = {id(module) for module in model.modules()}
    for block in model.blocks():
        convert_to_float8_training(block, module_filter_fn=_fits, config=config)
    count = sum(id(module) not in before for module in model.modules())
    if not count:
        raise ValueError(
            f"backbone.fp8: {type(model.hf).__name__} has no linear layer in its blocks whose sizes are multiples of "
            f"{_MULTIPLE}; set it to false"
        )
    return count


def _fits(module: nn.Module, name: str) -> bool:
    linear = cast("nn.Linear", module)
    return linear.in_features % _MULTIPLE == 0 and linear.out_features % _MULTIPLE == 0
