"""What DeepSpeed compiles its asynchronous input and output with."""

from __future__ import annotations

import os
import shutil
import subprocess

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
