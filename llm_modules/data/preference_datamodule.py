"""The DataModule of pairs of answers."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from llm_modules.batch import PreferenceBatch
from llm_modules.data.collation import Collator
from llm_modules.data.packing import Indices, Packing
from llm_modules.data.preferences import VALUES, BadPair, PreferenceEncoder, TooLongPair, preference_pair
from llm_modules.data.sources import Row
from llm_modules.data.templates import set_template
from llm_modules.data.token_datamodule import Prompt, TokenDataModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PreferenceDataModule(TokenDataModule):
    """Pairs of answers to the same prompt, one preferred to the other.

    Rows have ``chosen`` and ``rejected``: texts beside ``prompt`` or ``messages``, lists of messages, or dialogues in
    the style of hh-rlhf; ``system`` and ``tools`` are as in conversations. ``batch_size`` counts pairs. sequence_length
    is that of a prompt with one answer. For reward and cost models also ``margin`` (by how much the chosen one is
    better), ``chosen_safe`` and ``rejected_safe``.

    Args:
        chat_template: chatml, llama3, gemma, zephyr, alpaca, raw, a .jinja file, or the template itself; not given: the
            tokenizer's own.
        packing: `batch`: the documents of a batch in one row without padding; `none`: padded.
        share_prompts: in a packed row, what both conversations of a pair begin with is there, and computed, once.
        bad_pairs: rows that are no pair (an answer that is empty or equal to the other, prompts that differ): `error`,
            or `drop`, which the audit counts.
        too_long: pairs with a conversation longer than sequence_length: `truncate`, `drop` or `error`.
    """

    def __init__(
        self,
        *,
        chat_template: str | None = None,
        packing: Packing = "batch",
        too_long: TooLongPair = "truncate",
        share_prompts: bool = True,
        bad_pairs: BadPair = "error",
        **kwargs: Any,
    ) -> None:
        if packing not in ("batch", "none"):
            raise ValueError(f"data.packing: {packing!r} is not one of batch, none")
        super().__init__(packing=packing, **kwargs)
        if too_long not in ("truncate", "drop", "error"):
            raise ValueError(f"data.too_long: {too_long!r} is not one of truncate, drop, error")
        if bad_pairs not in ("error", "drop"):
            raise ValueError(f"data.bad_pairs: {bad_pairs!r} is not one of error, drop")
        self.bad_pairs: BadPair = bad_pairs
        self.chat_template = chat_template
        self.too_long_pair: TooLongPair = too_long
        self.share_prompts = share_prompts

    @property
    def document_length(self) -> int:
        return 2 * self.sequence_length  # two conversations, each cut when it was encoded

    def make_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = super().make_tokenizer()
        for line in set_template(tokenizer, self.chat_template):
            print(line, file=sys.stderr)
        return tokenizer

    def make_encoder(self, tokenizer: PreTrainedTokenizerBase) -> PreferenceEncoder:
        return PreferenceEncoder(tokenizer, self.sequence_length, self.too_long_pair, self.bad_pairs)

    def make_prompt(self, row: Row) -> tuple[Prompt, str]:
        pair = preference_pair(row)
        return pair.prompt, pair.chosen["content"]

    def every_pair(self) -> Iterator[PreferenceBatch]:
        """Every pair of every part once over all ranks, on the host; some ranks get batches of no pair at the end."""
        for part in self.corpus.documents:
            yield from self._evaluation(part)

    def pair_values(self, identity: str) -> tuple[int, NDArray[np.float64] | None]:
        """The number of stored documents, and what ``keep_pair_values`` has kept of them; None where some of those that
        are dealt to a part now are not there.

        Args:
            identity: of what was computed, and of the model that did it. (Of which tokens is added here.)
        """
        files = self._value_files(identity)
        there = [np.load(file) for file in files if file.is_file()]
        values = np.concatenate(there) if len(there) == len(files) else None
        lacking = values is None or np.isnan(values[self._dealt()]).any()
        return len(self.corpus.starts), None if lacking else values

    def keep_pair_values(self, identity: str, values: NDArray[np.float64]) -> None:
        """Writes (documents, ...) numbers of the documents that are dealt to a part beside the tokens that they are of,
        each file whole or not at all; what it has of others stays."""
        known = np.full_like(values, np.nan)
        known[self._dealt()] = values[self._dealt()]
        for number, file in enumerate(self._value_files(identity)):
            file.parent.mkdir(parents=True, exist_ok=True)
            own = known[self.corpus.first[number] : self.corpus.first[number + 1]]
            if file.is_file():
                own = np.where(np.isnan(own), np.load(file), own)
            temporary = file.with_name(f".{file.stem}-{os.getpid()}.npy")
            np.save(temporary, own)
            temporary.replace(file)

    def _dealt(self) -> Indices:
        return np.concatenate([np.zeros(0, dtype=np.int64), *self.corpus.documents.values()])

    def _value_files(self, identity: str) -> list[Path]:
        """One for each source; its name is a digest of all that the numbers depend on."""
        names = [f"{store.folder.name} {self.sequence_length} {identity}" for store in self.corpus.stores]
        return [self.cache_dir / "values" / f"{hashlib.sha256(name.encode()).hexdigest()[:32]}.npy" for name in names]

    def _collator(self) -> PairCollator:
        pad = self.prepared_tokenizer.pad_token_id
        splits, values = [np.zeros(0, dtype=np.int64)], [np.zeros((0, len(VALUES)), dtype=np.float32)]
        for store in self.corpus.stores:
            if len(store):
                assert store.splits is not None
                assert store.values is not None
                splits.append(store.splits)
                values.append(store.values)
        return PairCollator(
            self.corpus.rows,
            flat=self.flat,
            pad=pad,
            max_document=self.sequence_length,
            splits=np.concatenate(splits),
            values=np.concatenate(values),
            share=self.share_prompts and self.flat,
        )


class PairCollator(Collator):
    """Pairs to a ``PreferenceBatch``: each becomes two documents, or three with a shared prompt, or two rows.

    Args:
        splits: (D,) where the second conversation of each document begins.
        values: (D, 3) of ``VALUES``.
        share: whether what both begin with is there once.
    """

    def __init__(self, *args: Any, splits: Indices, values: np.ndarray, share: bool, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.splits = splits
        self.values = values
        self.share = share

    def __call__(self, batch: Sequence[Indices]) -> PreferenceBatch:
        made = self._shared(batch) if self.share else self._apart(batch)
        documents = [int(row[0, 0]) for row in batch]
        return replace(made, pairs=len(batch), rows=documents, values=torch.from_numpy(self.values[documents]))

    def _apart(self, batch: Sequence[Indices]) -> PreferenceBatch:
        return PreferenceBatch(
            **vars(super().__call__([np.array([part]) for row in batch for part in self._parts(row)]))
        )

    def empty(self) -> PreferenceBatch:
        return PreferenceBatch(**vars(super().empty()))

    def _parts(self, row: Indices) -> list[tuple[int, int, int]]:
        """A row, which is one document, as two."""
        ((document, start, stop),) = row.tolist()
        middle = start + int(self.splits[document])
        return [(document, start, middle), (document, middle, stop)]

    def _shared(self, batch: Sequence[Indices]) -> PreferenceBatch:
        """See ``PreferenceBatch``."""
        segments, shared = [], []
        for row in batch:
            (document, start, middle), (_, _, stop) = self._parts(row)
            both = max(self._common(start, middle, stop) - 1, 0)
            shared += [0, both, both]
            parts = (start, start + both), (start + both, middle), (middle + both, stop)
            segments += [(document, *part) for part in parts]
        made = super().__call__([np.array(segments)])
        lengths = np.array([stop - start for _, start, stop in segments])
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        firsts = np.repeat(offsets[:-1:3], 3)  # where each pair begins
        keys = [
            np.concatenate([np.arange(first, first + before), np.arange(*offsets[d : d + 2])])
            for d, (first, before) in enumerate(zip(firsts, shared, strict=True))
        ]
        made.position_ids += torch.from_numpy(np.repeat(shared, lengths))
        return PreferenceBatch(
            **vars(made),
            shared_keys=torch.from_numpy(np.concatenate(keys)),
            key_offsets=torch.from_numpy(np.cumsum([0, *map(len, keys)]).astype(np.int32)),
        )

    def _common(self, start: int, middle: int, stop: int) -> int:
        """How many tokens both conversations begin with before either has one to predict."""
        (one, trained), (other, also) = self.rows.read(start, middle), self.rows.read(middle, stop)
        size = min(len(one), len(other))
        ends = (one[:size] != other[:size]) | trained[:size] | also[:size]
        return int(ends.argmax()) if ends.any() else size
