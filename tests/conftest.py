"""Fixtures shared by all tests: offline, on the CPU, with models made from configs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    data = os.environ.get("LITRECIPES_DATA")
    for item in items:
        # Not `in item.keywords`: these hold the names of folders too, that of the checkout among them.
        if item.get_closest_marker("data") and not (data and Path(data).is_dir()):
            item.add_marker(pytest.mark.skip(reason="needs real data: set LITRECIPES_DATA to its folder"))
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def data_folder() -> Path:
    """The folder of real data sets (tests marked ``data``)."""
    return Path(os.environ["LITRECIPES_DATA"])


@pytest.fixture(autouse=True, scope="session")
def shared_extensions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What DeepSpeed compiles, in half a minute or more, is of all tests, and of the fixtures that modules share."""
    with pytest.MonkeyPatch.context() as patch:
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        patch.setenv("TORCH_EXTENSIONS_DIR", str(shared / "torch_extensions"))
        yield


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or leaves a cache in the user's home."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def no_signals_held_back() -> Iterator[None]:
    """A test that sets a GracefulStop up and never ends its run must not keep signals from what later tests fork."""
    yield
    if (module := sys.modules.get("callbacks.graceful_stop")) is not None:
        module._HELD_BACK.clear()
