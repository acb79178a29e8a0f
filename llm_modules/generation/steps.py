"""One decoding step after another, over keys and values that grow or that have their place from the beginning.

Shape legend: B rows, T positions with left padding, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

MASKED = ("packed", "sdpa")
"""Attention functions that take a mask of booleans: ours, and torch's."""

BLOCK = 64
"""Positions that a growing cache grows by."""


def read(hf: Any, ids: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor]:
    """(cache, (B, V) next logits) of prompts."""
    cache = DynamicCache(config=hf.config)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return cache, _logits(hf, ids, mask, positions, cache)


def _logits(hf: Any, ids: Tensor, mask: Tensor, positions: Tensor, cache: Any) -> Tensor:
    """(B, V) logits after the last of the new ids."""
    only: dict[str, Any] = {"logits_to_keep": 1} if hf._supports_logits_to_keep() else {}
    if getattr(hf.config.get_text_config(), "output_router_logits", False):
        only["output_router_logits"] = False  # its loss would want the routers of all positions, not of new ones
    outputs = hf(ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, **only)
    logits: Tensor = outputs.logits[:, -1]
    return logits


def repeatable(hf: Any) -> bool:
    """Whether each layer's memory of a prompt can be given to several rows (that of a convolution cannot)."""
    return all(hasattr(layer, "batch_repeat_interleave") for layer in DynamicCache(config=hf.config).layers)


def fixed_problem(hf: Any) -> str | None:
    """Why ``FixedSteps`` are not for a model, or None: they give it a mask of booleans over all positions."""
    kind, config = type(hf).__name__, hf.config
    if any(type(layer) is not DynamicLayer for layer in DynamicCache(config=config).layers):
        return f"{kind} does not keep the keys and values of all positions in each layer"
    if config._attn_implementation not in MASKED:
        names = " and ".join(map(repr, MASKED))
        return f"attention {config._attn_implementation!r} takes other masks than {names}"
    if getattr(config.get_text_config(), "alibi", False):
        return f"{kind} makes its positions (alibi) of another mask"
    return None


class GrowingSteps:
    """Keys and values grow, a block of positions at a time.

    Args:
        hf: transformers' model.
        cache: of the prompts.
        mask: (B, T) int64, 1 where a prompt is.
        size: rows that each prompt becomes, next to one another.
        steps: most tokens that will follow.
    """

    def __init__(self, hf: Any, cache: DynamicCache, mask: Tensor, size: int, steps: int) -> None:
        narrows = hf.config._attn_implementation in MASKED
        if size > 1:
            cache.batch_repeat_interleave(size)
        for number, layer in enumerate(cache.layers):
            if type(layer) is DynamicLayer and layer.get_seq_length():  # one that has another's keys holds none
                cache.layers[number] = _GrowingLayer(layer, narrows, mask.shape[1] + steps)
        self.hf, self.cache, self.mask = hf, cache, mask.repeat_interleave(size, 0)

    def __call__(self, token: Tensor) -> Tensor:
        """(B, V) next logits after another (B,) tokens."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        positions = self.mask.sum(-1, keepdim=True) - 1
        return _logits(self.hf, token[:, None], self.mask, positions, self.cache)

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.mask = self.mask[rows]
        self.cache.batch_select_indices(rows)


class FixedSteps:
    """Keys and values have their place from the beginning, and steps are all alike: on a GPU a step is recorded as a
    CUDA graph and replayed, for Python cannot launch the kernels of a token as fast as they are done.

    Arguments: as of ``GrowingSteps``.
    """

    def __init__(self, hf: Any, cache: DynamicCache, mask: Tensor, size: int, steps: int) -> None:
        length = mask.shape[1]
        self.hf, self.size = hf, length + steps
        self.ids = mask.new_zeros(len(mask) * size, 1)
        self.positions = mask.sum(-1, keepdim=True).repeat_interleave(size, 0)
        self.place = torch.tensor([length], device=mask.device)
        self.mask = torch.zeros(len(mask) * size, 1, 1, self.size, dtype=torch.bool, device=mask.device)
        self.mask[:, 0, 0, :length] = mask.bool().repeat_interleave(size, 0)
        self.cache = DynamicCache()
        self.cache.layers = [_FixedLayer(layer, self.place, self.size, size) for layer in cache.layers]
        self._record()

    def __call__(self, token: Tensor) -> Tensor:
        """(B, V) next logits after another (B,) tokens; the next call overwrites them."""
        self.ids.copy_(token[:, None])
        if self._recorded is None:
            return self._advance()
        graph, logits = self._recorded
        graph.replay()
        return logits

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the rows."""
        self.ids, self.positions, self.mask = (t[rows] for t in (self.ids, self.positions, self.mask))
        self.cache.batch_select_indices(rows)
        self._record()

    def _advance(self) -> Tensor:
        self.mask.index_fill_(-1, self.place, True)
        logits = _logits(self.hf, self.ids, self.mask, self.positions, self.cache)
        self.positions += 1
        self.place += 1
        return logits

    def _record(self) -> None:
        self._recorded: tuple[torch.cuda.CUDAGraph, Tensor] | None = None  # the earlier one's memory is free from here
        if not self.place.is_cuda:
            return
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # loaders pin memory in other threads
                logits = self._advance()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            first = str(error.__context__ or error).splitlines()[0]
            raise ValueError(
                f"generation: cache: static: a step of {type(self.hf).__name__} cannot be recorded as a CUDA graph "
                f"({first}); use dynamic"
            ) from error
        self._recorded = graph, logits


