"""From segments of tokens to a micro-batch, in worker processes that hold no state but the files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from llm_modules.batch import IGNORE_INDEX, TokenBatch
from llm_modules.data.packing import Indices
from llm_modules.data.store import TokenStore


class TokenRows:
    """The tokens of all sources as one long sequence; a map-style dataset whose index is a row's segments.

    Args:
        stores: the sources' tokens, in order.
    """

    def __init__(self, stores: Sequence[TokenStore]) -> None:
        self.stores = list(stores)
        self.bases: Indices = np.concatenate([[0], np.cumsum([store.offsets[-1] for store in self.stores])]).astype(
            np.int64
        )

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """The tokens of a range, and which of them are predicted. A range never spans two sources."""
        number = int(np.searchsorted(self.bases, start, side="right")) - 1
        store, base = self.stores[number], self.bases[number]
        part = slice(int(start - base), int(stop - base))
        tokens = store.tokens[part].astype(np.int64)
        trained = np.ones(len(tokens), dtype=np.bool_) if store.trained is None else np.array(store.trained[part])
        return tokens, trained

    def __getitem__(self, segments: Indices) -> Indices:
        # Reading is left to the collator, which knows the layout: nothing is copied twice.
        return segments


class Collator:
    """Rows to a `TokenBatch`.

    Args:
        rows: where the tokens are.
        flat: one row (1, N) without padding, every segment a document of its own; else (B, T), padded on the right.
        pad: token id of padding.
        max_document: upper bound of a document's length.
    """

    beside = False

    def __init__(self, rows: TokenRows, *, flat: bool, pad: int, max_document: int) -> None:
        self.rows = rows
        self.flat = flat
        self.pad = pad
        self.max_document = max_document

    def __call__(self, batch: Sequence[Indices]) -> TokenBatch:
        return self._flat(batch) if self.flat else self._padded(batch)

    def empty(self) -> TokenBatch:
        """A micro-batch that counts nothing, for a rank that has run out of rows while others have not."""
        ids = torch.full((1, 2), self.pad)
        positions = torch.arange(2)[None]
        offsets = torch.tensor([0, 2], dtype=torch.int32) if self.flat else None
        labels = torch.full_like(ids, IGNORE_INDEX)
        return TokenBatch(
            ids,
            labels,
            positions,
            offsets,
            self.max_document if self.flat else 0,
            padding=2,
            lengths=torch.zeros(1, dtype=torch.long),
        )

    def _flat(self, batch: Sequence[Indices]) -> TokenBatch:
        segments = np.concatenate(batch)
        parts = [self.rows.read(start, stop) for _, start, stop in segments.tolist()]
        ids = torch.from_numpy(np.concatenate([tokens for tokens, _ in parts]))
        trained = torch.from_numpy(np.concatenate([mask for _, mask in parts]))
        lengths = segments[:, 2] - segments[:, 1]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(len(ids)) - np.repeat(offsets[:-1], lengths)
        return TokenBatch(
            input_ids=ids[None],
            labels=ids.masked_fill(~trained, IGNORE_INDEX)[None],
            position_ids=torch.from_numpy(positions)[None],
            document_offsets=torch.from_numpy(offsets.astype(np.int32)),
            max_document=self.max_document,
            rows=segments[:, 0].tolist(),
        )

    def _padded(self, batch: Sequence[Indices]) -> TokenBatch:
        width = max(int((row[:, 2] - row[:, 1]).sum()) for row in batch)
        ids = torch.full((len(batch), width), self.pad)
        labels = torch.full((len(batch), width), IGNORE_INDEX)
        lengths = torch.zeros(len(batch), dtype=torch.long)
        for i, row in enumerate(batch):
            place = 0
            for _, start, stop in row.tolist():
                tokens, trained = (torch.from_numpy(array) for array in self.rows.read(start, stop))
                part = slice(place, place + len(tokens))
                ids[i, part] = tokens
                labels[i, part] = tokens.masked_fill(~trained, IGNORE_INDEX)
                place += len(tokens)
            lengths[i] = place
        return TokenBatch(
            input_ids=ids,
            labels=labels,
            position_ids=torch.arange(width).expand(len(batch), -1).contiguous(),
            rows=np.concatenate(batch)[:, 0].tolist(),
            padding=ids.numel() - int(lengths.sum()),
            lengths=lengths,
        )
