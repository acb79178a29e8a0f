"""The attention operator of packed documents in plain matrix products: for CPUs, and what flash kernels cannot do.

Shape legend: B rows, N positions, M keys, H query heads, K key/value heads, G = H / K, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

_BLOCK = 128
"""Queries scored at once: of 64 to 1024 the fastest on a CPU (docs/decisions.md), and what bounds the memory."""
_SMALL = 128 * 128
"""Scores of a block of a head that a CPU computes in fp32 (see ``_wide``)."""


@torch.library.custom_op("litrecipes::document_attention", mutates_args=())
def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
    key_offsets: Tensor | None = None,
) -> Tensor:
    """Causal attention of each document to itself, exact, in blocks of queries; saves nothing but its inputs.

    One opaque operator, so that compiled code sees neither the documents' lengths nor a graph break. Matrix products of
    whole blocks use the CPU's matrix units, which makes it faster than torch's own flash kernel for CPUs.

    Args:
        query: (B, N, H, D); key (B, M, K, D), value (B, M, K, D').
        offsets: (documents + 1,) cumulative lengths, or None: each row is one document.
        key_offsets: (documents + 1,) cumulative lengths of the documents' keys, where these are more than its queries,
            which stand at the last of them (a prompt that several answers share); None: M is N, and the same.

    Returns:
        (B, N, H, D').
    """
    query, key, value = _grouped(query, key, value)
    rows, kv_heads, group, length, _ = query.shape
    out = query.new_empty(rows, length, kv_heads, group, value.shape[-1])
    for part, seen, blocked in _blocks(query, offsets, key_offsets, window):
        queries, keys, values = _wide(_rows(query, part), key[:, seen], value[:, seen])
        probs, _ = _probabilities(queries * scale, keys, blocked, group, softcap)
        heads = torch.bmm(probs, values).view(rows, kv_heads, group, part.stop - part.start, -1)
        out[:, part] = heads.permute(0, 3, 1, 2, 4)
    return out.flatten(2, 3)


@document_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Any,
    scale: float,
    window: int | None,
    softcap: float | None,
    key_offsets: Any = None,
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op("litrecipes::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    key_offsets: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``document_attention``; the probabilities are computed again."""
    grad = _grouped(grad, key, value)[0]
    query, key, value = _grouped(query, key, value)
    rows, kv_heads, group, length, size = query.shape
    grad_query = query.new_empty(rows, length, kv_heads, group, size)
    grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
    for part, seen, blocked in _blocks(query, offsets, key_offsets, window):
        queries, keys, values, upstream = _wide(_rows(query, part), key[:, seen], value[:, seen], _rows(grad, part))
        scaled = queries * scale
        probs, slope = _probabilities(scaled, keys, blocked, group, softcap)
        grad_value[:, seen] += torch.bmm(probs.mT, upstream)
        grad_probs = torch.bmm(upstream, values.mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        if slope is not None:
            grad_scores.mul_(slope)
        heads = torch.bmm(grad_scores, keys).mul_(scale)
        grad_query[:, part] = heads.view(rows, kv_heads, group, part.stop - part.start, size).permute(0, 3, 1, 2, 4)
        grad_key[:, seen] += torch.bmm(grad_scores.mT, scaled)
    grad_key, grad_value = (
        g.view(rows, kv_heads, key.shape[1], -1).transpose(1, 2).contiguous() for g in (grad_key, grad_value)
    )
    return grad_query.flatten(2, 3), grad_key, grad_value


@document_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Any,
    key_offsets: Any,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, offsets, *ctx.settings, key_offsets = inputs
    ctx.save_for_backward(query, key, value, offsets, key_offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *document_attention_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None, None


document_attention.register_autograd(_backward, setup_context=_setup_context)


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, K, G, N, D), so that a key head's queries are one matrix; key and value (B * K, N, D)."""
    query = query.unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4)
    key, value = (t.transpose(1, 2).flatten(0, 1) for t in (key, value))
    return query, key, value


def _rows(query_BKGND: Tensor, part: slice) -> Tensor:
    """The queries of a block as (B * K, G * block, D)."""
    return query_BKGND[:, :, :, part].flatten(0, 1).flatten(1, 2)


def _wide(queries: Tensor, keys: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """In fp32, where a block is small and a CPU would multiply it in 16 bits: a kernel is compiled then for each shape,
    and short documents have ever new ones, each of which takes ten times as long as its products in fp32."""
    tensors = queries, keys, *others
    small = queries.shape[1] * keys.shape[1] <= _SMALL and queries.device.type == "cpu"
    return tuple(t.float() for t in tensors) if small and queries.dtype.itemsize == 2 else tensors


def _blocks(
    query_BKGND: Tensor, offsets: Tensor | None, key_offsets: Tensor | None, window: int | None
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries, the keys that a block sees, and what is hidden of the *last* of these keys.

    Yields:
        (queries, keys, hidden): ``hidden`` (block, columns) booleans over the last ``columns`` keys.
    """
    ends = [0, query_BKGND.shape[3]] if offsets is None else offsets.tolist()
    key_ends = ends if key_offsets is None else key_offsets.tolist()
    places = torch.arange(_BLOCK, device=query_BKGND.device)
    future = places[None, :] > places[:, None]
    for (start, stop), (begin, end) in zip(pairwise(ends), pairwise(key_ends), strict=True):
        shift = end - stop  # from a query's place to its own key's
        for first in range(start, stop, _BLOCK):
            last = min(first + _BLOCK, stop)
            size = last - first
            if window is None or last + shift - begin <= window:
                yield slice(first, last), slice(begin, last + shift), future[:size, :size]
                continue
            oldest = max(begin, first + shift - window + 1)
            behind = torch.arange(first + shift, last + shift, device=places.device)[:, None]
            behind = behind - torch.arange(oldest, last + shift, device=places.device)
            yield slice(first, last), slice(oldest, last + shift), (behind < 0) | (behind >= window)


def _probabilities(
    scaled: Tensor, key: Tensor, hidden: Tensor, group: int, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Softmax of the scores, and the soft-cap's slope at them."""
    scores = torch.bmm(scaled, key.mT)
    slope = None
    if softcap is not None:
        bounded = scores.div_(softcap).tanh_()
        slope = 1 - bounded * bounded
        scores = bounded.mul_(softcap)
    by_group = scores.view(scores.shape[0], group, -1, scores.shape[-1])
    by_group[..., -hidden.shape[1] :].masked_fill_(hidden, float("-inf"))
    return torch.softmax(scores, -1), slope
