"""The tokenized sources as one numbered list of documents: who is trained, who is held out, what an epoch is."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from llm_modules.data.collation import TokenRows
from llm_modules.data.packing import EpochPlan, Examples, Indices, Packing, plan_epoch, split_documents
from llm_modules.data.splitting import draw_documents, held_out
from llm_modules.data.store import TokenStore

TooLong = Literal["split", "truncate", "drop", "error"]


class Corpus:
    """Documents, numbered through all stores, and the parts that they were dealt into.

    Args:
        stores: part (`train`, `validation`, `test`) -> the stores of its sources, in order.
        size: tokens in a row at most.
        too_long: what becomes of documents longer than that; `split` for text.

    Attributes:
        starts, stops, hashes, groups: (D,) of each document; ``stops`` after truncation.
        documents: part -> numbers of its documents.
        counts: what was left out or cut, and how often.
    """

    def __init__(self, stores: dict[str, list[TokenStore]], size: int, too_long: TooLong) -> None:
        self.stores = [store for part in stores.values() for store in part]
        self.rows = TokenRows(self.stores)
        self.size = size
        self.too_long = too_long
        self.counts: dict[str, int] = {}
        bases = self.rows.bases
        self.starts: Indices = _joined(
            [store.offsets[:-1] + base for store, base in zip(self.stores, bases, strict=False)]
        )
        self.stops: Indices = _joined(
            [store.offsets[1:] + base for store, base in zip(self.stores, bases, strict=False)]
        )
        self.hashes: NDArray[np.uint64] = np.concatenate([store.hashes for store in self.stores])
        self.groups: NDArray[np.uint64] = np.concatenate([store.groups for store in self.stores])
        self.sizes: Indices = _joined([store.sizes for store in self.stores])
        self.first: Indices = np.concatenate([[0], np.cumsum([len(store) for store in self.stores])]).astype(np.int64)
        self.documents: dict[str, Indices] = {}
        self.sources: list[Indices] = []
        number = 0
        for part, of_part in stores.items():
            ranges = [np.arange(self.first[number + i], self.first[number + i + 1]) for i in range(len(of_part))]
            number += len(of_part)
            self.documents[part] = _joined(ranges)
            if part == "train":
                self.sources = ranges
        self.longest_found = int((self.stops - self.starts).max())
        self._fit()

    def _fit(self) -> None:
        """Apply ``too_long``, and leave out what has nothing to predict."""
        lengths = self.stops - self.starts
        long = lengths > self.size
        self.counts["longer than the sequence length"] = int(long.sum())
        if long.any() and self.too_long == "error":
            document = int(np.argmax(long))
            raise ValueError(
                f"{self.origin(document)}: {int(lengths[document])} tokens, more than sequence_length {self.size} "
                f"({int(long.sum())} such rows; data.too_long is 'error'; allowed too: truncate, drop)"
            )
        keep = np.ones(len(lengths), dtype=np.bool_)
        whole = self.trained_tokens(self.starts, self.stops)
        if self.too_long == "drop":
            keep &= ~long
            self.counts["dropped as too long"] = int(long.sum())
        elif self.too_long == "truncate":
            self.stops = np.minimum(self.stops, self.starts + self.size)
        self.trained = self.trained_tokens(self.starts, self.stops)
        if self.too_long == "truncate":
            self.counts["truncated answers"] = int(((self.trained < whole) & (self.trained > 0)).sum())
            self.counts["answers cut off entirely"] = int(((self.trained == 0) & (whole > 0)).sum())
        self.counts["rows without labels"] = int((whole == 0).sum())
        keep &= self.trained > 0
        self.kept = keep
        self.documents = {part: documents[keep[documents]] for part, documents in self.documents.items()}
        self.sources = [documents[keep[documents]] for documents in self.sources]

    def trained_tokens(self, starts: Indices, stops: Indices) -> Indices:
        """(D,) targets in each document; its first token is never one."""
        counts = np.maximum(stops - starts - 1, 0)
        for number, store in enumerate(self.stores):
            if store.trained is None or not len(store):
                continue
            part = slice(self.first[number], self.first[number + 1])
            begin, end = starts[part] + 1 - self.rows.bases[number], stops[part] - self.rows.bases[number]
            # Sums from each place to the next: of a document, and of the gap up to the next one, which is not used.
            places = np.stack([np.minimum(begin, end), end], axis=1).ravel()
            inside = int(np.searchsorted(places, len(store.trained)))
            sums = np.zeros(len(places), dtype=np.int64)
            sums[:inside] = np.add.reduceat(store.trained, places[:inside], dtype=np.int64)
            counts[part] = np.where(end > begin, sums[::2], 0)
        return counts

    def hold_out(self, fraction: float, seed: int, exempt: Sequence[int] = ()) -> None:
        """Move documents from the training part to the validation part, those of a group together.

        Args:
            exempt: numbers of training sources that are trained whole (they have a validation part of their own).
        """
        dealt = [source for number, source in enumerate(self.sources) if number not in exempt]
        if not dealt or fraction <= 0:
            return
        documents = _joined(dealt)
        if not len(documents):
            return  # the audit says why nothing is left
        groups = self.groups[documents]
        if len(np.unique(groups)) < 2:  # every conversation begins alike: by their content
            groups = self.hashes[documents]
        chosen = documents[held_out(groups, fraction, seed)]
        self.documents["validation"] = _joined([self.documents.get("validation", _joined([])), chosen])
        self._remove(chosen)

    def remove_leaks(self) -> None:
        """Leave out of the training part what is also held out, whatever source it is in."""
        others = [self.hashes[documents] for part, documents in self.documents.items() if part != "train"]
        if not others:
            return
        train = self.documents["train"]
        leaks = train[np.isin(self.hashes[train], np.concatenate(others))]
        self.counts["training documents that are also held out, left out"] = len(leaks)
        self._remove(leaks)

    def _remove(self, documents: Indices) -> None:
        self.sources = [source[~np.isin(source, documents)] for source in self.sources]
        self.documents["train"] = _joined(self.sources)

    def examples(self, documents: Indices, packing: Packing) -> Examples:
        """Documents as what a row is made of: pieces no longer than a row, unless rows are cut from a stream."""
        starts, stops = self.starts[documents], self.stops[documents]
        if packing == "chunks":
            return Examples(documents, starts, stops)
        return split_documents(documents, starts, stops - starts, self.size)

    def epoch(
        self, epoch: int, packing: Packing, weights: Sequence[float], seed: int, length_group: int = 0
    ) -> EpochPlan:
        """The rows of a training epoch: a pure function of its arguments."""
        drawn = [
            documents[draw_documents(len(documents), weight, epoch, [seed, number])]
            for number, (documents, weight) in enumerate(zip(self.sources, weights, strict=True))
            if len(documents)
        ]
        random = np.random.default_rng([seed, epoch, len(weights)])
        return plan_epoch(self.examples(_joined(drawn), packing), packing, self.size, random, length_group)

    def whole(self, part: str, packing: Packing) -> EpochPlan:
        """Every document of a part exactly once, always in the same rows."""
        examples = self.examples(self.documents[part], packing)
        return plan_epoch(examples, packing, self.size, np.random.default_rng(0), keep_rest=True)

    def longest(self, packing: Packing) -> int:
        """The longest example of any part, in tokens."""
        documents = _joined(list(self.documents.values()))
        lengths = self.stops[documents] - self.starts[documents]
        return int(min(lengths.max(initial=1), self.size))

    def origin(self, document: int) -> str:
        """`file:row` of a document, by its number."""
        number = int(np.searchsorted(self.first, document, side="right")) - 1
        return self.stores[number].origin(document - int(self.first[number]))

    def identity(self, *settings: object) -> str:
        """A digest of all that the order of rows depends on."""
        digest = hashlib.sha256(repr((self.size, self.too_long, *settings)).encode())
        for documents in self.sources:
            digest.update(np.stack([self.hashes[documents], (self.stops - self.starts)[documents]]).tobytes())
        return digest.hexdigest()[:16]


def _joined(arrays: Sequence[Indices]) -> Indices:
    return np.concatenate(arrays).astype(np.int64) if len(arrays) else np.empty(0, dtype=np.int64)