def _multiplied(tensor: Tensor) -> torch.dtype:
    """What attention makes of keys and values: held otherwise, autocast would narrow all of them in each step."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


class _GrowingLayer(DynamicLayer):
    """The keys and values of a layer that has read the prompts, with room for ``BLOCK`` positions more: transformers'
    own copies all of them for each new one.

    Args:
        narrows: whether attention takes what it multiplies narrowed.
        most: positions that there will be in the end, at most.
    """

    def __init__(self, read: Any, narrows: bool, most: int) -> None:
        super().__init__()
        self.most = most
        self.lazy_initialization(read.keys, read.values)
        self._hold(*(t.to(_multiplied(t)) if narrows else t for t in (read.keys, read.values)))

    def _hold(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = self._rooms = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        known = self.get_seq_length()
        length = known + key_states.shape[-2]
        if length > self._rooms[0].shape[-2]:
            keys, values = self._rooms
            self._rooms = self._larger(keys, known), self._larger(values, known)
        for room, states in zip(self._rooms, (key_states, value_states), strict=True):
            room[..., known:length, :] = states
        self.keys, self.values = (room[..., :length, :] for room in self._rooms)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        assert self.keys is not None
        assert self.values is not None
        self._hold(self.keys[indices], self.values[indices])

    def _larger(self, room: Tensor, known: int) -> Tensor:
        *rows, _, width = room.shape
        larger = room.new_empty(*rows, min(known + BLOCK, self.most), width)
        larger[..., :known, :] = room
        return larger


class _FixedLayer(DynamicLayer):
    """Room for ``length`` positions of ``size`` rows for each row of a layer that has read the prompts."""

    def __init__(self, read: Any, place: Tensor, length: int, size: int) -> None:
        super().__init__()
        self.lazy_initialization(read.keys, read.values)
        self.place = place
        self.keys, self.values = (self._room(tensor, length, size) for tensor in (read.keys, read.values))

    @staticmethod
    def _room(tensor: Tensor, length: int, size: int) -> Tensor:
        rows, heads, known, width = tensor.shape
        # Not empty: what is masked is still multiplied, by zero.
        made = tensor.new_zeros(rows * size, heads, length, width, dtype=_multiplied(tensor))
        made[:, :, :known] = tensor.repeat_interleave(size, 0)
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        keys = self.keys.index_copy_(2, self.place, key_states.to(self.keys.dtype))
        return keys, self.values.index_copy_(2, self.place, value_states.to(self.values.dtype))
