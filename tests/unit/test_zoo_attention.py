"""The attention operator, against the definition written out."""

from __future__ import annotations

import math
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from llm_modules.zoo.attention import packed_attention, packed_mask, training_layout
from llm_modules.zoo.document_attention import document_attention

MODULE: Any = SimpleNamespace(is_causal=True, training=True, num_key_value_groups=2)


def written_out(
    query: Tensor, key: Tensor, value: Tensor, ends: list[int], scale: float, window: int | None, softcap: float | None
) -> Tensor:
    """(1, N, H, D): position i of a document sees j <= i of the same document, at most window - 1 back."""
    group = query.shape[2] // key.shape[2]
    out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=query.dtype)
    for row in range(query.shape[0]):
        for start, stop in pairwise(ends):
            for head in range(query.shape[2]):
                q, k, v = query[row, start:stop, head], key[row, start:stop, head // group], None
                v = value[row, start:stop, head // group]
                scores = q @ k.T * scale
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                back = torch.arange(stop - start)[:, None] - torch.arange(stop - start)
                hidden = (back < 0) | (back >= (window or math.inf))
                out[row, start:stop, head] = scores.masked_fill(hidden, -math.inf).softmax(-1) @ v
    return out


def tensors(rows: int, length: int, dtype: torch.dtype = torch.float64, value_size: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, length, 4, 8), (rows, length, 2, 8), (rows, length, 2, value_size)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [None, 1, 5, 150])
def test_documents_of_many_lengths(window: int | None, softcap: float | None) -> None:
    """Lengths around the operator's block of 128 positions."""
    ends = [0, 1, 4, 131, 259, 388, 690]
    inputs = tensors(1, ends[-1])
    got = document_attention(*inputs, torch.tensor(ends, dtype=torch.int32), 0.3, window, softcap)
    expected = written_out(*inputs, ends, 0.3, window, softcap)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def families() -> tuple[list[int], list[int], Tensor]:
    """Ends of documents, ends of their keys, and the keys, of prompts of three lengths with two answers each."""
    lengths, keys = [], []
    for prompt, answers in ((150, (140, 3)), (0, (5, 1)), (7, (300, 128))):
        start = sum(lengths)
        parts = [(start, start + prompt)]
        for answer in answers:
            parts.append((parts[-1][1], parts[-1][1] + answer))
        lengths += [stop - first for first, stop in parts]
        keys += [torch.arange(*parts[0])] + [torch.cat([torch.arange(*parts[0]), torch.arange(*p)]) for p in parts[1:]]
    ends = torch.tensor([0, *lengths]).cumsum(0).tolist()
    return ends, torch.tensor([0, *map(len, keys)]).cumsum(0).tolist(), torch.cat(keys)


def each_apart(inputs: list[Tensor], window: int | None, softcap: float | None) -> Tensor:
    """By the definition: every document with what it begins with before it."""
    ends, key_ends, keys = families()
    out = []
    for (start, stop), (begin, end) in zip(pairwise(ends), pairwise(key_ends), strict=True):
        own = keys[begin:end]
        whole = written_out(*(t[:, own] for t in inputs), [0, len(own)], 0.3, window, softcap)  # type: ignore[arg-type]
        out.append(whole[:, len(own) - (stop - start) :])
    return torch.cat(out, 1)


@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (5, 0.7), (150, None), (200, None)])
def test_documents_that_share_what_they_begin_with(window: int | None, softcap: float | None) -> None:
    ends, key_ends, keys = families()
    inputs = tensors(1, ends[-1])
    got, _ = packed_attention(
        MODULE,
        *(tensor.transpose(1, 2) for tensor in inputs),
        attention_mask=None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        cu_seq_lens_q=torch.tensor(ends, dtype=torch.int32),
        cu_seq_lens_k=torch.tensor(key_ends, dtype=torch.int32),
        shared_keys=keys,
    )
    expected = each_apart(inputs, window, softcap)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(got)
    for one, other in zip(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("window", [None, 5])
def test_rows_without_offsets_are_documents_each(window: int | None) -> None:
    inputs = tensors(3, 140, value_size=6)
    got = document_attention(*inputs, None, 0.3, window, None)
    torch.testing.assert_close(got, written_out(*inputs, [0, 140], 0.3, window, None), rtol=0, atol=1e-12)
    got.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in inputs)


