"""Lightning callbacks and loggers.

The names are resolved on first use, so that reading a run's files (`recipes report`) does not import Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from callbacks.checkpoint import StepCheckpoint as StepCheckpoint
    from callbacks.checkpoint_io import AtomicCheckpointIO as AtomicCheckpointIO
    from callbacks.metrics_csv import MetricsCSV as MetricsCSV
    from callbacks.throughput import Throughput as Throughput

_MODULES = {
    "AtomicCheckpointIO": "checkpoint_io",
    "MetricsCSV": "metrics_csv",
    "StepCheckpoint": "checkpoint",
    "Throughput": "throughput",
}

__all__ = ["AtomicCheckpointIO", "MetricsCSV", "StepCheckpoint", "Throughput"]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'callbacks' has no attribute {name!r}; there are {', '.join(sorted(_MODULES))}")
    return getattr(import_module(f"callbacks.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_MODULES)
