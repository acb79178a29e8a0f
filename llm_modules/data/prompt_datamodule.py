"""The DataModule of prompts, to which the model being trained gives its own answers."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from llm_modules.data.audit import AuditReport
from llm_modules.data.corpus import Corpus
from llm_modules.data.loading import EvaluationLoader, Slicing, WindowLoader
from llm_modules.data.packing import EpochPlan, Indices
from llm_modules.data.prompts import PromptEncoder, prompt_record
from llm_modules.data.sources import Row
from llm_modules.data.templates import set_template
from llm_modules.data.token_datamodule import Prompt, TokenDataModule, at_least
from llm_modules.rollouts import PromptBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptDataModule(TokenDataModule):
    """Prompts for reinforcement learning.

    Rows have ``prompt`` (text) or ``messages`` that end with what is answered, and, if it is known, the right answer in
    ``reference``; rewards are handed all columns. ``batch_size`` counts the prompts of one iteration over all
    processes: how they are dealt to processes and micro-batches changes nothing.

    Args:
        chat_template: chatml, llama3, gemma, zephyr, alpaca, raw, a .jinja file, or the template itself; not given: the
            tokenizer's own.
        instruction: a system message in front of every prompt; not given: none.
        longest_prompt: tokens of a prompt at most; half of sequence_length if not given. The other tokens are the
            answer's.
        too_long: longer prompts: `drop` (the audit counts them) or `error`.
    """

    def __init__(
        self,
        *,
        chat_template: str | None = None,
        instruction: str | None = None,
        longest_prompt: int | None = None,
        too_long: Literal["drop", "error"] = "drop",
        packing: Literal["batch"] = "batch",
        **kwargs: Any,
    ) -> None:
        if packing != "batch":
            raise ValueError(f"data.packing: {packing!r} is not one of batch")
        super().__init__(packing=packing, **kwargs)
        if too_long not in ("drop", "error"):
            raise ValueError(f"data.too_long: {too_long!r} is not one of drop, error")
        if instruction is not None and not instruction.strip():
            raise ValueError("data.instruction: it is empty; leave it out")
        self.longest_prompt = self.sequence_length // 2 if longest_prompt is None else longest_prompt
        at_least("data.longest_prompt", self.longest_prompt, 1)
        if self.longest_prompt >= self.sequence_length:
            raise ValueError(
                f"data.longest_prompt: {self.longest_prompt} leaves nothing of sequence_length {self.sequence_length} "
                "for an answer"
            )
        self.chat_template, self.instruction, self.too_long = chat_template, instruction, too_long

    @property
    def document_length(self) -> int:
        return self.longest_prompt

    def make_tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer = super().make_tokenizer()
        for line in set_template(tokenizer, self.chat_template):
            print(line, file=sys.stderr)
        return tokenizer

    def make_encoder(self, tokenizer: PreTrainedTokenizerBase) -> PromptEncoder:
        return PromptEncoder(tokenizer, self.instruction)

    def make_prompt(self, row: Row) -> tuple[Prompt, str]:
        record = prompt_record(row, self.instruction)
        return record["prompt"], record["reference"]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt of any part."""
        return self.corpus.longest(self.packing)

    def asked(self) -> Iterator[tuple[str, int, dict[str, Any]]]:
        """Each row of training and validation: `file:row`, its number and its record, as ``PromptBatch`` has them."""
        maker = _PromptMaker(self.corpus)
        for part in ("train", "validation"):
            for document in self.corpus.documents.get(part, ()):
                yield self.corpus.origin(document), int(document), maker.record(int(document))

    @property
    def updates(self) -> int:
        """Optimizer steps that learn from the same answers: the module's."""
        module = None if self.trainer is None else self.trainer.lightning_module
        return int(getattr(module, "updates", 1))

    def _new_loader(self, workers: int) -> WindowLoader:
        trainer, updates = self.trainer, self.updates
        weights = [source.weight for source in self.sources]
        prompts = len(self.epoch_plan(0))
        if prompts < self.batch_size:
            raise ValueError(f"data.batch_size: {self.batch_size} prompts an iteration, but an epoch has {prompts}")
        loader = WindowLoader(
            lambda epoch: _Repeated(self.epoch_plan(epoch), self.batch_size, updates),  # type: ignore[arg-type,return-value]
            self.corpus.rows,
            _PromptMaker(self.corpus),
            _Whole(self.batch_size, trainer.accumulate_grad_batches if trainer is not None else 1),
            workers=workers,
            limit=trainer.limit_train_batches if trainer is not None else None,
            repeat=bool(getattr(trainer, "overfit_batches", 0)),
            identity=self.corpus.identity(self.batch_size, updates, weights, self.seed),
        )
        if loader.steps_in_epoch % updates:
            raise ValueError(
                f"trainer.limit_train_batches: {loader.steps_in_epoch} optimizer steps an epoch are no multiple of the "
                f"{updates} that learn from the same answers"
            )
        loader.rows_in_epoch, loader.dropped_rows = prompts, prompts % self.batch_size
        return loader

    def _evaluation(self, part: str) -> EvaluationLoader | list[Any]:
        if not len(self.corpus.documents[part]):
            return []
        plan, slicing = self.corpus.whole(part, self.packing), self._slicing(self.validation_batch_size)
        return EvaluationLoader(plan, self.corpus.rows, _PromptMaker(self.corpus), slicing)

    def transfer_batch_to_device(self, batch: Any, device: Any, dataloader_idx: int) -> Any:
        """Prompts stay on the host, as the answers do, until they are a batch that is trained."""
        return (
            batch if isinstance(batch, PromptBatch) else super().transfer_batch_to_device(batch, device, dataloader_idx)
        )

    def audit(self, vocabulary: int | None = None, color: bool | None = None) -> AuditReport:
        report = super().audit(vocabulary, color)
        return _PromptReport(**vars(report))


