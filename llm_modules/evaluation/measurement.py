"""What an evaluation says: named numbers, each with the interval that its sample leaves open."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

Z = 1.959964
"""Standard errors either side of a 95 % interval."""


class Measurement(NamedTuple):
    """One number of a table.

    Attributes:
        name: what was measured, as ``attack_success``; of a part of it, ``attack_success/fraud``.
        value: in its own unit; shares in [0, 1].
        low, high: ends of the 95 % interval; equal to the value where there is none.
        count: of what it was taken.
    """

    name: str
    value: float
    low: float
    high: float
    count: int  # type: ignore[assignment]  # nobody counts in a measurement


@dataclass
class Subject:
    """What is measured.

    Attributes:
        model: a language model of the zoo, or transformers' own.
        tokenizer: its tokenizer.
        generator: how it answers (``llm_modules.generation.Generator``, or what has its ``generate``).
    """

    model: Any
    tokenizer: Any
    generator: Any


@runtime_checkable
class Suite(Protocol):
    """An evaluation that asks a model itself."""

    def measure(self, subject: Subject) -> list[Measurement]:
        """The model is left as it was found."""
        ...


def share(name: str, hits: int, count: int) -> Measurement:
    """A share of independent answers with Wilson's 95 % interval (Wilson 1927), which holds at 0 and 1, too.

    Raises:
        ValueError: there is nothing to take a share of.
    """
    if not count:
        raise ValueError(f"{name}: there is nothing to measure")
    value, square = hits / count, Z * Z
    middle = (value + square / (2 * count)) / (1 + square / count)
    half = Z * math.sqrt(value * (1 - value) / count + square / (4 * count * count)) / (1 + square / count)
    low, high = (0.0 if hits == 0 else middle - half), (1.0 if hits == count else middle + half)  # to the last digit
    return Measurement(name, value, low, high, count)


def mean(name: str, values: Sequence[float]) -> Measurement:
    """A mean with the interval of the normal approximation.

    Raises:
        ValueError: there is nothing to take a mean of.
    """
    count = len(values)
    if not count:
        raise ValueError(f"{name}: there is nothing to measure")
    value = math.fsum(values) / count
    half = Z * math.sqrt(math.fsum((v - value) ** 2 for v in values) / max(1, count - 1) / count)
    return Measurement(name, value, value - half, value + half, count)


def prefixed(name: str, found: Sequence[Measurement]) -> list[Measurement]:
    """Measurements of a suite with a name of its own: ``NAME_...``; as they are where it has none."""
    return [m._replace(name=f"{name}_{m.name}") if name else m for m in found]
