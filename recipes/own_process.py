"""A part of a check in a process of its own: `recipes` again, with what the part is told."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from recipes.ranks import FOLDER_VARIABLE

# What launchers tell their processes (torchrun, Slurm, MPI, Lightning).
_TOLD = frozenset({
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "NODE_RANK",
    "ROLE_RANK", "ROLE_NAME", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", FOLDER_VARIABLE,
})  # fmt: skip
_PREFIXES = ("TORCHELASTIC_", "SLURM_", "PMI_", "PMIX_", "OMPI_")


def run_own(
    words: Sequence[str],
    configs: Sequence[str],
    overrides: Sequence[tuple[str, str]],
    *,
    captured: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Runs ``recipes WORDS -c CONFIGS --OVERRIDES`` as one process, whatever started this one, and waits for its end.

    Args:
        captured: keep what it writes on standard error, instead of letting it through.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _TOLD and not k.startswith(_PREFIXES)}
    # Found where this process found it, also from another folder and by the ranks that Lightning starts.
    root = str(Path(__file__).resolve().parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), root]))
    named = [word for name in configs for word in ("-c", name)]
    command = [sys.executable, "-m", "recipes", *words, *named, *(f"--{key}={text}" for key, text in overrides)]
    return subprocess.run(
        command, env=environment, text=True, stderr=subprocess.PIPE if captured else None, check=False
    )