class _PromptReport(AuditReport):
    """Nothing of a prompt is trained; what is, is not there yet."""

    @property
    def lines(self) -> list[str]:
        said = [line for line in super().lines if not line.startswith(("tokens:", "rows in"))]
        return [*said, f"prompt tokens: {self.tokens:,}"]


@dataclass(frozen=True)
class _Whole(Slicing):
    """Every micro-batch of every rank is given all prompts of the iteration."""

    def micro_batches(self, rows: Indices, lengths: Indices | None) -> list[Indices]:
        return [rows] * self.accumulate

    @property
    def rows_per_step(self) -> int:
        return self.batch_size


class _Repeated:
    """An epoch in which each ``size`` rows come ``times`` times, one after another; of a row it gives also which time.

    What does not fill an iteration is left out of this epoch.
    """

    def __init__(self, plan: EpochPlan, size: int, times: int) -> None:
        self.plan, self.size, self.times = plan, size, times

    def __len__(self) -> int:
        whole = len(self.plan) // self.size
        return whole * self.size * self.times if whole else len(self.plan)

    def row(self, index: int) -> Indices:
        iteration, place = divmod(index, self.size * self.times)
        update, row = divmod(place, self.size)
        (segment,) = self.plan.row(iteration * self.size + row)
        return np.array([[*segment, update]])


class _PromptMaker:
    """Rows to a ``PromptBatch``."""

    beside = False

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def __call__(self, batch: Sequence[Indices]) -> PromptBatch:
        update = int(batch[0][0, 3]) if batch[0].shape[1] > 3 else 0
        documents = [int(row[0, 0]) for row in batch]
        prompts = [torch.from_numpy(self.corpus.rows.read(*row[0, 1:3].tolist())[0]) for row in batch]
        return PromptBatch(prompts, [self.record(document) for document in documents], documents, update)

    def empty(self) -> PromptBatch:
        return PromptBatch([], [], [])

    def record(self, document: int) -> dict[str, Any]:
        corpus = self.corpus
        number = int(np.searchsorted(corpus.first, document, side="right")) - 1
        record: dict[str, Any] = corpus.stores[number].record(document - int(corpus.first[number]))
        return record | {"origin": corpus.origin(document)}
