"""How far two gradients of the same rows are apart: as a whole, and tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

WHOLE, TENSOR = 1e-5, 1e-4
"""What is allowed, relative, in fp32: of the whole gradient, and of each tensor."""

ROUNDING = 1e-6
"""A tensor below this share of the whole gradient is zero but for rounding (a bias that softmax cancels); it counts in
the whole only."""


@dataclass(frozen=True)
class Difference:
    """Relative differences (norm of the difference by the norm of what is expected).

    Attributes:
        whole: of the whole gradient.
        tensors: of each tensor, largest first; those that are zero but for rounding are left out.
        rounding: how many were left out.
    """

    whole: float
    tensors: list[tuple[float, str]]
    rounding: int

    @property
    def worst(self) -> tuple[float, str]:
        return self.tensors[0]

    @property
    def within(self) -> bool:
        # Written so that NaN is not.
        return self.whole <= WHOLE and all(value <= TENSOR for value, _ in self.tensors)


def difference(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Difference:
    """Compares two gradients of the same parameters.

    Raises:
        ValueError: they are of other parameters, or there is no gradient at all.
    """
    if actual.keys() != expected.keys():
        names = sorted(actual.keys() ^ expected.keys())
        raise ValueError(f"the ranks and one process do not train the same tensors: {names[:3]}")
    norms = {name: (_norm(actual[name]), _norm(expected[name])) for name in expected}
    apart = {name: _norm(actual[name].double() - expected[name].double()) for name in expected}
    total = math.hypot(*(norm for _, norm in norms.values()))
    if total == 0:
        raise ValueError("the gradient is zero; there is nothing to compare")
    beyond = [name for name, pair in norms.items() if not max(pair) < ROUNDING * total]
    tensors = [(_ratio(apart[name], norms[name][1]), name) for name in beyond]
    # NaN first: nothing is worse.
    tensors.sort(key=lambda item: (not math.isnan(item[0]), -item[0]))
    return Difference(math.hypot(*apart.values()) / total, tensors, len(norms) - len(beyond))


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.inf
