"""The operators that DeepSpeed compiles at their first use, for minutes and without a word."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

LONGEST = 3600.0
"""Seconds after which nobody compiles any more."""


def say_who_compiles() -> None:
    """Says on standard error that operators will be compiled, and which file torch will wait for.

    A compiler that was killed (by a time limit, a preemption) leaves its lock, for which torch waits for ever.

    Raises:
        ValueError: such a lock is so old that nothing can be at work there.
    """
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in sorted([*root.glob("*/lock"), *root.glob("*/*/lock")]):
        try:
            age = time.time() - lock.stat().st_mtime
        except FileNotFoundError:
            continue  # done in the meantime
        if age > LONGEST:
            raise ValueError(
                f"strategy: {lock}: left by a compiler that was killed {age / 3600:.0f} hours ago; DeepSpeed would "
                "wait for it for ever; remove this file"
            )
        print(
            f"strategy: waiting while another process compiles {lock.parent.name} (for {age:.0f} s); if it was killed, "
            f"remove {lock}",
            file=sys.stderr,
        )
    if not any(root.glob("**/*.so")):
        print("strategy: DeepSpeed compiles its operators at their first use, for some minutes", file=sys.stderr)
