"""Lightning callbacks and loggers.

The names are resolved on first use, so that reading a run's files (`recipes report`) does not import Lightning.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from callbacks.checkpoint import StepCheckpoint as StepCheckpoint
    from callbacks.checkpoint_io import AtomicCheckpointIO as AtomicCheckpointIO
    from callbacks.export import ExportFolder as ExportFolder
    from callbacks.graceful_stop import GracefulStop as GracefulStop
    from callbacks.mask_audit import MaskAudit as MaskAudit
    from callbacks.memory import Memory as Memory
    from callbacks.metrics_csv import MetricsCSV as MetricsCSV
    from callbacks.predictions import PredictionsWriter as PredictionsWriter
    from callbacks.progress import RecipeProgress as RecipeProgress
    from callbacks.report import RunReport as RunReport
    from callbacks.safety import SafetyEvaluation as SafetyEvaluation
    from callbacks.samples import Samples as Samples
    from callbacks.score_histogram import ScoreHistogram as ScoreHistogram
    from callbacks.spike_guard import SpikeGuard as SpikeGuard
    from callbacks.throughput import Throughput as Throughput

_MODULES = {
    "AtomicCheckpointIO": "checkpoint_io",
    "ExportFolder": "export",
    "GracefulStop": "graceful_stop",
    "MaskAudit": "mask_audit",
    "Memory": "memory",
    "MetricsCSV": "metrics_csv",
    "PredictionsWriter": "predictions",
    "RecipeProgress": "progress",
    "RunReport": "report",
    "SafetyEvaluation": "safety",
    "Samples": "samples",
    "ScoreHistogram": "score_histogram",
    "SpikeGuard": "spike_guard",
    "StepCheckpoint": "checkpoint",
    "Throughput": "throughput",
}

__all__ = [
    "AtomicCheckpointIO",
    "ExportFolder",
    "GracefulStop",
    "MaskAudit",
    "Memory",
    "MetricsCSV",
    "PredictionsWriter",
    "RecipeProgress",
    "RunReport",
    "SafetyEvaluation",
    "Samples",
    "ScoreHistogram",
    "SpikeGuard",
    "StepCheckpoint",
    "Throughput",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'callbacks' has no attribute {name!r}; there are {', '.join(sorted(_MODULES))}")
    return getattr(import_module(f"callbacks.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(_MODULES)
