"""Attention for packed documents, registered with transformers under the name ``packed``.

One function serves every architecture that calls transformers' attention interface. Documents laid out one after
another in one row (``cu_seq_lens_q`` among the keyword arguments) attend causally to themselves only, and no N x N mask
or score matrix is ever made. Rows that are padded on the right need no mask at all. Whatever else comes (left padding,
caches) has a mask from ``packed_mask`` and goes the way of transformers' own ``sdpa``, so that generation works through
the same model.

Shape legend: B rows, N positions, H query heads, K key/value heads, G = H / K, D head size, L positions of a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import pairwise
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

NAME = "packed"
"""What ``attn_implementation`` is called in transformers."""

_BLOCK = 128
"""Queries scored at once: of 64 to 1024 the fastest on a CPU (docs/decisions.md), and what bounds the memory."""

_VARLEN_HAS_GROUPS = Version(torch.__version__.split("+")[0]) >= Version("2.12")
"""torch 2.11's variable-length attention wants as many key heads as query heads."""

_TRAINING_LAYOUT: ContextVar[bool] = ContextVar("training_layout", default=False)


@contextmanager
def training_layout() -> Iterator[None]:
    """Inside, rows are packed or padded on the right, there is no cache, and so transformers need not make a mask."""
    token = _TRAINING_LAYOUT.set(True)
    try:
        yield
    finally:
        _TRAINING_LAYOUT.reset(token)


def register() -> None:
    """Make ``packed`` known to transformers. Idempotent."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)


def packed_mask(*args: Any, **kwargs: Any) -> Tensor | None:
    """The mask of transformers' ``sdpa``, or none where the layout says all (see ``training_layout``)."""
    if _TRAINING_LAYOUT.get():
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(*args, **kwargs)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        query: (B, H, N, D); key, value: (B, K, N, D).
        attention_mask: None, or (B, 1, N, M) booleans of what may be seen.
        scaling: factor of the scores; None: 1 / sqrt(D).
        sliding_window: a position sees itself and this many minus one before it.
        softcap: scores become ``softcap * tanh(scores / softcap)`` (Gemma 2).
        cu_seq_lens_q: (documents + 1,) int32 cumulative lengths; then B is 1 and there is no mask.

    Returns:
        (B, N, H, D) and None (no attention weights).

    Raises:
        ValueError: attention sinks, dropout or a position bias, which this function does not have.
    """
    if s_aux is not None:
        raise ValueError(f"attention: {NAME!r} has no attention sinks; set `attention: eager` and `packing: none`")
    if (prefix := kwargs.get("key_value_prefix")) is not None:  # of prefix tuning, see virtual_tokens.py
        key, value = prefix.put(module.layer_idx, key, value)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    plain = attention_mask is None and causal and query.shape[2] == key.shape[2]
    plain = plain and kwargs.get("position_bias") is None and kwargs.get("cache") is None
    context = kwargs.get("context_parallel")  # of slices of rows, see context_parallel.py
    if not plain and (cu_seq_lens_q is not None or context is not None):
        raise ValueError(f"attention: packed or split rows take no mask, cache or bias in {type(module).__name__}")
    if plain:
        if dropout:
            raise ValueError(
                f"attention: {NAME!r} has no dropout, got {dropout}; set the model's attention dropout to 0"
            )
        states = _one_dtype(query, key, value)
        query, key, value = states if context is None else context.to_heads(*states)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = _documents(query, key, value, cu_seq_lens_q, max_length_q, scale, sliding_window, softcap)
        return out if context is None else context.to_positions(out), None
    if softcap is not None:
        return _softcapped(module, query, key, value, attention_mask, scaling, dropout, softcap), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs
    )


def _one_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Autocast does not know our operator, and rotary embeddings leave fp32 queries beside bf16 values."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    max_length: int | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    query_BNHD, key_BNKD, value_BNKD = (t.transpose(1, 2) for t in (query, key, value))
    length = query_BNHD.shape[1]
    if window is not None and offsets is None and window >= length:
        window = None
    flash = query_BNHD.is_cuda and softcap is None and query_BNHD.dtype in (torch.float16, torch.bfloat16)
    if flash and query_BNHD.shape[-1] <= 256 and query_BNHD.shape[-1] == value_BNKD.shape[-1]:
        if offsets is None and window is None:
            grouped = query.shape[1] != key.shape[1]
            out = nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=grouped
            )
            return out.transpose(1, 2).contiguous()
        return _flash(query_BNHD, key_BNKD, value_BNKD, offsets, max_length, scale, window)
    return document_attention(query_BNHD, key_BNKD, value_BNKD, offsets, scale, window, softcap)


def _flash(
    query_BNHD: Tensor,
    key_BNKD: Tensor,
    value_BNKD: Tensor,
    offsets: Tensor | None,
    max_length: int | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """torch's variable-length FlashAttention (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    rows, length = query_BNHD.shape[:2]
    if offsets is None:
        offsets = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query_BNHD.device)
        max_length = length
    longest = max_length or length
    group = query_BNHD.shape[2] // key_BNKD.shape[2]
    grouped: dict[str, Any] = {"enable_gqa": True} if group > 1 and _VARLEN_HAS_GROUPS else {}
    if group > 1 and not grouped:
        key_BNKD, value_BNKD = (t.repeat_interleave(group, 2) for t in (key_BNKD, value_BNKD))
    out = varlen_attn(
        query_BNHD.flatten(0, 1),
        key_BNKD.flatten(0, 1),
        value_BNKD.flatten(0, 1),
        offsets,
        offsets,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (rows, length))


