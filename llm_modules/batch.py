"""Floor 0: the typed batches that data hands to modules, and what an objective returns.

Shape legend: B rows, T positions, N = B * T positions, D documents, M trained positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

IGNORE_INDEX = -100
"""A label that is not trained: the value that torch's and transformers' cross-entropy skip."""

MAY_LACK = ("desirable", "undesirable")
"""Counts of which a window, or what is held out, may hold none: then nothing is logged of them."""


@dataclass
class TokenBatch:
    """One micro-batch of token rows, in one of two layouts.

    *Padded*: rows (B, T), padded on the right; ``document_offsets`` is None. A causal model never lets a real token
    see right padding, so there is no attention mask: positions count on through the padding, labels there are ignored.

    *Packed*: one row (1, N) without padding that holds D documents one after another. ``document_offsets`` (D + 1,)
    int32 are the cumulative lengths (``cu_seqlens``): document d is ``[offsets[d], offsets[d + 1])``. Positions restart
    at 0 in each document, and no document may see another.

    Attributes:
        input_ids: (B, T) int64.
        labels: (B, T) int64, *not* shifted: ``labels[b, t]`` is ``input_ids[b, t]`` where that token is to be
            predicted, ``IGNORE_INDEX`` elsewhere. ``logprobs.next_token_targets`` shifts.
        position_ids: (B, T) int64.
        document_offsets: (D + 1,) int32, or None for the padded layout.
        max_document: upper bound of a document's length in tokens (a constant of the run, so that compiled code does
            not see a new value with each batch).
        rows: the rows of the dataset that this micro-batch was made of, so that a bad batch can be named.
        window: name of a count -> its sum over this rank's micro-batches of the accumulation window that the batch
            belongs to (set by the loader, which looks one window ahead). Empty in validation.
        padding: number of padding positions in ``input_ids``.
        lengths: (B,) int64 positions of each row before its padding; None: there is none.
        micro_step: place of this micro-batch in its accumulation window, from 0.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    document_offsets: Tensor | None = None
    max_document: int = 0
    rows: list[int] = field(default_factory=list)
    window: dict[str, float] = field(default_factory=dict)
    micro_step: int = 0
    padding: int = 0
    lengths: Tensor | None = None

    def counts(self) -> dict[str, float]:
        """The denominators that this micro-batch contributes: ``tokens`` are trained targets, ``positions`` all but
        padding."""
        from llm_modules.logprobs import next_token_targets

        tokens = (next_token_targets(self.labels, self.position_ids) != IGNORE_INDEX).sum()
        return {"tokens": float(tokens), "positions": float(self.tokens()[1])}

    def answer_of(self, index: Tensor) -> Tensor:
        """(M,) the document, or padded row, that each place of the flattened batch belongs to."""
        if self.document_offsets is None:
            return index // self.input_ids.shape[1]
        return torch.bucketize(index, self.document_offsets[1:].to(index.dtype), right=True)

    def look_ahead(self, window: Sequence[Any]) -> None:
        """Takes what the first micro-batch of a window must know of all of them (set by the loader); here nothing."""

    def tokens(self) -> tuple[int, int]:
        """(positions computed, positions that are not padding)."""
        computed = self.input_ids.numel()
        return computed, computed - self.padding

    def pin_memory(self) -> Self:
        return self.apply(Tensor.pin_memory)

    def apply(self, function: Any) -> Self:
        """A copy in which ``function`` was applied to every tensor."""
        changed = {f.name: function(value) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **changed)


