"""Whether the folder of runs is one and the same for all processes, and whether all may write to it."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path

from recipes.cluster_world import World

_PATIENCE = 5.0  # seconds that a network file system may take to show what another machine wrote


class SharedFolder:
    """A folder below runs/ that rank 0 makes, each rank leaves a file in, and rank 0 removes.

    Args:
        runs_dir: where runs are written below.
    """

    def __init__(self, runs_dir: Path) -> None:
        self.runs_dir = runs_dir
        self.name = ""  # "": rank 0 could not make it
        self._made: list[Path] = []
        self._problem = ""

    def make(self) -> str:
        """On rank 0: makes the folder, and those above it; returns its name."""
        parents = [self.runs_dir, *self.runs_dir.parents]
        self._made = [path for path in parents if not path.exists()]
        name = f".preflight-{secrets.token_hex(4)}"
        try:
            (self.runs_dir / name).mkdir(parents=True)
        except OSError as error:
            self._problem = f"{self.runs_dir}/ (runs_dir) cannot be written: {error.strerror}"
            return ""
        self.name = name
        return name

    def use(self, rank: int) -> str:
        """Does in it what a run does in its folder; returns what is wrong."""
        if not self.name:
            return self._problem
        folder = self.runs_dir / self.name
        if not folder.is_dir():
            return (
                f"{self.runs_dir}/ (runs_dir) is not the folder that rank 0 sees; it must be one that all nodes share"
            )
        part, whole, link = (folder / f"{rank}{suffix}" for suffix in (".part", "", ".link"))
        try:
            with part.open("w") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                file.write("x")
                file.flush()
                os.fsync(file.fileno())
            part.rename(whole)
            link.symlink_to(whole.name)
        except OSError as error:
            return f"{self.runs_dir}/ (runs_dir) cannot be written as a run does: {error.strerror}"
        return ""

    def unseen(self, world: World) -> list[str]:
        """On rank 0, when all have written: whose file is not here."""
        end = time.monotonic() + _PATIENCE
        folder = self.runs_dir / self.name
        missing = list(range(world.size))
        while missing and time.monotonic() < end:
            missing = [rank for rank in missing if not (folder / str(rank)).exists()]
            if missing:
                time.sleep(0.1)
        if not missing:
            return []
        return [f"{self.runs_dir}/ (runs_dir): what {world.names(missing)} wrote there is not seen by rank 0"]

    def remove(self) -> None:
        """On rank 0: takes away what was made, where nobody has put anything else into it."""
        if self.name:
            shutil.rmtree(self.runs_dir / self.name, ignore_errors=True)
        for path in self._made:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
