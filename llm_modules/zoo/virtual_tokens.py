"""Virtual tokens before each document: prompt tuning (arXiv 2104.08691), p-tuning (2103.10385), prefixes (2101.00190).

peft puts them before each row; here each document of a packed row gets its own. Prefix tuning's keys and values take
the place of those of the virtual positions in every layer, so that it needs no cache; what layers compute at virtual
positions is thrown away.

Shape legend: B rows, T positions, D documents, P virtual tokens, L layers, K key/value heads, S head size, H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Prefix:
    """Keys and values of the virtual positions.

    Attributes:
        states: (L, 2, K, P, S).
        places: (D * P,) virtual positions in the row.
    """

    states: Tensor
    places: Tensor

    def put(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """(B, K, T, S) keys and values with the prefix in its places."""
        times = len(self.places) // self.states.shape[3]
        own = self.states[layer].to(key.dtype).repeat(1, 1, times, 1)
        new_key, new_value = (part.expand(key.shape[0], -1, -1, -1) for part in own)
        return key.index_copy(2, self.places, new_key), value.index_copy(2, self.places, new_value.to(value.dtype))


@dataclass
class Layout:
    """A batch with virtual tokens in it.

    Attributes:
        embeddings: (B, T', H); positions: (B, T').
        offsets: cumulative lengths of the documents, or None for padded rows.
        real: (T,) places of the real tokens.
        prefix: keys and values of prefix tuning; None for the others.
    """

    embeddings: Tensor
    positions: Tensor
    offsets: Tensor | None
    real: Tensor
    prefix: Prefix | None


class VirtualTokens(nn.Module):
    """peft's encoder of virtual tokens, laid out for padded and for packed rows.

    Args:
        encoder: peft's, trained.
        config: peft's.
    """

    def __init__(self, encoder: nn.Module, config: Any) -> None:
        super().__init__()
        self.encoder = encoder
        self.count = int(config.num_virtual_tokens)
        self.is_prefix = config.peft_type.value == "PREFIX_TUNING"
        self.layers, self.heads = int(config.num_layers), int(config.num_attention_heads)

    def layout(
        self, embed: nn.Module, input_ids: Tensor, position_ids: Tensor, document_offsets: Tensor | None
    ) -> Layout:
        """Put the virtual tokens before each row (B, T), or before each document of the packed row (1, T)."""
        count, length, device = self.count, input_ids.shape[1], input_ids.device
        steps = torch.arange(length, device=device)
        if document_offsets is None:
            starts, offsets, real = torch.zeros(1, dtype=torch.long, device=device), None, steps + count
        else:
            document = torch.searchsorted(
                document_offsets[1:].contiguous(), steps.to(document_offsets.dtype), right=True
            )
            real = steps + (document + 1) * count
            added = torch.arange(len(document_offsets), device=device, dtype=document_offsets.dtype) * count
            offsets = document_offsets + added
            starts = offsets[:-1].long()
        places = (starts[:, None] + torch.arange(count, device=device)).flatten()
        tokens = self.encoder(torch.arange(count, device=device)[None])[0]
        words = embed(input_ids)
        rows, _, width = words.shape
        total = length + len(places)
        embeddings = words.new_zeros(rows, total, width).index_copy(1, real, words)
        prefix = None
        if self.is_prefix:
            states = tokens.view(count, self.layers, 2, self.heads, -1).permute(1, 2, 3, 0, 4)
            prefix = Prefix(states, places)
        else:
            own = tokens.to(words.dtype).repeat(len(starts), 1).expand(rows, -1, -1)
            embeddings = embeddings.index_copy(1, places, own)
        positions = position_ids.new_zeros(rows, total)
        positions[:, real] = position_ids + count
        positions[:, places] = torch.arange(count, device=device).repeat(len(starts))
        return Layout(embeddings, positions, offsets, real, prefix)
