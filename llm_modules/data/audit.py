"""The mask audit: what will be trained on, counted before the first step, and what is fatal about it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from llm_modules.data.packing import EpochPlan

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llm_modules.data.corpus import Corpus

SAMPLE_TOKENS = 400
ANSI = ("\x1b[32m", "\x1b[0m")
BRACKETS = ("⟦", "⟧")
_TURNS = ("turns", "turns without end")


@dataclass
class AuditReport:
    """What was found.

    Attributes:
        documents: part -> how many.
        bytes: part -> UTF-8 bytes of their text (of the assistant's turns, in conversations), for bits per byte.
        tokens, trained: tokens and trained targets of the training documents.
        rows, positions: rows of the first epoch, and the positions that they take.
        padding: share of positions that a padded layout wastes (0 where packed).
        lengths: percentile -> tokens of a document.
        counts: what was cut, dropped or left out, and how often.
        turns, endless: turns of the assistant, and those whose end is not trained.
        outside: token ids beyond the vocabulary.
        largest: the largest token id.
        sample: a decoded row in which what is trained is marked.
        fatal: what must stop the run, a line each.
    """

    documents: dict[str, int]
    bytes: dict[str, int]
    tokens: int
    trained: int
    rows: int
    positions: int
    padding: float
    lengths: dict[int, int]
    counts: dict[str, int]
    turns: int
    endless: int
    outside: int
    largest: int
    sample: str = ""
    fatal: list[str] = field(default_factory=list)

    @property
    def trained_share(self) -> float:
        return self.trained / max(self.tokens, 1)

    @property
    def lines(self) -> list[str]:
        """The report, to be printed."""
        parts = ", ".join(
            f"{count:,} {name} ({self.bytes[name] / 1e6:,.2f} MB)" for name, count in self.documents.items() if count
        )
        percentiles = ", ".join(f"p{p} {length:,}" for p, length in self.lengths.items())
        lines = [
            f"documents: {parts}",
            f"tokens: {self.tokens:,}, trained {self.trained:,} ({self.trained_share:.1%})",
            f"lengths: {percentiles}",
            f"rows in the first epoch: {self.rows:,} ({self.positions:,} positions, padding {self.padding:.1%})",
        ]
        if self.turns:
            lines.append(f"assistant turns: {self.turns:,}, end trained in {1 - self.endless / self.turns:.1%}")
        lines += [f"{name}: {count:,}" for name, count in self.counts.items() if count]
        return lines


def audit_corpus(
    corpus: Corpus,
    plan: EpochPlan,
    tokenizer: PreTrainedTokenizerBase,
    *,
    flat: bool,
    rows_per_batch: int,
    require_turn_end: bool,
    vocabulary: int | None,
    color: bool,
) -> AuditReport:
    """Count what the training part holds.

    Args:
        plan: the rows of the first epoch.
        rows_per_batch: rows that are padded together.
        require_turn_end: an assistant whose turns are never ended is fatal (it would never stop).
        vocabulary: number of ids that the model knows; None: the tokenizer's.
    """
    documents = corpus.documents["train"]
    lengths = (corpus.stops - corpus.starts)[documents]
    size = len(tokenizer) if vocabulary is None else vocabulary
    largest = max((int(store.tokens.max(initial=0)) for store in corpus.stores), default=0)
    outside = sum(int((store.tokens >= size).sum()) for store in corpus.stores) if largest >= size else 0
    rows = plan.lengths()
    positions = int(rows.sum()) if flat else _padded(rows, rows_per_batch)
    made = Counter(dict.fromkeys(_TURNS, 0))
    for store in corpus.stores:
        made.update(store.meta["counts"])
    percentiles = (0, 50, 90, 99, 100)
    found = np.percentile(lengths, percentiles, method="higher") if len(lengths) else [0] * len(percentiles)
    report = AuditReport(
        documents={part: len(numbers) for part, numbers in corpus.documents.items()},
        bytes={part: int(corpus.sizes[numbers].sum()) for part, numbers in corpus.documents.items()},
        tokens=int(lengths.sum()),
        trained=int(corpus.trained[documents].sum()),
        rows=len(plan),
        positions=positions,
        padding=1 - int(rows.sum()) / max(positions, 1),
        lengths={p: int(length) for p, length in zip(percentiles, found, strict=True)},
        counts=corpus.counts | {name: count for name, count in made.items() if name not in _TURNS},
        turns=made["turns"],
        endless=made["turns without end"],
        outside=outside,
        largest=largest,
    )
    if len(plan):
        report.sample = sample(corpus, int(plan.row(0)[0, 0]), tokenizer, color)
    report.fatal = _fatal(report, size, require_turn_end)
    return report


def _padded(rows: np.ndarray, together: int) -> int:
    """Positions of padded batches, if rows are padded to the longest of ``together`` neighbours."""
    starts = range(0, len(rows), together)
    return sum(int(rows[start : start + together].max()) * len(rows[start : start + together]) for start in starts)


def _fatal(report: AuditReport, vocabulary: int, require_turn_end: bool) -> list[str]:
    fatal = []
    if report.trained == 0:
        reasons = ", ".join(f"{name}: {count}" for name, count in report.counts.items() if count)
        fatal.append(f"data: no token is trained ({reasons or 'the sources hold nothing to predict'})")
    if report.outside:
        fatal.append(
            f"data: {report.outside:,} token ids are outside of the vocabulary of {vocabulary:,} (the largest is "
            f"{report.largest:,}); the tokenizer does not belong to the model"
        )
    if require_turn_end and report.turns and report.endless == report.turns:
        fatal.append(
            "data: the end of the assistant's turn is never trained, so the model would not learn to stop; use a "
            "chat_template that ends turns with a token, or set data.require_turn_end to false"
        )
    return fatal


def sample(corpus: Corpus, document: int, tokenizer: PreTrainedTokenizerBase, color: bool) -> str:
    """The beginning of a document as text, what is trained in green (or in ⟦brackets⟧)."""
    start = int(corpus.starts[document])
    stop = min(int(corpus.stops[document]), start + SAMPLE_TOKENS)
    tokens, trained = corpus.rows.read(start, stop)
    trained = trained.copy()
    trained[0] = False
    opening, closing = ANSI if color else BRACKETS
    bounds = np.flatnonzero(np.diff(trained)) + 1
    text: list[str] = []
    for ids, is_trained in zip(np.split(tokens, bounds), np.split(trained, bounds), strict=True):
        part = str(tokenizer.decode(ids.tolist(), skip_special_tokens=False))
        text.append(f"{opening}{part}{closing}" if is_trained[0] else part)
    rest = int(corpus.stops[document]) - stop
    return "".join(text) + (f" ... ({rest:,} tokens more)" if rest else "")
