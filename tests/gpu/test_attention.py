"""Packed attention on a GPU, where it is FlashAttention's, against our own operator in fp32 on a CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from llm_modules.zoo.attention import packed_attention

pytestmark = pytest.mark.gpu

LENGTHS = (3, 130, 1, 64, 58)


def outcome(states: list[Tensor], offsets: Tensor | None, window: int | None) -> list[Tensor]:
    """Output and gradients, on the CPU in fp32."""
    leaves = [state.detach().clone().requires_grad_() for state in states]
    longest = None if offsets is None else max(LENGTHS)
    out, _ = packed_attention(
        nn.Module(), *leaves, None, cu_seq_lens_q=offsets, max_length_q=longest, sliding_window=window
    )
    weights = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float32).view(out.shape)
    (out.float() * weights).sum().backward()
    return [out.detach().float().cpu(), *(leaf.grad.float().cpu() for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["alike", "grouped"])
@pytest.mark.parametrize("window", [None, 16], ids=["whole", "window"])
@pytest.mark.parametrize("packed", [True, False], ids=["packed", "rows"])
def test_it_computes_what_the_cpu_does(
    dtype: torch.dtype, heads: tuple[int, int], window: int | None, packed: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    rows, length = (1, sum(LENGTHS)) if packed else (2, 128)
    shapes = [(rows, heads[0], length, 64), *[(rows, heads[1], length, 64)] * 2]
    states = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    offsets = torch.tensor([0, *LENGTHS]).cumsum(0).int() if packed else None
    expected = outcome([state.float() for state in states], offsets, window)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    on_device = None if offsets is None else offsets.to(device)
    actual = outcome([state.to(device) for state in states], on_device, window)
    for ours, theirs in zip(actual, expected, strict=True):
        assert (ours - theirs).norm() < (1e-5 if dtype == torch.float32 else 2e-2) * theirs.norm()
