"""Conversations that a student reads as they are, and its teacher under a preprompt: context distillation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from llm_modules.batch import TaughtBatch
from llm_modules.data.chat import ChatFormat, conversation, preprompt_text, with_preprompt
from llm_modules.data.collation import Collator
from llm_modules.data.conversation_encoding import ConversationEncoder, TrainOn
from llm_modules.data.datamodules import ConversationDataModule
from llm_modules.data.packing import Indices, Packing
from llm_modules.data.sources import Row
from llm_modules.data.store import Encoded

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerBase

    from llm_modules.data.audit import AuditReport

TooLongAnswer = Literal["truncate", "drop", "error"]


class PrepromptDataModule(ConversationDataModule):
    """Conversations for context distillation: the teacher reads them under a preprompt, the student without.

    Rows are those of ConversationDataModule. The student's and the teacher's trained tokens are the same ones, in the
    same order. sequence_length is that of the longer one, the teacher's. `predict` and samples are without preprompt.

    Args:
        preprompt: what only the teacher reads: the text, or a .txt file with it. It becomes a system message, above
            that of the conversation where it has one.
        train_on: `assistant`: all that it says; `last`: its last turn.
        packing: `batch`: the conversations of a batch in one row without padding; `none`: padded.
        too_long: conversations that are longer than sequence_length with the preprompt: `truncate`, `drop` or `error`.
    """

    def __init__(
        self,
        *,
        preprompt: str,
        train_on: TrainOn = "assistant",
        packing: Packing = "batch",
        too_long: TooLongAnswer = "truncate",
        **kwargs: Any,
    ) -> None:
        if packing not in ("batch", "none"):
            raise ValueError(f"data.packing: {packing!r} is not one of batch, none")
        if train_on not in ("assistant", "last"):
            raise ValueError(f"data.train_on: {train_on!r} is not one of assistant, last: the prompts are not the same")
        super().__init__(packing=packing, train_on=train_on, too_long=too_long, **kwargs)
        self.too_long_answer: TooLongAnswer = too_long
        self.too_long = "split"  # nothing is left to be cut when documents are dealt
        self.preprompt = preprompt_text(preprompt, "data.preprompt")

    @property
    def document_length(self) -> int:
        return 2 * self.sequence_length  # the student's and the teacher's, each cut when it was encoded

    def make_encoder(self, tokenizer: PreTrainedTokenizerBase) -> PrepromptEncoder:
        return PrepromptEncoder(
            tokenizer, self.preprompt, self.sequence_length, self.too_long_answer, self.chat_format, self.train_on
        )

    def audit(self, vocabulary: int | None = None, color: bool | None = None) -> AuditReport:
        report = super().audit(vocabulary, color)
        return replace(report, trained=report.trained // 2)  # the same tokens stand in both parts of a document

    def _collator(self) -> PrepromptCollator:
        stores = [store for store in self.corpus.stores if store.splits is not None]
        return PrepromptCollator(
            self.corpus.rows,
            flat=self.flat,
            pad=self.prepared_tokenizer.pad_token_id,
            max_document=self.sequence_length,
            splits=np.concatenate([np.zeros(0, dtype=np.int64), *(store.splits for store in stores)]),
        )


class PrepromptCollator(Collator):
    """Stored documents to a ``TaughtBatch``.

    Args:
        splits: (D,) where the teacher's part of each document begins.
    """

    def __init__(self, *args: Any, splits: Indices, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.splits = splits

    def __call__(self, batch: Sequence[Indices]) -> TaughtBatch:
        sides: tuple[list[Indices], list[Indices]] = [], []
        for row in batch:
            ((document, start, stop),) = row.tolist()
            middle = start + int(self.splits[document])
            for side, part in zip(sides, ((start, middle), (middle, stop)), strict=True):
                side.append(np.array([(document, *part)]))
        student, teacher = (super(PrepromptCollator, self).__call__(side) for side in sides)
        return TaughtBatch(**vars(student), teacher=teacher)

    def empty(self) -> TaughtBatch:
        return TaughtBatch(**vars(super().empty()), teacher=super().empty())


class PrepromptEncoder:
    """A conversation as two of one stored document, the student's first; predicted are the same tokens of both.

    Args:
        tokenizer: a fast tokenizer with a chat template.
        preprompt: the text that the second one begins with.
        sequence_length: tokens of a conversation at most.
        too_long: what becomes of one that is longer with the preprompt: ``truncate``: the answer's end is cut off in
            both, unless nothing of it would be left; ``drop``; ``error``.
        chat_format: the columns' format.
        train_on: `assistant`: all of its turns; `last`: only the last one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        preprompt: str,
        sequence_length: int,
        too_long: TooLongAnswer = "truncate",
        chat_format: ChatFormat = "auto",
        train_on: TrainOn = "assistant",
    ) -> None:
        self.tokenizer = tokenizer
        self.preprompt = preprompt
        self.sequence_length = sequence_length
        self.too_long: TooLongAnswer = too_long
        self.chat_format: ChatFormat = chat_format
        self._conversations = ConversationEncoder(tokenizer, "messages", train_on)

    def description(self) -> dict[str, Any]:
        names = ("preprompt", "sequence_length", "too_long", "chat_format")
        own = {name: getattr(self, name) for name in names}
        return {"kind": "preprompt", "train_on": self._conversations.train_on} | own

    def __call__(self, rows: Sequence[Row]) -> Encoded:
        talks = [conversation(row, self.chat_format) for row in rows]
        both = [
            row._replace(columns={"messages": messages, "tools": talk.tools}, mapped=frozenset())
            for row, talk in zip(rows, talks, strict=True)
            for messages in (talk.messages, with_preprompt(talk.messages, self.preprompt))
        ]
        encoded = self._conversations(both)
        assert encoded.trained is not None
        counts = {name: count // 2 for name, count in encoded.counts.items()}
        counts |= {"longer than the sequence length with the preprompt": 0, "dropped as too long": 0}
        tokens, trained, lengths, splits = [], [], [], []
        stops = np.cumsum(encoded.lengths)
        starts = stops - encoded.lengths
        for number, row in enumerate(rows):
            parts = [slice(int(starts[i]), int(stops[i])) for i in (2 * number, 2 * number + 1)]
            sides = [(encoded.tokens[part], encoded.trained[part].copy()) for part in parts]
            self._check(row, sides)
            sides = self._fitted(row, sides, counts)
            tokens += [ids for ids, _ in sides]
            trained += [mask for _, mask in sides]
            splits.append(len(sides[0][0]))
            lengths.append(sum(len(ids) for ids, _ in sides))
        return Encoded(
            tokens=np.concatenate(tokens),
            trained=np.concatenate(trained),
            lengths=np.array(lengths, dtype=np.int64),
            sizes=encoded.sizes[::2].copy(),
            hashes=encoded.hashes[::2].copy(),
            groups=encoded.groups[::2].copy(),
            places=np.array([(0, row.number) for row in rows], dtype=np.int64),
            counts=counts,
            splits=np.array(splits, dtype=np.int64),
        )

    @staticmethod
    def _check(row: Row, sides: list[tuple[NDArray[np.uint32], NDArray[np.bool_]]]) -> None:
        """The preprompt changes what comes before the answers, and nothing in them."""
        (ids, mask), (teachers, teachers_mask) = sides
        if np.array_equal(ids, teachers):
            raise ValueError(
                f"{row.origin}: the chat template leaves out the preprompt, a system message; use one that shows it, "
                "such as chatml"
            )
        if not np.array_equal(ids[mask], teachers[teachers_mask]):
            raise ValueError(
                f"{row.origin}: the chat template writes the answers otherwise under the preprompt than without it; "
                "use another, such as chatml"
            )

    def _fitted(
        self, row: Row, sides: list[tuple[NDArray[np.uint32], NDArray[np.bool_]]], counts: dict[str, int]
    ) -> list[tuple[NDArray[np.uint32], NDArray[np.bool_]]]:
        """Both cut after the last answer's token that fits into both."""
        longest = max(len(ids) for ids, _ in sides)
        if longest <= self.sequence_length:
            return sides
        counts["longer than the sequence length with the preprompt"] += 1
        if self.too_long == "error":
            raise ValueError(
                f"{row.origin}: {longest} tokens with the preprompt, more than sequence_length {self.sequence_length} "
                "(data.too_long is 'error'; allowed too: truncate, drop)"
            )
        fitting = min(int(mask[: self.sequence_length].sum()) for _, mask in sides)
        if self.too_long == "drop" or not fitting:
            counts["dropped as too long"] += 1
            # Without a token to predict, the document is left out when the parts are dealt.
            return [(ids[: self.sequence_length], np.zeros_like(mask[: self.sequence_length])) for ids, mask in sides]
        ends = [int(np.flatnonzero(mask)[fitting - 1]) + 1 for _, mask in sides]
        return [(ids[:end], mask[:end]) for (ids, mask), end in zip(sides, ends, strict=True)]
