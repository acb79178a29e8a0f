"""Which tokens make up which row of an epoch: a pure function of (seed, epoch, lengths), not of batches or ranks.

Legend: E examples (documents, or pieces of long ones), R rows, S segments (parts of examples) in all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Packing = Literal["documents", "chunks", "batch", "none"]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Examples:
    """What an epoch is put together from: token ranges, none longer than a row.

    Attributes:
        document: (E,) number of the document that an example is (a part of), ascending.
        start, stop: (E,) the range in the concatenation of all documents' tokens.
    """

    document: Indices
    start: Indices
    stop: Indices

    def __len__(self) -> int:
        return len(self.start)

    @property
    def lengths(self) -> Indices:
        return self.stop - self.start


@dataclass(frozen=True)
class EpochPlan:
    """The rows of one epoch, in the order in which they are trained.

    Attributes:
        segments: (S, 3) of (document, start, stop).
        offsets: (R + 1,) row r is ``segments[offsets[r]:offsets[r + 1]]``.
        dropped: tokens that did not fill a row and are left out of this epoch.
    """

    segments: Indices
    offsets: Indices
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def row(self, index: int) -> Indices:
        """(s, 3) the segments of a row."""
        return self.segments[self.offsets[index] : self.offsets[index + 1]]

    def lengths(self) -> Indices:
        """(R,) tokens in each row."""
        totals = np.concatenate([[0], np.cumsum(self.segments[:, 2] - self.segments[:, 1])])
        return totals[self.offsets[1:]] - totals[self.offsets[:-1]]


def split_documents(documents: Indices, starts: Indices, lengths: Indices, size: int) -> Examples:
    """Documents as examples of at most ``size`` tokens.

    The pieces of a longer document share one token with the piece before: a row's first token is never predicted, so
    without the overlap that token would not be trained (or scored) at all.
    """
    pieces = np.maximum(1, -(-(lengths - 1) // (size - 1)))
    owner = np.repeat(np.arange(len(documents)), pieces)
    number = np.arange(len(owner)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    start = starts[owner] + number * (size - 1)
    stop = np.minimum(start + size, (starts + lengths)[owner])
    return Examples(documents[owner], start, stop)


def plan_epoch(
    examples: Examples,
    packing: Packing,
    size: int,
    random: np.random.Generator,
    length_group: int = 0,
    keep_rest: bool = False,
) -> EpochPlan:
    """The rows of an epoch in a random order.

    Args:
        examples: what the epoch is made of.
        packing: `documents`: best fit of whole examples into rows of ``size`` tokens; `chunks`: the examples in a
            random order one after another, cut into rows of exactly ``size``; `batch` and `none`: an example a row.
        size: tokens in a row at most.
        random: the source of the order; all that it is seeded by is the plan's own.
        length_group: for `none`: that many rows of similar length are put next to one another (0: not).
        keep_rest: for `chunks`: the tokens that do not fill a row make a shorter one (else they are left out).
    """
    order = random.permutation(len(examples))
    segments = np.stack([examples.document, examples.start, examples.stop], axis=1)[order]
    if packing == "chunks":
        segments, offsets, dropped = _chunks(segments, size, keep_rest)
        return shuffled(EpochPlan(segments, offsets, dropped), random.permutation(len(offsets) - 1))
    if packing == "documents":
        # The permutation above decides which of several equally long examples comes first, so the rows' company
        # changes from epoch to epoch, while their number (which depends on the lengths alone) does not.
        row = best_fit_decreasing((segments[:, 2] - segments[:, 1]).tolist(), size)
        by_row = np.argsort(row, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(row))]) if len(row) else np.zeros(1, dtype=np.int64)
        return shuffled(EpochPlan(segments[by_row], offsets), random.permutation(len(offsets) - 1))
    plan = EpochPlan(segments, np.arange(len(examples) + 1))
    if packing == "none" and length_group > 1:
        return shuffled(plan, grouped_by_length(plan.lengths(), length_group, random))
    return plan


def shuffled(plan: EpochPlan, order: Indices) -> EpochPlan:
    """The rows in another order."""
    sizes = np.diff(plan.offsets)[order]
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    first = np.repeat(plan.offsets[:-1][order] - offsets[:-1], sizes)
    return EpochPlan(plan.segments[first + np.arange(len(first))], offsets, plan.dropped)


def grouped_by_length(lengths: Indices, group: int, random: np.random.Generator) -> Indices:
    """An order of rows in which stretches of ``group`` rows have similar lengths, and the stretches come at random.

    Rows are compared inside pools of 32 groups only, so that the order stays close to a random one. It does not depend
    on the batch size: a run can be continued with another.
    """
    pool = 32 * group
    order = np.arange(len(lengths))
    by_length = np.concatenate(
        [part[np.argsort(lengths[part], kind="stable")] for part in np.split(order, range(pool, len(order), pool))]
    )
    groups = np.split(by_length, range(group, len(order), group))
    # A short last group stays the last, so that the others remain on multiples of the group's size.
    last = [groups.pop()] if len(order) % group else []
    return np.concatenate([*(groups[i] for i in random.permutation(len(groups))), *last])


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> Indices:
    """The bin of each item: the longest item first, into the fullest bin that still has room for it.

    The free spaces for which there is a bin are bits of one integer, so that finding the tightest one is two
    operations (Johnson 1973: at most 11/9 of the fewest bins possible).

    Args:
        lengths: (E,) sizes, each from 1 to ``capacity``.
        capacity: room in a bin.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    bins = np.empty(len(sizes), dtype=np.int64)
    if not len(sizes):
        return bins
    assert sizes.min() > 0
    assert sizes.max() <= capacity
    order = np.argsort(-sizes, kind="stable")
    with_space: dict[int, list[int]] = {}
    spaces = 0
    count = 0
    chosen = []
    for size in sizes[order].tolist():
        fitting = spaces >> size
        if fitting:
            space = (fitting & -fitting).bit_length() - 1 + size
            stack = with_space[space]
            bin_ = stack.pop()
            if not stack:
                spaces ^= 1 << space
        else:
            space, bin_ = capacity, count
            count += 1
        space -= size
        if space:
            with_space.setdefault(space, []).append(bin_)
            spaces |= 1 << space
        chosen.append(bin_)
    bins[order] = chosen
    return bins


def _chunks(segments: Indices, size: int, keep_rest: bool) -> tuple[Indices, Indices, int]:
    """Segments one after another, cut at every multiple of ``size``."""
    lengths = segments[:, 2] - segments[:, 1]
    begins = np.cumsum(lengths) - lengths
    total = int(lengths.sum())
    # A rest of one token has nothing to predict.
    used = total if keep_rest and total % size != 1 else total - total % size
    rows = -(-used // size)
    # A segment begins where an example does or a row does.
    places = np.union1d(begins, np.arange(rows) * size)
    places = places[places < used]
    stops = np.append(places[1:], used)[: len(places)]
    owner = np.searchsorted(begins, places, side="right") - 1
    shift = segments[owner, 1] - begins[owner]
    cut = np.stack([segments[owner, 0], places + shift, stops + shift], axis=1)
    offsets = np.searchsorted(places, np.append(np.arange(rows) * size, used))
    return cut, offsets.astype(np.int64), total - used
