"""Settings that torch reads when it is loaded are made before, and never over the user's own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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


@pytest.mark.parametrize(
    ("precision", "native", "said"), [("bf16-mixed", False, 1), ("bf16-mixed", True, 0), ("32-true", False, 0)]
)
def test_a_precision_that_the_processor_is_slow_at_is_said(precision, native, said, monkeypatch) -> None:
    from lightning.pytorch import Trainer

    from recipes import preview

    monkeypatch.setattr(preview, "multiplies_bfloat16", lambda: native)
    trainer = Trainer(accelerator="cpu", devices=1, precision=precision, logger=False, enable_checkpointing=False)
    lines = preview.slow_precision(trainer)
    assert len(lines) == said
    assert all("no bf16 instructions; --trainer.precision 32-true" in line for line in lines)