@dataclass
class PreferenceBatch(TokenBatch):
    """One micro-batch of pairs of answers: documents (or padded rows) 2i and 2i + 1 are a prompt with its chosen answer
    and the same prompt with its rejected one; the labels are those of the answers.

    *Shared prompts* (packed only): documents 3i, 3i + 1 and 3i + 2 are what both begin with, less its last token, and
    the rest of the one and of the other, whose positions count on and which see the first one, too. So a prompt is
    computed once. (The last token of the prompt is in both, because each answer's first is predicted there.)

    Attributes:
        pairs: P, how many there are; ``rows`` has one for each.
        shared_keys: (K,) int64 the positions that the documents see, those of one after another, its own last; None:
            each document sees itself.
        key_offsets: (D + 1,) int32 cumulative lengths of the documents' parts of ``shared_keys``.
        values: (P, 3) float32 by how much the chosen answer is better, and whether it and the other are safe (1 or 0);
            NaN where the data do not say. None: of no pair.
    """

    pairs: int = 0
    shared_keys: Tensor | None = None
    key_offsets: Tensor | None = None
    values: Tensor | None = None

    @property
    def last(self) -> Tensor:
        """(2P,) int64 places, in the flattened batch, of the answers' last tokens."""
        if self.document_offsets is not None:
            ends = self.document_offsets[1:].long() - 1
            return ends if self.shared_keys is None else ends.view(-1, 3)[:, 1:].flatten()
        width = self.input_ids.shape[1]
        starts = torch.arange(len(self.input_ids), device=self.input_ids.device) * width
        return starts + (width if self.lengths is None else self.lengths.clamp(min=1)) - 1

    def answer_of(self, index: Tensor) -> Tensor:
        """(M,) the answer, of 2P, that each labelled place of the flattened batch belongs to."""
        document = super().answer_of(index)
        return document if self.shared_keys is None else document // 3 * 2 + document % 3 - 1

    def apart(self) -> PreferenceBatch:
        """The same pairs without shared prompts: the keys of an answer's document are its whole conversation."""
        if self.shared_keys is None or self.key_offsets is None:
            return self
        lengths = self.key_offsets.diff()
        lengths[::3] = 0
        place = torch.arange(len(self.shared_keys), device=lengths.device)
        document = torch.bucketize(place, self.key_offsets[1:].to(place.dtype), right=True)
        keys = self.shared_keys[document % 3 > 0]
        offsets = torch.cat([lengths.new_zeros(1), lengths.view(-1, 3)[:, 1:].flatten().cumsum(0).to(lengths.dtype)])
        taken = {name: getattr(self, name)[:, keys] for name in ("input_ids", "labels", "position_ids")}
        return replace(self, **taken, document_offsets=offsets, shared_keys=None, key_offsets=None)

    def counts(self) -> dict[str, float]:
        from llm_modules.logprobs import next_token_targets

        targets = next_token_targets(self.labels, self.position_ids).flatten()
        places = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
        chosen = float((self.answer_of(places) % 2 == 0).sum())
        return super().counts() | {"pairs": float(self.pairs), "tokens_chosen": chosen}


@dataclass
class TaughtBatch(TokenBatch):
    """One micro-batch of a student whose teacher reads something else before the same answers.

    Attributes:
        teacher: what the teacher reads: the same documents (or rows) in the same order, with as many labels, which are
            the same tokens.
    """

    teacher: TokenBatch | None = None

    def apply(self, function: Any) -> TaughtBatch:
        assert self.teacher is not None
        return TaughtBatch(**vars(super().apply(function)) | {"teacher": self.teacher.apply(function)})


@dataclass
class LabelledBatch(TokenBatch):
    """One micro-batch of answers that were judged each by itself: every document (or padded row) is a prompt with its
    answer; the labels are those of the answer. ``rows`` has one for each.

    Attributes:
        desirable: (A,) bool what was judged.
        mismatched: the same prompts, each with the answer of the row before its own in the accumulation window (of all
            ranks; the first row's is the last one's): so what is paired does not depend on how the window is cut. The
            loader gives a window's first micro-batch those of all of them; without a loader each has its own.
    """

    desirable: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.bool))
    mismatched: list[TokenBatch] = field(default_factory=list)

    @property
    def answers(self) -> int:
        return len(self.desirable)

    def look_ahead(self, window: Sequence[LabelledBatch]) -> None:
        mismatched = [part for batch in window for part in batch.mismatched]
        for batch in window:
            batch.mismatched = mismatched if batch is self else []

    def counts(self) -> dict[str, float]:
        desirable = float(self.desirable.sum())
        own = {"answers": float(self.answers), "desirable": desirable, "undesirable": self.answers - desirable}
        return super().counts() | own


class CountedBatch(Protocol):
    """What the windowed loader needs of a batch, whatever its step shape."""

    window: dict[str, float]
    micro_step: int

    def counts(self) -> Mapping[str, float]: ...

    def look_ahead(self, window: Sequence[Any]) -> None: ...


