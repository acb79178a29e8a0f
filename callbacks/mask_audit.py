"""What will be trained is counted, shown, and refused if it cannot be meant, before the first step."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, is_dataclass
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from callbacks.run_files import run_folder, write_whole


class MaskAudit(Callback):
    """Prints the data's audit, writes it to ``audit.json`` in the run's folder, stops a run that could learn nothing.

    The data module's ``audit()`` says which tokens are trained, what was cut or dropped, whether turn ends are trained,
    and shows a row with the trained tokens marked. A resumed run was audited when it began.
    """

    FILE_NAME = "audit.json"

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        folder = run_folder(trainer)
        if trainer.ckpt_path is not None or not hasattr(datamodule, "audit"):
            return
        fatal: list[str] = []
        if trainer.is_global_zero:
            report = datamodule.audit(vocabulary=getattr(pl_module, "vocabulary", None))
            for line in report.lines:
                print(line, file=sys.stderr)
            if report.sample:
                print(report.sample, file=sys.stderr, flush=True)
            write_whole(folder / self.FILE_NAME, json.dumps(_as_json(report), ensure_ascii=False, indent=1))
            fatal = list(report.fatal)
        fatal = trainer.strategy.broadcast(fatal)
        if fatal:
            raise ValueError("; ".join(fatal))

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        loader: Any = trainer.train_dataloader
        dropped = getattr(loader, "dropped_rows", 0)
        if dropped and trainer.is_global_zero:
            print(
                f"data: {dropped} of an epoch's {loader.rows_in_epoch} rows do not fill an optimizer step; each epoch "
                "leaves out others",
                file=sys.stderr,
            )


def _as_json(report: Any) -> dict[str, Any]:
    facts = asdict(report) if is_dataclass(report) and not isinstance(report, type) else {}
    # In the file what is trained is in brackets, in a terminal it is green.
    sample = report.sample.replace("\x1b[32m", "⟦").replace("\x1b[0m", "⟧")
    return {**facts, "lines": list(report.lines), "sample": sample, "fatal": list(report.fatal)}
