"""Which documents are trained, which are held out, and how often a source's documents come in an epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from llm_modules.data.packing import Indices


def held_out(groups: NDArray[np.uint64], fraction: float, seed: int) -> NDArray[np.bool_]:
    """Which documents are held out for validation, by group: two of one group always fall on one side.

    A document's side depends on nothing but its group and the seed, so it stays where it is when the data grow.

    Args:
        groups: (D,) digest of each document's content, or of the part that it shares with the others of its group.
        fraction: about how many of the groups; at least one is held out where there are two.
        seed: another one chooses others.

    Raises:
        ValueError: there is only one document.
    """
    if fraction <= 0:
        return np.zeros(len(groups), dtype=np.bool_)
    draws = _mixed(groups, seed)
    different = np.unique(draws)
    if len(different) < 2:
        raise ValueError(
            f"data.validation_fraction: {fraction} of {len(groups)} document cannot be held out (the split is by whole "
            "documents); give validation_sources, a document_separator, or a validation_fraction of 0"
        )
    bound = np.uint64(min(fraction, 1.0) * float(2**64 - 2**12))
    # At least one on each side.
    return draws < np.clip(bound, different[1], different[-1])


def _mixed(hashes: NDArray[np.uint64], seed: int) -> NDArray[np.uint64]:
    """The hashes, reshuffled by the seed (splitmix64's finalizer)."""
    with np.errstate(over="ignore"):
        x = hashes.astype(np.uint64) + np.uint64((seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15) % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def draw_documents(count: int, weight: float, epoch: int, key: Sequence[int]) -> Indices:
    """The documents of a source in an epoch, in no particular order: ``weight`` times each, on the average.

    The source's documents follow one another in cycles, each a permutation of all of them; an epoch takes the next
    ``weight * count``. So half of the documents come with weight 0.5, and the other half in the next epoch.

    Args:
        count: documents in the source.
        key: what the permutations are seeded by.
    """
    # In thousandths of a millionth, so that 10 epochs of weight 0.1 are exactly one cycle.
    share = round(weight * 1e9)
    first, last = (epoch * share * count // 10**9, (epoch + 1) * share * count // 10**9)
    parts = []
    for cycle in range(first // count, -(-last // count)):
        begin, end = max(first - cycle * count, 0), min(last - cycle * count, count)
        if (begin, end) == (0, count):
            parts.append(np.arange(count))
        else:
            parts.append(np.random.default_rng([*key, cycle]).permutation(count)[begin:end])
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
