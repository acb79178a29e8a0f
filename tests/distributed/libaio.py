"""What DeepSpeed compiles its asynchronous input and output with."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("libaio-dev", "g++", "ninja-build")
_APT = ("apt-get", "-q", "-o", "DPkg::Lock::Timeout=120")


def install() -> str:
    """Installs Debian's packages where they are missing; returns why it cannot be done, or nothing."""
    programs = (os.environ.get("CXX", "c++"), "ninja")
    if os.path.exists("/usr/include/libaio.h") and all(shutil.which(program) for program in programs):
        return ""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"needs {', '.join(_PACKAGES)}, and root on a Debian to install them"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (["update"], ["install", "-y", "--no-install-recommends", *_PACKAGES]):
        done = subprocess.run([*_APT, *words], env=environment, capture_output=True, text=True)
        if done.returncode:
            return f"apt-get {words[0]}: {' '.join((done.stderr or done.stdout).split())[-300:]}"
    return ""


_OWN_OF_EACH = ("c_library_name", "c_block_size", "c_io_queue_depth")
"""Constants that several of DeepSpeed's files define for themselves."""


def write_unit(folder: Path) -> Path:
    """DeepSpeed's files of this operator as one, because each would read torch's headers again: 1.5 minutes of a core
    instead of 10."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    builder = AsyncIOBuilder()
    for name in ("aio", "pin_memory"):
        shutil.copytree(builder.deepspeed_src_path(f"csrc/{name}"), folder / name)
    for header in folder.rglob("*.h"):
        header.write_text("#pragma once\n" + header.read_text())
    lines = []
    for number, source in enumerate(builder.sources()):
        lines += [f"#define {name} {name}_{number}" for name in _OWN_OF_EACH]
        lines += [f'#include "{Path(source).relative_to("csrc")}"', *(f"#undef {name}" for name in _OWN_OF_EACH)]
    unit = folder / "unit.cpp"
    unit.write_text("\n".join(lines) + "\n")
    return unit


def main(unit: str, cells: list[dict[str, Any]], out: str) -> None:
    """The cells of ``strategy_cells`` with this unit."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    from tests.distributed import strategy_cells

    folder = Path(unit).parent
    AsyncIOBuilder.sources = lambda self: [unit]
    AsyncIOBuilder.include_paths = lambda self: [
        str(folder / name) for name in ("aio/py_lib", "aio/common", "pin_memory")
    ]
    strategy_cells.main(cells, out)
