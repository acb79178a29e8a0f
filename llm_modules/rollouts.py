"""Floor 0: what a policy said in an iteration of reinforcement learning, and the micro-batches that learn from it.

Shape legend: P prompts, A answers, T answer tokens (of all answers, one after another), C critics, R rewards.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from llm_modules.batch import IGNORE_INDEX, TokenBatch


@dataclass
class PromptBatch:
    """The prompts of one iteration, the same on every rank; the loader gives it once for each micro-batch that learns
    from their answers.

    Attributes:
        prompts: (P) token ids of each, int64, on the host.
        records: (P) of each, ``prompt`` (messages), ``reference``, ``fields`` (the row's columns).
        rows: (P) the rows of the dataset.
        update: place of the optimizer step among those that learn from the same answers, from 0.
        window, micro_step: as of ``TokenBatch``.
        work: positions computed and those that were not padding, once the module has made its batch of it.
    """

    prompts: list[Any]
    records: list[dict[str, Any]]
    rows: list[int]
    update: int = 0
    window: dict[str, float] = field(default_factory=dict)
    micro_step: int = 0
    work: tuple[int, int] = (0, 0)

    def counts(self) -> dict[str, float]:
        return {"prompts": float(len(self.prompts))}

    def tokens(self) -> tuple[int, int]:
        return self.work

    def look_ahead(self, window: Sequence[Any]) -> None:
        """Nothing depends on the others."""


@dataclass
class Rollouts:
    """The answers of one iteration, the same on every rank; those to a prompt are neighbours. All on the host.

    Attributes:
        prompts: (P) token ids.
        rows: (P,) int64 the prompts' rows of the dataset.
        prompt_of: (A,) int64, ascending.
        answer_ids: (T,) int64.
        offsets: (A + 1,) int64, where each answer begins.
        finished: (A,) bool, ended by itself.
        rewards: (A, R) fp64, of each reward, without its weight.
        reward: (A,) fp64, the weighted sum.
        cost: (A,) fp64, the weighted sum of the costs; None: there are none.
        sampled_logprobs: (T,) fp32, as they were when the token was drawn.
        old_logprobs: (T,) fp32, of the policy that said it, as training computes them.
        reference_logprobs: (T,) fp32; None: there is no reference.
        values: (T, C) fp32, what the critics expected before each token; None: there are none.
        advantages: (T,) fp32.
        returns: (T, C) fp32, what the critics are to expect; None: there are none.
    """

    prompts: list[Tensor]
    rows: Tensor
    prompt_of: Tensor
    answer_ids: Tensor
    offsets: Tensor
    finished: Tensor
    rewards: Tensor
    reward: Tensor
    sampled_logprobs: Tensor
    cost: Tensor | None = None
    old_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None
    advantages: Tensor | None = None
    returns: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompt_of)

    @property
    def lengths(self) -> Tensor:
        """(A,) tokens of each answer."""
        return self.offsets.diff()

    @property
    def answer_of(self) -> Tensor:
        """(T,) the answer that each token belongs to."""
        return torch.repeat_interleave(torch.arange(len(self)), self.lengths)

    @property
    def last(self) -> Tensor:
        """(A,) places of the answers' last tokens."""
        return self.offsets[1:] - 1

    def tokens_of(self, answers: Tensor) -> Tensor:
        """Places of the tokens of some answers, in their order."""
        if not len(answers):
            return torch.zeros(0, dtype=torch.int64)
        return torch.cat([torch.arange(*self.offsets[a : a + 2].tolist()) for a in answers.tolist()])

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {item.name: getattr(self, item.name) for item in fields(self)}


@dataclass
class PolicyBatch(TokenBatch):
    """One micro-batch of prompts with answers, packed (a prompt once before its answers, as of ``PreferenceBatch``, or
    with each of them) or padded; the labels are the answers.

    Attributes:
        answers: how many there are.
        prompt_of: (answers,) int64, which prompt of the iteration each answers.
        shared_keys, key_offsets: as of ``PreferenceBatch``.
        answer_index: (M,) int64 the answer that each label belongs to.
        advantages, old_logprobs: (M,) of each label.
        sampled_logprobs: (M,) as they were when the token was drawn.
        reference_logprobs: (M,); None: there is no reference.
        values, returns: (M, C); None: there are no critics.
    """

    answers: int = 0
    prompt_of: Tensor | None = None
    shared_keys: Tensor | None = None
    key_offsets: Tensor | None = None
    answer_index: Tensor | None = None
    advantages: Tensor | None = None
    old_logprobs: Tensor | None = None
    sampled_logprobs: Tensor | None = None
    reference_logprobs: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    def counts(self) -> dict[str, float]:
        groups = 0 if self.prompt_of is None else len(self.prompt_of.unique())
        return super().counts() | {"answers": float(self.answers), "groups": float(groups)}


LAYOUTS = ("shared", "packed", "padded")


def policy_batch(rollouts: Rollouts, answers: Tensor, layout: str, max_document: int) -> PolicyBatch:
    """The micro-batch of some answers.

    Args:
        answers: their numbers; those to a prompt are neighbours.
        layout: ``shared``: packed, a prompt once before its neighbouring answers; ``packed``; ``padded``.
        max_document: upper bound of a prompt with an answer in tokens.
    """
    assert layout in LAYOUTS
    numbers = answers.tolist()
    documents = [
        (int(rollouts.prompt_of[a]), rollouts.answer_ids[slice(*rollouts.offsets[a : a + 2])]) for a in numbers
    ]
    if not documents:
        batch = _nothing(layout, max_document)
    elif layout == "shared":
        batch = _shared(rollouts, documents, max_document)
    else:
        batch = _apart(rollouts, documents, layout, max_document)
    tokens, sizes = rollouts.tokens_of(answers), rollouts.lengths[answers]
    taken = ("advantages", "old_logprobs", "sampled_logprobs", "reference_logprobs", "values", "returns")
    for name in taken:
        if (values := getattr(rollouts, name)) is not None:
            setattr(batch, name, values[tokens])
    batch.answers, batch.prompt_of = len(numbers), rollouts.prompt_of[answers]
    batch.answer_index = torch.repeat_interleave(torch.arange(len(numbers)), sizes)
    batch.rows = rollouts.rows[batch.prompt_of].tolist()
    return batch


def _nothing(layout: str, max_document: int) -> PolicyBatch:
    """A row that says nothing, for a rank that has no answers."""
    ids = torch.zeros(1, 2, dtype=torch.int64)
    offsets = None if layout == "padded" else torch.tensor([0, 2], dtype=torch.int32)
    labels = torch.full_like(ids, IGNORE_INDEX)
    lengths = torch.zeros(1, dtype=torch.int64)
    positions = torch.arange(2)[None]
    return PolicyBatch(ids, labels, positions, offsets, max_document, padding=2, lengths=lengths)


def _apart(rollouts: Rollouts, documents: Sequence[tuple[int, Tensor]], layout: str, longest: int) -> PolicyBatch:
    ids = [torch.cat([rollouts.prompts[prompt], answer]) for prompt, answer in documents]
    labels = [
        torch.cat([torch.full_like(rollouts.prompts[prompt], IGNORE_INDEX), answer]) for prompt, answer in documents
    ]
    places = [torch.arange(len(document)) for document in ids]
    lengths = torch.tensor([len(document) for document in ids])
    if layout == "packed":
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).int()
        return PolicyBatch(torch.cat(ids)[None], torch.cat(labels)[None], torch.cat(places)[None], offsets, longest)
    pad = torch.nn.utils.rnn.pad_sequence
    padded = pad(ids, batch_first=True)
    positions = torch.arange(padded.shape[1]).expand(len(ids), -1).contiguous()
    return PolicyBatch(
        padded,
        pad(labels, batch_first=True, padding_value=IGNORE_INDEX),
        positions,
        padding=padded.numel() - int(lengths.sum()),
        lengths=lengths,
    )


