"""What one side of a comparison measures of itself, in its own process, without knowing whose training loop it is in.

Every loop ends an optimizer step in ``Optimizer.step``, so that is where the clocks are read: torch's global hook sees
the step of TRL, transformers, litgpt, Lightning and of a plain loop alike. In a *check* run, which is not timed, hooks
on the embedding and on the losses show what was trained on.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook


def resident_mib() -> float:
    """Resident memory of this process, now."""
    return _status("VmRSS")


def peak_mib() -> float:
    """Highest resident memory of this process since it started, or since ``reset_peak``."""
    return _status("VmHWM")


def reset_peak() -> bool:
    """Count the peak from now on; False where the system does not let a process do so."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    found = next((line.split()[1] for line in lines if line.startswith(key + ":")), "nan")
    return float(found) / 1024


@dataclass
class Tick:
    """The clocks at the end of an optimizer step: seconds, seconds of CPU (user + system, all threads), MiB so far."""

    wall: float
    cpu: float
    peak: float


@dataclass
class Recorder:
    """Reads the clocks after each optimizer step of this process and writes what it saw to a JSON file.

    Attributes:
        out: the file; the harness gives its path.
        check: also hash the tokens that each step embeds (costs time, so such a run is not timed).
        ignore: token ids that are left out of the hash: padding.
    """

    out: Path
    check: bool = False
    ignore: int | None = None
    ticks: list[Tick] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    _tokens: list[Tensor] = field(default_factory=list)
    _closed: bool = False

    def start(self) -> None:
        """Call when the libraries are imported and nothing is loaded: memory is counted from here."""
        self.facts["imported_mib"] = resident_mib()
        self.facts["peak_reset"] = reset_peak()
        register_optimizer_step_post_hook(lambda *_: self.tick())

    def tick(self) -> None:
        if self.check and not self._tokens and len(self.ticks) > 1:
            self.ticks[-1] = self._now()  # DeepSpeed's optimizer holds the config's: both step in one step
            return
        self.ticks.append(self._now())
        if self.check:
            tokens = torch.cat(self._tokens) if self._tokens else torch.empty(0, dtype=torch.int64)
            self.rows.append(hashlib.sha256(tokens.cpu().sort().values.numpy().tobytes()).hexdigest()[:16])
            self._tokens.clear()

    def watch(self, model: nn.Module) -> None:
        """The model is built and training begins: count its parameters, read the clocks, and, in a check run, record
        the tokens that go into the embedding.

        The hash of a step is that of its *sorted* tokens: it is the same for padded and for packed rows.
        """
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.ticks, self.rows = [self._now()], []
        self._tokens.clear()
        self.facts["built_mib"] = resident_mib()
        self.facts["parameters"] = sum(p.numel() for p in model.parameters())
        self.facts["trained_parameters"] = sum(
            getattr(p, "ds_numel", p.numel())  # DeepSpeed leaves parameters that it has spread without their shapes
            for p in model.parameters()
            if p.requires_grad
        )
        self.facts["parameter_dtypes"] = sorted({str(p.dtype) for p in model.parameters()})
        if self.check:
            embedding = next(m for m in model.modules() if isinstance(m, nn.Embedding))
            embedding.register_forward_pre_hook(self._embedded)

    def _embedded(self, module: nn.Module, inputs: tuple[Tensor]) -> None:
        if module.training and torch.is_grad_enabled():
            ids = inputs[0].detach().flatten().to(torch.int64)
            self._tokens.append(ids if self.ignore is None else ids[ids != self.ignore])

    def finish(self, losses: list[float]) -> None:
        """Write the file. ``losses``: those that the side logged, in order."""
        self.losses = losses
        self.facts["peak_mib"] = self.ticks[-1].peak  # of training; what is saved afterwards is not compared
        if torch.cuda.is_available():
            self.facts["device_allocated_mib"] = torch.cuda.max_memory_allocated() / 2**20
            self.facts["device_reserved_mib"] = torch.cuda.max_memory_reserved() / 2**20
        self.facts["threads"] = torch.get_num_threads()
        self.facts["torch"] = torch.__version__
        data = {"ticks": [asdict(t) for t in self.ticks], "rows": self.rows, "losses": losses, "facts": self.facts}
        temporary = self.out.with_suffix(".part")
        temporary.write_text(json.dumps(data))
        os.replace(temporary, self.out)

    @staticmethod
    def _now() -> Tick:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # a step has ended when the device has done it
        usage = resource.getrusage(resource.RUSAGE_SELF)
        return Tick(time.perf_counter(), usage.ru_utime + usage.ru_stime, peak_mib())
