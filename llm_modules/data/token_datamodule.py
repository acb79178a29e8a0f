"""What the DataModules have in common: from sources to loaders, resume and audit."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from llm_modules.data.audit import AuditReport, audit_corpus
from llm_modules.data.collation import Collator
from llm_modules.data.corpus import Corpus, TooLong
from llm_modules.data.loading import EvaluationLoader, Slicing, WindowLoader
from llm_modules.data.packing import EpochPlan, Packing
from llm_modules.data.resuming import align_progress
from llm_modules.data.sources import Row, Source
from llm_modules.data.tokenization import Encoder, tokenize
from llm_modules.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VALIDATION_FRACTION = 0.05

Prompt = str | list[dict[str, Any]]


class TokenDataModule(LightningDataModule):
    """What all token data have in common: sources, cache, split, packing, loaders, audit.

    Args:
        sources: Where the training rows come from.
        tokenizer: A folder, a hub id or `builtin:bytes`; set once at the top of a recipe.
        sequence_length: Tokens in a row at most; set once at the top of a recipe.
        batch_size: Rows in a micro-batch of one process (examples, for the packings `batch` and `none`).
        seed: Decides the split and the order; the top-level seed_everything.
        validation_sources: Rows to validate on; not given, a part of the sources is held out.
        validation_fraction: Share of the documents that is held out (0.05 if not given; 0: none). Built-in corpora
            bring their own held-out part.
        test_sources: Rows for `recipes test` and `predict`; not given, those of the validation.
        packing: `documents`: whole documents, best fit, isolated from one another; `chunks`: one stream, cut into rows;
            `batch`: the examples of a batch in one row without padding; `none`: an example a row, padded.
        validation_batch_size: Rows in a micro-batch of validation, test and prediction; batch_size if not given.
        length_group: For packing `none`: so many rows of similar length are put next to one another; 0: only those of
            one optimizer step are sorted.
        workers: Processes that make batches; 0: the training process itself.
        tokenize_workers: Processes that tokenize; not given, as many as there are cores (at most 8), 1 for small data.
        cache_dir: Folder for tokenized data; $XDG_CACHE_HOME/litrecipes (~/.cache/litrecipes) if not given.
        require_turn_end: Stop before training if the end of the assistant's turns is never trained.
    """

    def __init__(
        self,
        sources: list[Source],
        tokenizer: str,
        sequence_length: int,
        batch_size: int = 8,
        seed: int = 0,
        validation_sources: list[Source] | None = None,
        validation_fraction: float | None = None,
        test_sources: list[Source] | None = None,
        packing: Packing = "documents",
        validation_batch_size: int | None = None,
        length_group: int = 0,
        workers: int = 0,
        tokenize_workers: int | None = None,
        cache_dir: str | None = None,
        require_turn_end: bool = True,
    ) -> None:
        super().__init__()
        self.sources = _sources("sources", sources) or []
        self.validation_sources = _sources("validation_sources", validation_sources)
        self.test_sources = _sources("test_sources", test_sources)
        if not self.sources:
            raise ValueError("data.sources: the list is empty; give at least one source")
        at_least("sequence_length", sequence_length, 2)
        at_least("data.batch_size", batch_size, 1)
        at_least("data.workers", workers, 0)
        at_least("data.length_group", length_group, 0)
        at_least("seed", seed, 0)
        if validation_batch_size is not None:
            at_least("data.validation_batch_size", validation_batch_size, 1)
        if validation_fraction is not None and not 0 <= validation_fraction < 1:
            raise ValueError(f"data.validation_fraction: {validation_fraction} is not in [0, 1)")
        if validation_fraction and validation_sources:
            raise ValueError("data.validation_fraction: validation_sources are given too; leave one of them out")
        if packing not in ("documents", "chunks", "batch", "none"):
            raise ValueError(f"data.packing: {packing!r} is not one of documents, chunks, batch, none")
        self.tokenizer_source = tokenizer
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.validation_fraction = validation_fraction
        self.packing: Packing = packing
        self.validation_batch_size = validation_batch_size or batch_size
        self.length_group = length_group
        self.workers = workers
        self.tokenize_workers = tokenize_workers
        self.cache_dir = cache_folder(cache_dir)
        self.require_turn_end = require_turn_end
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._corpus: Corpus | None = None
        self._loader: WindowLoader | None = None
        self._position: dict[str, Any] | None = None
        self._plans: dict[int, EpochPlan] = {}

    # What a kind of data adds

    too_long: TooLong = "split"

    def make_encoder(self, tokenizer: PreTrainedTokenizerBase) -> Encoder:
        """Rows to tokens."""
        raise NotImplementedError

    def make_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer as this data need it."""
        return load_tokenizer(self.tokenizer_source)

    def make_prompt(self, row: Row) -> tuple[Prompt, str]:
        """(prompt, reference answer) of a row; the prompt is raw text, or chat messages to be rendered."""
        raise NotImplementedError

    @property
    def document_length(self) -> int:
        """Tokens of a stored document at most."""
        return self.sequence_length

    @property
    def micro_batch_tokens(self) -> int:
        """Positions of a micro-batch at most."""
        return self.batch_size * self.document_length

    # Preparation

    @property
    def prepared_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with the chat template that is trained."""
        if self._tokenizer is None:
            self._tokenizer = self.make_tokenizer()
        return self._tokenizer

    @property
    def flat(self) -> bool:
        """Whether a micro-batch is one row of isolated documents."""
        return self.packing in ("documents", "batch")

    def prepare_data(self) -> None:
        """Tokenize what is not in the cache yet (Lightning calls it on one process of each machine)."""
        encoder = self.make_encoder(self.prepared_tokenizer)
        for sources in self._parts().values():
            for source in sources:
                tokenize(source, encoder, self.cache_dir, self.tokenize_workers)

    def setup(self, stage: str | None = None) -> None:
        """Open the tokenized data and deal the documents into parts."""
        if self._corpus is not None:
            return
        encoder = self.make_encoder(self.prepared_tokenizer)
        stores = {
            part: [tokenize(source, encoder, self.cache_dir, self.tokenize_workers) for source in sources]
            for part, sources in self._parts().items()
        }
        corpus = Corpus(stores, self.document_length, self.too_long)
        if self.validation_sources is None:
            fraction = VALIDATION_FRACTION if self.validation_fraction is None else self.validation_fraction
            corpus.hold_out(fraction, self.seed, exempt=self._with_own_validation())
        corpus.remove_leaks()
        self._corpus = corpus

    def _with_own_validation(self) -> list[int]:
        if self.validation_fraction is not None:
            return []
        return [i for i, source in enumerate(self.sources) if source.builtin and source.split == "train"]

    def _parts(self) -> dict[str, list[Source]]:
        validation = self.validation_sources
        if validation is None:
            own = [self.sources[i] for i in self._with_own_validation()]
            validation = [
                Source(source.path, columns=source.columns, split="validation", limit=source.limit) for source in own
            ]
        return {"train": self.sources, "validation": validation, "test": self.test_sources or []}

    @property
    def corpus(self) -> Corpus:
        """The documents; after `setup`."""
        if self._corpus is None:
            raise RuntimeError("the DataModule is not set up: call prepare_data() and setup() first")
        return self._corpus

    # Loaders

    def epoch_plan(self, epoch: int) -> EpochPlan:
        """The rows of a training epoch, in order: a pure function of (data, seed, epoch)."""
        if epoch not in self._plans:
            # The first one is asked for by the audit, by the run's length and by the loader.
            weights = [source.weight for source in self.sources]
            self._plans = {epoch: self.corpus.epoch(epoch, self.packing, weights, self.seed, self.length_group)}
        return self._plans[epoch]

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch, Lightning's ``limit_train_batches`` applied."""
        return self._new_loader(workers=0).steps_in_epoch

    def _slicing(self, batch_size: int, accumulate: int = 1) -> Slicing:
        # Not the number of ranks: those that share each matrix (tensor parallelism) work on the same rows.
        replicas = (self.trainer.distributed_sampler_kwargs if self.trainer is not None else None) or {}
        world, rank = replicas.get("num_replicas", 1), replicas.get("rank", 0)
        return Slicing(batch_size, accumulate, world, rank, sort=self.packing == "none")

    def _collator(self) -> Collator:
        pad = self.prepared_tokenizer.pad_token_id
        return Collator(self.corpus.rows, flat=self.flat, pad=pad, max_document=self.corpus.longest(self.packing))

    def train_dataloader(self) -> WindowLoader:
        """Full windows, resumable; see `WindowLoader`."""
        self._loader = self._new_loader(self.workers)
        if self._position is not None:
            self._loader.load_state_dict(self._position)
            if self.trainer is not None:
                align_progress(self.trainer, self._loader)
        return self._loader

    def _new_loader(self, workers: int) -> WindowLoader:
        trainer = self.trainer
        return WindowLoader(
            self.epoch_plan,
            self.corpus.rows,
            self._collator(),
            self._slicing(self.batch_size, trainer.accumulate_grad_batches if trainer is not None else 1),
            workers=workers,
            pin_memory=True,
            limit=trainer.limit_train_batches if trainer is not None else None,
            repeat=bool(getattr(trainer, "overfit_batches", 0)),
            identity=self.corpus.identity(
                self.packing, [source.weight for source in self.sources], self.seed, self.length_group
            ),
        )

    def val_dataloader(self) -> EvaluationLoader | list[Any]:
        """Every held-out row once over all ranks; no loader where nothing is held out."""
        return self._evaluation("validation")

    def test_dataloader(self) -> EvaluationLoader | list[Any]:
        """The test sources, or else what is held out."""
        return self._evaluation("test" if self.test_sources else "validation")

    def _evaluation(self, part: str) -> EvaluationLoader | list[Any]:
        documents = self.corpus.documents[part]
        if not len(documents):
            return []
        return EvaluationLoader(
            self.corpus.whole(part, self.packing),
            self.corpus.rows,
            self._collator(),
            self._slicing(self.validation_batch_size),
            workers=self.workers,
            pin_memory=True,
        )

    def predict_dataloader(self) -> DataLoader:
        """Prompts to be continued: batches of ``{"prompts", "references", "rows"}``, a share for each rank."""
        found = list(self.prompts("test" if self.test_sources else "validation"))
        slicing = self._slicing(self.validation_batch_size)
        mine = found[slicing.rank :: slicing.world]
        size = self.validation_batch_size
        batches = [
            {
                "prompts": [prompt for _, prompt, _ in mine[i : i + size]],
                "references": [reference for _, _, reference in mine[i : i + size]],
                "rows": [document for document, _, _ in mine[i : i + size]],
            }
            for i in range(0, len(mine), size)
        ]
        # Lightning would take a bare list for several loaders.
        return DataLoader(batches, batch_size=None, collate_fn=_as_it_is)  # type: ignore[arg-type]

    def prompts(self, part: str = "validation", limit: int | None = None) -> Iterator[tuple[int, Prompt, str]]:
        """(document, prompt, reference answer) of the documents of a part, in their order."""
        corpus = self.corpus
        wanted = np.sort(corpus.documents[part])[:limit]
        sources = [source for of_part in self._parts().values() for source in of_part]
        for number, source in enumerate(sources):
            first, last = int(corpus.first[number]), int(corpus.first[number + 1])
            inside = {int(document) - first for document in wanted[(wanted >= first) & (wanted < last)]}
            if not inside:
                continue
            end = max(inside)
            for i, row in enumerate(source.rows()):
                if i in inside:
                    yield (first + i, *self.make_prompt(row))
                if i == end:
                    break

    # Resume and audit

    def state_dict(self) -> dict[str, Any]:
        """The position in the global order of rows."""
        # Lightning forgets a loader's own state where a checkpoint lies at the end of an epoch.
        return {} if self._loader is None else {"position": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at a position."""
        self._position = state_dict.get("position")
        if self._position is not None and self._loader is not None:
            self._loader.load_state_dict(self._position)

    def describe_rows(self, rows: list[int]) -> list[str]:
        """`file:row` of a batch's rows, to name a bad one."""
        return [self.corpus.origin(row) for row in rows]

    def audit(self, vocabulary: int | None = None, color: bool | None = None) -> AuditReport:
        """Count what will be trained; ``.lines`` is the report, ``.fatal`` what must stop the run.

        Args:
            vocabulary: number of token ids of the model; the tokenizer's if not given.
            color: mark what is trained in the sample by color; None: where standard error is a terminal.
        """
        report = audit_corpus(
            self.corpus,
            self.epoch_plan(0),
            self.prepared_tokenizer,
            flat=self.flat,
            rows_per_batch=self.batch_size,
            require_turn_end=self.require_turn_end,
            vocabulary=vocabulary,
            color=sys.stderr.isatty() if color is None else color,
        )
        for source in (*self.sources, *(self.validation_sources or ())):
            report.counts |= source.left_out()
        return report


def cache_folder(folder: str | None) -> Path:
    """Where tokenized data are kept."""
    if folder is not None:
        return Path(folder).expanduser()
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "litrecipes"


def _sources(name: str, sources: list[Source] | None) -> list[Source] | None:
    if sources is None:
        return None
    return [Source(**source) if isinstance(source, dict) else source for source in sources]


def _as_it_is(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    return batch


def at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name}: {value} is below {least}")