class TokenScores(NamedTuple):
    """What a language model says of M target tokens; all in fp32. Only trained positions are computed.

    A tuple, because FSDP and DeepSpeed look for the tensors in what a module returns: their work before its backward
    pass hangs on them.

    Attributes:
        logprobs: (M,) log p(target | what came before).
        index: (M,) int64 places of the targets' *predicting* positions in the flattened (B * T) batch.
        log_normalizer: (M,) logsumexp of the logits (for z-loss), if asked for.
        mean_logprob: (M,) mean over the vocabulary of log p (for label smoothing), if asked for.
        entropy: (M,) of the distributions, in nats, without a gradient, if asked for.
        router_load: (layers, experts) tokens that visited each expert, without a gradient; in training, of a mixture of
            experts whose routers are trained.
        router_probability: (experts,) the routers' probabilities, summed over positions and layers; likewise.
    """

    logprobs: Tensor
    index: Tensor  # type: ignore[assignment]  # no tuple is asked for the place of a value here
    log_normalizer: Tensor | None = None
    mean_logprob: Tensor | None = None
    router_load: Tensor | None = None
    router_probability: Tensor | None = None
    entropy: Tensor | None = None


class Teaching(NamedTuple):
    """What a teacher has to say of M target tokens, before its head; no tensor here has a graph.

    Attributes:
        hidden: (M, H) its final hidden states at the predicting positions.
        logits: from (C, H) of them to (C, V) fp32 logits; called inside the student's forward pass, where weights that
            the two share are whole.
        compare: from (C, V) log-probabilities of the student and of the teacher to (C,), which is differentiated.
    """

    hidden: Tensor
    logits: Callable[[Tensor], Tensor]
    compare: Callable[[Tensor, Tensor], Tensor]


class TaughtScores(NamedTuple):
    """What a student and its teacher say of M target tokens; all (M,) fp32.

    Attributes:
        logprobs: log p(target) of the student.
        teacher_logprobs: that of the teacher.
        divergence: what ``Teaching.compare`` makes of their distributions over the vocabulary.
        kl: KL(teacher || student), without a graph.
    """

    logprobs: Tensor
    teacher_logprobs: Tensor
    divergence: Tensor
    kl: Tensor


class PairScores(NamedTuple):
    """What a model, and a reference, say of the answers of P pairs; log-probabilities in fp64, summed over tokens.

    Attributes:
        chosen, rejected: (P,) log p(answer | prompt).
        chosen_tokens, rejected_tokens: (P,) tokens of the answers.
        reference_chosen, reference_rejected: (P,) the reference's, without a graph; None: there is none.
        entropy: () of the model's distributions, in nats, summed over all answers' tokens; None: not asked for.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    entropy: Tensor | None = None


class LabelledScores(NamedTuple):
    """What a model and a reference say of A answers; in fp64, summed over tokens.

    Attributes:
        logprobs, reference: (A,) log p(answer | prompt), the reference's without a graph.
        tokens: (A,) tokens of the answers.
        desirable: (A,) bool.
        entropy: as of ``PairScores``.
    """

    logprobs: Tensor
    reference: Tensor
    tokens: Tensor
    desirable: Tensor
    entropy: Tensor | None = None


class RewardScores(NamedTuple):
    """The scores of P pairs of answers.

    Attributes:
        chosen, rejected: (P,) fp32 scores.
        values: (P, 3) as of ``PreferenceBatch``.
    """

    chosen: Tensor
    rejected: Tensor
    values: Tensor


@dataclass
class Term:
    """One additive part of a loss: its gradient is that of ``weight * sum / (count over the whole window)``.

    Attributes:
        sum: () the sum over this micro-batch, with its graph.
        count: the name of the denominator, a key of the batch's ``counts()`` (tokens, pairs, answers, ...).
        weight: the coefficient of the term in the total.
    """

    sum: Tensor
    count: str
    weight: float = 1.0


@dataclass
class ObjectiveOutput:
    """Named terms (summed into the total) and detached sums that are only logged.

    Attributes:
        terms: name -> Term.
        metrics: name -> (sum, count name); logged as sum / count over the window and all ranks.
    """

    terms: dict[str, Term]
    metrics: dict[str, tuple[Tensor, str]] = field(default_factory=dict)
