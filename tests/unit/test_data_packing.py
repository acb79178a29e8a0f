"""Rows of an epoch: every token where it belongs, in an order that depends on nothing but the seed."""

from __future__ import annotations

import time

import numpy as np
import pytest

from llm_modules.data.packing import best_fit_decreasing, grouped_by_length, plan_epoch, split_documents
from llm_modules.data.splitting import draw_documents, held_out


def corpus(seed: int = 0, count: int = 200, longest: int = 100):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, longest, count)
    return np.arange(count), np.cumsum(lengths) - lengths, lengths


def targets(segments: np.ndarray) -> list[int]:
    """Token places that are predicted: all but the first of each segment."""
    return [place for _, start, stop in segments.tolist() for place in range(start + 1, stop)]


def plain_best_fit(lengths: list[int], capacity: int) -> list[int]:
    """The same by hand: look at every bin."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    free: list[int] = []
    bins = [0] * len(lengths)
    for i in order:
        fitting = [b for b in range(len(free)) if free[b] >= lengths[i]]
        if fitting:
            chosen = min(fitting, key=lambda b: free[b])
        else:
            chosen = len(free)
            free.append(capacity)
        free[chosen] -= lengths[i]
        bins[i] = chosen
    return bins


@pytest.mark.parametrize("capacity", [7, 64, 1000])
def test_best_fit_decreasing_equals_looking_at_every_bin(capacity):
    random = np.random.default_rng(capacity)
    for _ in range(30):
        lengths = random.integers(1, capacity + 1, random.integers(1, 60)).tolist()
        bins = best_fit_decreasing(lengths, capacity)
        totals = np.bincount(bins, weights=lengths)
        expected = np.bincount(plain_best_fit(lengths, capacity), weights=lengths)
        # Which of several equally full bins is taken may differ, how full the bins are in the end must not.
        assert sorted(totals) == sorted(expected)
        assert totals.max() <= capacity


def test_best_fit_equals_trl():
    trl = pytest.importorskip("trl.data_utils")
    datasets = pytest.importorskip("datasets")
    random = np.random.default_rng(3)
    lengths = random.integers(1, 65, 500).tolist()
    rows = datasets.Dataset.from_dict({"input_ids": [[i] * length for i, length in enumerate(lengths)]})
    packed = trl.pack_dataset(rows, 64, strategy="bfd")
    theirs = sorted(len(row["input_ids"]) for row in packed)
    assert sorted(np.bincount(best_fit_decreasing(lengths, 64), weights=lengths).astype(int)) == theirs


def test_splitting_loses_no_target():
    documents, starts, lengths = corpus(longest=300)
    examples = split_documents(documents, starts, lengths, 32)
    assert (examples.lengths <= 32).all()
    assert (examples.lengths >= 2).all()
    pieces = np.stack([examples.document, examples.start, examples.stop], axis=1)
    expected = [
        place for start, length in zip(starts, lengths, strict=True) for place in range(start + 1, start + length)
    ]
    assert targets(pieces) == expected
    exact = split_documents(np.array([5]), np.array([10]), np.array([32]), 32)
    assert (exact.start.tolist(), exact.stop.tolist()) == ([10], [42])


@pytest.mark.parametrize("packing", ["documents", "batch", "none"])
def test_every_target_once_in_an_epoch(packing):
    documents, starts, lengths = corpus()
    examples = split_documents(documents, starts, lengths, 40)
    plan = plan_epoch(examples, packing, 40, np.random.default_rng(1), length_group=4)
    assert plan.lengths().max() <= 40
    expected = [
        place for start, length in zip(starts, lengths, strict=True) for place in range(start + 1, start + length)
    ]
    found = [place for i in range(len(plan)) for place in targets(plan.row(i))]
    assert sorted(found) == expected
    assert found != expected


@pytest.mark.parametrize("keep_rest", [False, True])
def test_chunks_are_one_stream(keep_rest):
    from llm_modules.data.packing import Examples

    documents, starts, lengths = corpus()
    examples = Examples(documents, starts, starts + lengths)
    plan = plan_epoch(examples, "chunks", 64, np.random.default_rng(1), keep_rest=keep_rest)
    total = int(lengths.sum())
    sizes = plan.lengths().tolist()
    if keep_rest:
        assert sorted(sizes, reverse=True) == [64] * (total // 64) + [total % 64]
        assert plan.dropped == 0
    else:
        assert sizes == [64] * (total // 64)
        assert plan.dropped == total % 64
    places = [place for _, start, stop in plan.segments.tolist() for place in range(start, stop)]
    assert len(set(places)) == len(places) == total - plan.dropped
    # Every cut belongs to the document that it says.
    for document, start, stop in plan.segments.tolist():
        assert starts[document] <= start < stop <= starts[document] + lengths[document]
    assert len({tuple(plan.row(i)[0]) for i in range(len(plan))}) == len(plan)


@pytest.mark.parametrize("packing", ["documents", "chunks", "batch", "none"])
def test_a_plan_is_a_pure_function_of_its_seed(packing):
    documents, starts, lengths = corpus()
    examples = split_documents(documents, starts, lengths, 128)
    plans = [plan_epoch(examples, packing, 128, np.random.default_rng([7, epoch])) for epoch in (0, 0, 1)]
    assert np.array_equal(plans[0].segments, plans[1].segments)
    assert not np.array_equal(plans[0].segments, plans[2].segments)
    # The number of rows is that of every epoch, so that an epoch's length is known ahead.
    assert len(plans[0]) == len(plans[2])


def test_packed_rows_change_their_company():
    documents, starts, _ = corpus()
    lengths = np.full(200, 20)
    examples = split_documents(documents, starts, lengths, 100)
    rows = []
    for epoch in range(2):
        plan = plan_epoch(examples, "documents", 100, np.random.default_rng([7, epoch]))
        rows.append({frozenset(plan.row(i)[:, 0].tolist()) for i in range(len(plan))})
    assert len(rows[0] & rows[1]) < len(rows[0]) / 2


def test_grouping_keeps_similar_lengths_together():
    lengths = np.random.default_rng(0).integers(1, 1000, 1003)
    order = grouped_by_length(lengths, 8, np.random.default_rng(1))
    assert sorted(order) == list(range(1003))
    padded = sum(8 * lengths[order[i : i + 8]].max() for i in range(0, 1000, 8))
    plain = sum(8 * lengths[i : i + 8].max() for i in range(0, 1000, 8))
    assert padded < 1.06 * lengths.sum() < 1.5 * lengths.sum() < plain
    assert abs(np.corrcoef(np.arange(1003), lengths[order])[0, 1]) < 0.2


def test_a_million_documents_are_packed_in_seconds():
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(5.5, 1, 1_000_000).astype(int) + 2, 2048)
    begin = time.process_time()
    plan = plan_epoch(
        split_documents(np.arange(len(lengths)), np.cumsum(lengths) - lengths, lengths, 2048),
        "documents",
        2048,
        random,
    )
    assert time.process_time() - begin < 20
    assert lengths.sum() / (len(plan) * 2048) > 0.999


def joined(lists: list[list[int]]) -> list[int]:
    return [item for one in lists for item in one]


def test_weights_deal_documents_out_evenly():
    def epochs(weight: float, count: int) -> list[list[int]]:
        return [sorted(draw_documents(10, weight, epoch, [3, 0]).tolist()) for epoch in range(count)]

    assert epochs(1.0, 2) == [list(range(10))] * 2
    assert epochs(2.0, 1) == [sorted([*range(10), *range(10)])]
    first, second, third = epochs(0.5, 3)
    assert (len(first), len(second)) == (5, 5)
    assert sorted(first + second) == list(range(10))
    assert third != first or epochs(0.5, 5)[4] != first
    tenths = epochs(0.1, 10)
    assert sorted(joined(tenths)) == list(range(10))
    assert [len(epoch) for epoch in epochs(0.25, 4)] == [2, 3, 2, 3]
    assert sorted(joined(epochs(0.25, 4))) == list(range(10))
    one_and_a_half = epochs(1.5, 2)
    assert sorted(joined(one_and_a_half)) == sorted([*range(10)] * 3)


def test_the_split_is_by_content():
    hashes = np.random.default_rng(0).integers(0, 2**63, 1000).astype(np.uint64)
    twice = np.concatenate([hashes, hashes])
    chosen = held_out(twice, 0.1, seed=1)
    assert np.array_equal(chosen[:1000], chosen[1000:])
    assert 60 < chosen[:1000].sum() < 140
    assert not np.array_equal(chosen, held_out(twice, 0.1, seed=2))
    # A document stays on its side when others join.
    more = np.concatenate([hashes, np.arange(500, dtype=np.uint64)])
    assert np.array_equal(held_out(more, 0.1, seed=1)[:1000], chosen[:1000])
    for fraction in (1e-9, 0.999999):
        few = held_out(hashes[:5], fraction, seed=1)
        assert 1 <= few.sum() <= 4
    assert not held_out(hashes[:1], 0.0, 1).any()
    with pytest.raises(ValueError, match="cannot be held out"):
        held_out(np.concatenate([hashes[:1]] * 3), 0.1, 1)
