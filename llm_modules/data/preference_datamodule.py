"""The DataModule of pairs of answers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llm_modules.batch import PreferenceBatch
from llm_modules.data.collation import Collator
from llm_modules.data.packing import Indices, Packing
from llm_modules.data.preferences import PreferenceEncoder, TooLongPair, preference_pair
from llm_modules.data.sources import Row
from llm_modules.data.templates import set_template
from llm_modules.data.token_datamodule import Prompt, TokenDataModule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PreferenceDataModule(TokenDataModule):
    """Pairs of answers to the same prompt, one preferred to the other.

    Rows have ``chosen`` and ``rejected``: texts beside ``prompt`` or ``messages``, lists of messages, or dialogues in
    the style of hh-rlhf. ``batch_size`` counts pairs. sequence_length is that of a prompt with one answer.

    Args:
        chat_template: chatml, llama3, gemma, zephyr, alpaca, raw, a .jinja file, or the template itself; not given: the
            tokenizer's own.
        packing: `batch`: the documents of a batch in one row without padding; `none`: padded.
        too_long: pairs with a conversation longer than sequence_length: `truncate`, `drop` or `error`.
    """

    def __init__(
        self,
        *,
        chat_template: str | None = None,
        packing: Packing = "batch",
        too_long: TooLongPair = "truncate",
        **kwargs: Any,
    ) -> None:
        if packing not in ("batch", "none"):
            raise ValueError(f"data.packing: {packing!r} is not one of batch, none")
        super().__init__(packing=packing, **kwargs)
        if too_long not in ("truncate", "drop", "error"):
            raise ValueError(f"data.too_long: {too_long!r} is not one of truncate, drop, error")
        self.chat_template = chat_template
        self.too_long_pair: TooLongPair = too_long

    @property
    def document_length(self) -> int:
        return 2 * self.sequence_length  # two conversations, each cut when it was encoded

    def make_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = super().make_tokenizer()
        for line in set_template(tokenizer, self.chat_template):
            print(line, file=sys.stderr)
        return tokenizer

    def make_encoder(self, tokenizer: PreTrainedTokenizerBase) -> PreferenceEncoder:
        return PreferenceEncoder(tokenizer, self.sequence_length, self.too_long_pair)

    def make_prompt(self, row: Row) -> tuple[Prompt, str]:
        pair = preference_pair(row)
        return pair.prompt, pair.chosen

    def _collator(self) -> PairCollator:
        pad = self.prepared_tokenizer.pad_token_id
        splits: list[Indices] = []
        for store in self.corpus.stores:
            assert store.splits is not None or not len(store)
            splits.append(store.splits if store.splits is not None else np.zeros(0, dtype=np.int64))
        return PairCollator(
            self.corpus.rows, flat=self.flat, pad=pad, max_document=self.sequence_length, splits=np.concatenate(splits)
        )


class PairCollator(Collator):
    """Pairs to a ``PreferenceBatch``: each becomes two documents, or two rows.

    Args:
        splits: (D,) where the second conversation of each document begins.
    """

    def __init__(self, *args: Any, splits: Indices, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.splits = splits

    def __call__(self, batch: Sequence[Indices]) -> PreferenceBatch:
        rows = [part for row in batch for part in self._parts(row)]
        made = super().__call__(rows)
        return PreferenceBatch(**vars(made), pairs=len(rows) // 2)

    def empty(self) -> PreferenceBatch:
        return PreferenceBatch(**vars(super().empty()))

    def _parts(self, row: Indices) -> list[Indices]:
        """A row, which is one document, as two."""
        ((document, start, stop),) = row.tolist()
        middle = start + int(self.splits[document])
        return [np.array([[document, start, middle]]), np.array([[document, middle, stop]])]