def test_half_precision_is_as_near_as_torchs_own() -> None:
    inputs = tensors(1, 300)
    exact = written_out(*inputs, [0, 300], 0.35, None, None)
    half = [tensor.bfloat16() for tensor in inputs]
    query, key, value = (tensor.transpose(1, 2) for tensor in half)
    own = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.35, enable_gqa=True
    ).transpose(1, 2)
    got = document_attention(*half, None, 0.35, None, None)
    assert (got - exact).norm() <= 2 * (own - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_short_documents_are_rounded_once(dtype: torch.dtype, softcap: float | None) -> None:
    """A CPU computes them in fp32: outputs and gradients are those of fp32, and no score or probability is rounded."""
    offsets = torch.tensor([0, 1, 4, 67, 131], dtype=torch.int32)
    half = [tensor.detach().to(dtype).requires_grad_() for tensor in tensors(1, 131)]
    wide = [tensor.detach().float().requires_grad_() for tensor in half]
    found, wanted = (document_attention(*inputs, offsets, 0.3, None, softcap) for inputs in (half, wide))
    assert torch.equal(found, wanted.to(dtype))
    upstream = torch.randn_like(found)
    for one, other in zip(
        torch.autograd.grad(found, half, upstream), torch.autograd.grad(wanted, wide, upstream.float()), strict=True
    ):
        assert torch.equal(one, other.to(dtype))


def test_operator_is_registered_right() -> None:
    """Schema, fake tensors, autograd and dynamic shapes, by torch's own checks."""
    offsets = torch.tensor([0, 3, 10, 17], dtype=torch.int32)
    for window, softcap in ((None, None), (4, 0.5)):
        torch.library.opcheck(document_attention, (*tensors(1, 17), offsets, 0.3, window, softcap))
    torch.library.opcheck(document_attention, (*tensors(2, 17), None, 0.3, None, None))
    query, (_, key, value) = tensors(1, 17)[0], tensors(1, 24)
    more = torch.tensor([0, 3, 14, 24], dtype=torch.int32)
    torch.library.opcheck(document_attention, (query, key, value, offsets, 0.3, 4, None, more))


def test_no_matrix_of_all_positions_is_made() -> None:
    """10,000 positions: scores of all pairs would be 400 MB a head."""
    inputs = tensors(1, 10_000, torch.float32)
    offsets = torch.arange(0, 10_001, 100, dtype=torch.int32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        document_attention(*inputs, offsets, 0.3, None, None).sum().backward()
    assert max(event.cpu_memory_usage for event in profile.events()) < 50e6


def test_autocast_reaches_the_operator() -> None:
    query, key, value = (tensor.float().transpose(1, 2) for tensor in tensors(1, 20))
    with torch.autocast("cpu", torch.bfloat16):
        out, weights = packed_attention(MODULE, query, key, value, None, scaling=0.3)
    assert out.dtype == torch.bfloat16
    assert weights is None


def test_masks_are_made_outside_of_training_only() -> None:
    padding = torch.tensor([[False, True, True]])
    arguments = {"batch_size": 1, "q_length": 3, "kv_length": 3, "attention_mask": padding}
    with training_layout():
        assert packed_mask(**arguments) is None
    mask = packed_mask(**arguments)
    assert mask is not None
    assert mask[0, 0].tolist() == [[False, False, False], [False, True, False], [False, True, True]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"s_aux": torch.zeros(4)}, "no attention sinks"),
        ({"dropout": 0.1}, "no dropout, got 0.1"),
        ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, "take no mask"),
        ({"is_causal": False}, "take no mask"),
    ],
)
def test_what_it_cannot_do_is_refused(arguments: dict[str, Any], message: str) -> None:
    query, key, value = (tensor.transpose(1, 2) for tensor in tensors(1, 6))
    offsets = torch.tensor([0, 2, 6], dtype=torch.int32)
    arguments = {"attention_mask": None, **arguments}
    with pytest.raises(ValueError, match=message):
        packed_attention(MODULE, query, key, value, cu_seq_lens_q=offsets, **arguments)


@pytest.mark.gpu
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 0.7)])
@pytest.mark.parametrize("ends", [None, [0, 1, 4, 131, 259, 388, 690]])
def test_cuda_agrees_with_the_definition(ends: list[int] | None, window: int | None, softcap: float | None) -> None:
    inputs = [tensor.detach() for tensor in tensors(1, 690)]
    exact = [tensor.clone().requires_grad_() for tensor in inputs]
    expected = written_out(*exact, ends or [0, 690], 0.3, window, softcap)
    half = [tensor.cuda().bfloat16().requires_grad_() for tensor in inputs]
    offsets = None if ends is None else torch.tensor(ends, dtype=torch.int32, device="cuda")
    got, _ = packed_attention(
        MODULE,
        *(tensor.transpose(1, 2) for tensor in half),
        attention_mask=None,
        scaling=0.3,
        sliding_window=window,
        softcap=softcap,
        cu_seq_lens_q=offsets,
        max_length_q=690,
    )
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    got.backward(upstream.cuda().bfloat16())
    assert (got.cpu() - expected).norm() <= 0.01 * expected.norm()
    for one, other in zip(half, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad.cpu() - other.grad).norm() <= 0.02 * other.grad.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 5, 200])
def test_cuda_agrees_on_documents_that_share_what_they_begin_with(window: int | None) -> None:
    ends, key_ends, keys = families()
    exact = tensors(1, ends[-1])
    expected = each_apart(exact, window, None)
    half = [tensor.detach().cuda().bfloat16().requires_grad_() for tensor in exact]
    got, _ = packed_attention(
        MODULE,
        *(tensor.transpose(1, 2) for tensor in half),
        attention_mask=None,
        scaling=0.3,
        sliding_window=window,
        cu_seq_lens_q=torch.tensor(ends, dtype=torch.int32, device="cuda"),
        cu_seq_lens_k=torch.tensor(key_ends, dtype=torch.int32, device="cuda"),
        shared_keys=keys.cuda(),
        max_length_q=500,
    )
    upstream = torch.randn_like(expected)
    expected.backward(upstream)
    got.backward(upstream.cuda().bfloat16())
    assert (got.cpu() - expected).norm() <= 0.01 * expected.norm()
    for one, other in zip(half, exact, strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert (one.grad.cpu() - other.grad).norm() <= 0.02 * other.grad.norm()
