"""The DataModule of answers that were judged one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from llm_modules.batch import LabelledBatch, TokenBatch
from llm_modules.data.audit import AuditReport
from llm_modules.data.collation import Collator
from llm_modules.data.labelled import LabelledEncoder, LabelledSource, labelled_answer
from llm_modules.data.packing import Indices, Packing
from llm_modules.data.preference_datamodule import PreferenceDataModule
from llm_modules.data.preferences import BadPair
from llm_modules.data.sources import Row, Source
from llm_modules.data.token_datamodule import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class LabelledDataModule(PreferenceDataModule):
    """Answers, each judged by itself: desirable or not.

    Rows have ``completion`` (or ``answer``) beside ``prompt`` or ``messages``, or ``messages`` that end with the
    answer, and ``label``, true or false. A row with ``chosen`` and ``rejected``, in any form that a pair has, is two
    answers, of which the chosen one is desirable. ``batch_size`` counts answers.

    Args:
        chat_template: chatml, llama3, gemma, zephyr, alpaca, raw, a .jinja file, or the template itself; not given: the
            tokenizer's own.
        packing: `batch`: the conversations of a batch in one row without padding; `none`: padded.
        bad_rows: rows that hold no answer (an empty one, no prompt, a pair of two equal answers): `error`, or `drop`,
            which the audit counts. A label that is not true or false is an error always.
        too_long: conversations longer than sequence_length: `truncate`, `drop` or `error`.
    """

    def __init__(
        self,
        *,
        chat_template: str | None = None,
        packing: Packing = "batch",
        too_long: Literal["truncate", "drop", "error"] = "truncate",
        bad_rows: BadPair = "error",
        **kwargs: Any,
    ) -> None:
        if bad_rows not in ("error", "drop"):
            raise ValueError(f"data.bad_rows: {bad_rows!r} is not one of error, drop")
        super().__init__(
            chat_template=chat_template,
            packing=packing,
            too_long=too_long,
            share_prompts=False,
            bad_pairs=bad_rows,
            **kwargs,
        )
        self.too_long = too_long

    @property
    def document_length(self) -> int:
        return self.sequence_length

    def make_encoder(self, tokenizer: PreTrainedTokenizerBase) -> LabelledEncoder:  # type: ignore[override]
        return LabelledEncoder(tokenizer, self.bad_pairs)

    def make_prompt(self, row: Row) -> tuple[Prompt, str]:
        found = labelled_answer(row)
        return found.prompt, found.answer["content"]

    def _parts(self) -> dict[str, list[Source]]:
        parts = super()._parts()
        return {part: [LabelledSource(**vars(source)) for source in sources] for part, sources in parts.items()}

    def _collator(self) -> LabelledCollator:  # type: ignore[override]
        return LabelledCollator(
            self.corpus.rows,
            flat=self.flat,
            pad=self.prepared_tokenizer.pad_token_id,
            max_document=self.sequence_length,
            desirable=self._desirable(),
        )

    def _desirable(self) -> np.ndarray:
        """(D,) bool of each stored document."""
        values = [store.values[:, 0] > 0 for store in self.corpus.stores if len(store) and store.values is not None]
        return np.concatenate([np.zeros(0, dtype=np.bool_), *values])

    def label_counts(self) -> tuple[int, int]:
        """Desirable and undesirable answers to train on."""
        found = self._desirable()[self.corpus.documents["train"]]
        return int(found.sum()), int((~found).sum())

    def audit(self, vocabulary: int | None = None, color: bool | None = None) -> AuditReport:
        report = super().audit(vocabulary, color)
        desirable, undesirable = self.label_counts()
        report.counts |= {"desirable answers": desirable, "undesirable answers": undesirable}
        if not (desirable and undesirable) and desirable + undesirable:
            report.fatal.append(
                f"data: all {desirable + undesirable:,} labels are {'true' if desirable else 'false'}; desirable and "
                "undesirable answers are needed: add rows with the other label, or fine-tune (sft/quickstart)"
            )
        return report


class LabelledCollator(Collator):
    """Rows, each with the row before it in the window, to a ``LabelledBatch``.

    Args:
        desirable: (D,) bool of each stored document.
    """

    beside = True

    def __init__(self, *args: Any, desirable: np.ndarray, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.desirable = desirable

    def __call__(self, batch: Sequence[Indices]) -> LabelledBatch:
        made = LabelledBatch(**vars(super().__call__([row[:1] for row in batch])))
        desirable = torch.from_numpy(self.desirable[[int(row[0, 0]) for row in batch]])
        return replace(made, desirable=desirable, mismatched=[self._mismatched(batch)])

    def empty(self) -> LabelledBatch:
        return LabelledBatch(**vars(super().empty()), mismatched=[super().empty()])

    def _mismatched(self, batch: Sequence[Indices]) -> TokenBatch:
        """Each row's prompt with the answer of the row beside it, cut to what a document may have."""
        rows = [np.array(self._prompt_and_answer(*row.tolist())) for row in batch]
        made = replace(super().__call__(rows), rows=[int(row[0, 0]) for row in batch])
        if made.document_offsets is None:
            return made
        # Each part is a document of its own so far.
        prompts = [stop - start for (_, start, stop), _ in (row.tolist() for row in rows)]
        lengths = made.document_offsets.diff().numpy()
        made.position_ids += torch.from_numpy(np.repeat([n for prompt in prompts for n in (0, prompt)], lengths))
        return replace(made, document_offsets=made.document_offsets[::2].contiguous())

    def _prompt_and_answer(self, own: list[int], beside: list[int]) -> list[tuple[int, int, int]]:
        document, start, _ = own
        begin = start + self._prompt(*own[1:])
        answer = beside[1] + self._prompt(*beside[1:])
        return [
            (document, start, begin),
            (document, answer, min(beside[2], answer + self.max_document - begin + start)),
        ]

    def _prompt(self, start: int, stop: int) -> int:
        """Tokens of a document before its answer."""
        return int(self.rows.read(start, stop)[1].argmax())
