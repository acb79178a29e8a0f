"""Attention for packed documents, registered with transformers under the name ``packed``.

One function serves every architecture that calls transformers' attention interface. Documents laid out one after
another in one row (``cu_seq_lens_q`` among the keyword arguments) attend causally to themselves only, or also to one
that several of them begin with (``shared_keys``), and no N x N mask or score matrix is ever made. Rows that are padded
on the right need no mask at all. Whatever else comes (left padding, caches) has a mask from ``packed_mask`` and goes
the way of transformers' own ``sdpa``, so that generation works through the same model.

Shape legend: B rows, N positions, H query heads, K key/value heads, G = H / K, D head size, L positions of a document.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from packaging.version import Version
from torch import Tensor, nn

from llm_modules.zoo.document_attention import document_attention

NAME = "packed"
"""What ``attn_implementation`` is called in transformers."""

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
        kwargs: ``shared_keys``, (keys,) int64 positions that the documents see, one after another, its own last, and
            ``cu_seq_lens_k``, their cumulative lengths; without, each document sees itself.

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
            raise ValueError(f"attention: {NAME!r} has no dropout, got {dropout}; set that of the model's to 0")
        states = _one_dtype(query, key, value)
        query, key, value = states if context is None else context.to_heads(*states)
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        keys = kwargs.get("shared_keys"), kwargs.get("cu_seq_lens_k")
        out = _documents(query, key, value, cu_seq_lens_q, max_length_q, scale, sliding_window, softcap, *keys)
        return out if context is None else context.to_positions(out), None
    if softcap is not None:
        return _softcapped(module, query, key, value, attention_mask, scaling, dropout, softcap), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward as sdpa

    return sdpa(module, query, key, value, attention_mask, dropout, scaling, is_causal=is_causal, **kwargs)


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
    shared_keys: Tensor | None,
    key_offsets: Tensor | None,
) -> Tensor:
    if shared_keys is not None:  # then a document's queries are the last of its keys
        key, value = key.index_select(2, shared_keys), value.index_select(2, shared_keys)
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
        ends = offsets, offsets if shared_keys is None else key_offsets
        return _flash(query_BNHD, key_BNKD, value_BNKD, ends, max_length, scale, window)
    apart = None if shared_keys is None else key_offsets
    return document_attention(query_BNHD, key_BNKD, value_BNKD, offsets, scale, window, softcap, apart)


def _flash(
    query_BNHD: Tensor,
    key_BNKD: Tensor,
    value_BNKD: Tensor,
    ends: tuple[Tensor | None, Tensor | None],
    max_length: int | None,
    scale: float,
    window: int | None,
) -> Tensor:
    """torch's variable-length FlashAttention (CUDA, half precision), whose causal mask ends with the last key."""
    from torch.nn.attention.varlen import varlen_attn

    rows, length = query_BNHD.shape[:2]
    offsets, key_offsets = ends
    if offsets is None:
        offsets = torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=query_BNHD.device)
        max_length, key_offsets = length, offsets
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
        key_offsets,
        longest,
        longest,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    assert isinstance(out, Tensor)
    return out.unflatten(0, (rows, length))


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