def _shared(rollouts: Rollouts, documents: Sequence[tuple[int, Tensor]], longest: int) -> PolicyBatch:
    """A prompt without its last token is a document, which the documents of its answers, that token first, see."""
    ids: list[Tensor] = []
    labels: list[Tensor] = []
    places: list[Tensor] = []
    keys: list[Tensor] = []
    end, before, shared = 0, -1, torch.zeros(0, dtype=torch.int64)

    def add(tokens: Tensor, targets: Tensor, first: int, also: Tensor) -> Tensor:
        nonlocal end
        own = torch.arange(end, end + len(tokens))
        ids.append(tokens)
        labels.append(targets)
        places.append(torch.arange(first, first + len(tokens)))
        keys.append(torch.cat([also, own]))
        end += len(tokens)
        return own

    for prompt, answer in documents:
        tokens = rollouts.prompts[prompt]
        if prompt != before:
            unseen = torch.full_like(tokens[:-1], IGNORE_INDEX)
            shared, before = add(tokens[:-1], unseen, 0, shared[:0]), prompt
        targets = torch.cat([torch.full_like(tokens[-1:], IGNORE_INDEX), answer])
        add(torch.cat([tokens[-1:], answer]), targets, len(tokens) - 1, shared)

    def ends(parts: list[Tensor]) -> Tensor:
        return torch.tensor([0, *map(len, parts)]).cumsum(0).int()

    rows, targets, positions = (torch.cat(parts)[None] for parts in (ids, labels, places))
    return PolicyBatch(
        rows, targets, positions, ends(ids), longest, shared_keys=torch.cat(keys), key_offsets=ends(keys)
    )
