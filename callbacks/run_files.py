"""The files of a run's folder that callbacks write beside metrics.csv."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning.pytorch as pl


def run_folder(trainer: pl.Trainer) -> Path:
    """The run's folder, the same on all ranks; all ranks call it."""
    return Path(trainer.strategy.broadcast(str(trainer.log_dir or trainer.default_root_dir)))


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}-partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)  # half a file on a full disk
        raise


def append_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Append rows of JSON, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The complete rows of a JSONL file; a line that a kill has torn is left out; none where there is no file."""
    if not path.exists():
        return []
    complete = path.read_bytes().rpartition(b"\n")[0].decode("utf-8")
    return [json.loads(line) for line in complete.split("\n") if line]


def cut_lines(path: Path, step: int) -> None:
    """Drop the rows of a JSONL file after ``step``, and what a kill has torn."""
    if path.exists():
        kept = [row for row in read_lines(path) if row["step"] <= step]
        write_whole(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept))