@torch.library.custom_op("litrecipes::document_attention", mutates_args=())
def document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of each document to itself, exact, in blocks of queries; saves nothing but its inputs.

    One opaque operator, so that compiled code sees neither the documents' lengths nor a graph break. Matrix products of
    whole blocks use the CPU's matrix units, which makes it faster than torch's own flash kernel for CPUs.

    Args:
        query: (B, N, H, D); key (B, N, K, D), value (B, N, K, D').
        offsets: (documents + 1,) cumulative lengths, or None: each row is one document.

    Returns:
        (B, N, H, D').
    """
    query, key, value = _grouped(query, key, value)
    rows, kv_heads, group, length, _ = query.shape
    out = query.new_empty(rows, length, kv_heads, group, value.shape[-1])
    for part, seen, blocked in _blocks(query, offsets, window):
        probs, _ = _probabilities(_rows(query, part) * scale, key[:, seen], blocked, group, softcap)
        heads = torch.bmm(probs, value[:, seen]).view(rows, kv_heads, group, part.stop - part.start, -1)
        out[:, part] = heads.permute(0, 3, 1, 2, 4)
    return out.flatten(2, 3)


@document_attention.register_fake
def _(
    query: Tensor, key: Tensor, value: Tensor, offsets: Any, scale: float, window: int | None, softcap: float | None
) -> Tensor:
    return query.new_empty(*query.shape[:3], value.shape[-1])


@torch.library.custom_op("litrecipes::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Tensor | None,
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
    for part, seen, blocked in _blocks(query, offsets, window):
        scaled, upstream = _rows(query, part) * scale, _rows(grad, part)
        probs, slope = _probabilities(scaled, key[:, seen], blocked, group, softcap)
        grad_value[:, seen] += torch.bmm(probs.mT, upstream)
        grad_probs = torch.bmm(upstream, value[:, seen].mT)
        grad_scores = torch.ops.aten._softmax_backward_data(grad_probs, probs, -1, probs.dtype)
        if slope is not None:
            grad_scores.mul_(slope)
        heads = torch.bmm(grad_scores, key[:, seen]).mul_(scale)
        grad_query[:, part] = heads.view(rows, kv_heads, group, part.stop - part.start, size).permute(0, 3, 1, 2, 4)
        grad_key[:, seen] += torch.bmm(grad_scores.mT, scaled)
    grad_key, grad_value = (
        g.view(rows, kv_heads, length, -1).transpose(1, 2).contiguous() for g in (grad_key, grad_value)
    )
    return grad_query.flatten(2, 3), grad_key, grad_value


@document_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    offsets: Any,
    scale: float,
    window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, value, offsets, *ctx.settings = inputs
    ctx.save_for_backward(query, key, value, offsets)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *document_attention_backward(grad, *ctx.saved_tensors, *ctx.settings), None, None, None, None


document_attention.register_autograd(_backward, setup_context=_setup_context)


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query (B, K, G, N, D), so that a key head's queries are one matrix; key and value (B * K, N, D)."""
    query = query.unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4)
    key, value = (t.transpose(1, 2).flatten(0, 1) for t in (key, value))
    return query, key, value


def _rows(query_BKGND: Tensor, part: slice) -> Tensor:
    """The queries of a block as (B * K, G * block, D)."""
    return query_BKGND[:, :, :, part].flatten(0, 1).flatten(1, 2)


def _blocks(query_BKGND: Tensor, offsets: Tensor | None, window: int | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks of queries, the keys that a block sees, and what is hidden of the *last* of these keys.

    Yields:
        (queries, keys, hidden): ``hidden`` (block, columns) booleans over the last ``columns`` keys.
    """
    ends = [0, query_BKGND.shape[3]] if offsets is None else offsets.tolist()
    places = torch.arange(_BLOCK, device=query_BKGND.device)
    future = places[None, :] > places[:, None]
    for start, stop in pairwise(ends):
        for first in range(start, stop, _BLOCK):
            last = min(first + _BLOCK, stop)
            size = last - first
            if window is None or last - start <= window:
                yield slice(first, last), slice(start, last), future[:size, :size]
                continue
            oldest = max(start, first - window + 1)
            behind = torch.arange(first, last, device=places.device)[:, None]
            behind = behind - torch.arange(oldest, last, device=places.device)
            yield slice(first, last), slice(oldest, last), (behind < 0) | (behind >= window)


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


def _softcapped(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    dropout: float,
    softcap: float,
) -> Tensor:
    """Masked attention with soft-capped scores (transformers' sdpa refuses it): for generation of Gemma-2."""
    group = query.shape[1] // key.shape[1]
    if mask is None and query.shape[2] > 1:  # an empty static cache, longer than the prompt
        key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        mask = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = torch.tanh(scores / softcap) * softcap
    if mask is not None:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    probs = nn.functional.dropout(probs, dropout, module.training)
    return (probs @ value).transpose(1, 2).contiguous()
