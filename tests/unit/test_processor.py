"""Settings that torch reads when it is loaded are made before, and never over the user's own."""

from __future__ import annotations

import os
import subprocess
import sys

CODE = """
import os, sys
from recipes.__main__ import main
main(["--version"])
print("torch" in sys.modules, os.environ["LRU_CACHE_CAPACITY"], os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"])
"""


def settings(**environment: str) -> list[str]:
    names = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", CODE]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=clean | environment)
    return result.stdout.split()[-3:]


def test_set_before_torch_is_loaded() -> None:
    assert settings() == ["False", "64", "64"]


def test_the_users_own_stay() -> None:
    assert settings(LRU_CACHE_CAPACITY="7") == ["False", "7", "64"]
