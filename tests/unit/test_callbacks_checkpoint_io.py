"""AtomicCheckpointIO: whole or not at all, and nothing in a file is executed."""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from callback_runs import TinyModule, make_trainer

from callbacks import AtomicCheckpointIO, StepCheckpoint
from callbacks.checkpoint_errors import CheckpointError, checkpoint_bytes


def checkpoint(numbers: int = 1000) -> dict[str, Any]:
    return {"state_dict": {"w": torch.arange(numbers)}, "pytorch-lightning_version": "2.6.6", "global_step": 3}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step-00000003.ckpt"
    AtomicCheckpointIO().save_checkpoint(checkpoint(), path)
    return path


@pytest.mark.parametrize("mmap_above_gib", [0.0, 4.0])
def test_reads_what_it_wrote(saved: Path, mmap_above_gib: float) -> None:
    loaded = AtomicCheckpointIO(mmap_above_gib).load_checkpoint(saved)
    assert torch.equal(loaded["state_dict"]["w"], torch.arange(1000))
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_replaces_a_checkpoint_and_removes_what_a_killed_run_left(saved: Path) -> None:
    leftover = saved.with_name(".step-00000002.ckpt-partial")
    leftover.write_bytes(b"half")
    AtomicCheckpointIO().save_checkpoint(checkpoint(7), saved)
    assert len(AtomicCheckpointIO().load_checkpoint(saved)["state_dict"]["w"]) == 7
    assert not leftover.exists()


class Executes:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EXECUTED"],)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def damaged(path: Path) -> None:
    data = bytearray(path.read_bytes())
    place = data.index(torch.arange(500, 520).numpy().tobytes())  # a number in the middle of the weights
    data[place] ^= 1
    path.write_bytes(bytes(data))


def executes(path: Path) -> None:
    torch.save({**checkpoint(), "x": Executes()}, path)


def executes_as_plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(Executes()))


def weights_only(path: Path) -> None:
    torch.save({"w": torch.ones(1), "v": torch.ones(1)}, path)


BAD = {
    "empty": (lambda path: path.write_bytes(b""), r"truncated, damaged or no checkpoint \(0 bytes"),
    "truncated": (truncated, "truncated, damaged or no checkpoint"),
    "damaged": (damaged, "truncated, damaged .* wrong checksum of .*data/0"),
    "text": (lambda path: path.write_text("hello"), "truncated, damaged or no checkpoint"),
    "executes": (executes, "holds posix.mkdir, which loading would have to execute; nothing of it was executed"),
    "plain pickle": (executes_as_plain_pickle, "truncated, damaged or no checkpoint"),
    "list": (lambda path: torch.save([1], path), "not a checkpoint of a run: it holds a list"),
    "weights": (weights_only, "not a checkpoint of a run: it holds a dict with w, v, expected state_dict"),
    "gone": (lambda path: path.unlink(), "no such checkpoint; .* holds none"),
    "folder": (lambda path: (path.unlink(), path.mkdir()), "a folder, not a checkpoint file; it holds none"),
}


@pytest.mark.parametrize("kind", BAD)
def test_says_in_one_line_why_a_file_cannot_be_loaded(
    saved: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed = tmp_path / "executed"
    monkeypatch.setenv("EXECUTED", str(executed))
    spoil, message = BAD[kind]
    spoil(saved)
    with pytest.raises(CheckpointError, match=message) as caught:
        AtomicCheckpointIO().load_checkpoint(saved, weights_only=False)
    assert "\n" not in str(caught.value)
    assert str(saved) in str(caught.value)
    assert not executed.exists()


def test_names_the_checkpoints_beside_a_broken_one(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no such checkpoint; .* holds step-00000003.ckpt"):
        AtomicCheckpointIO().load_checkpoint(saved.with_name("step-00000004.ckpt"))


@pytest.mark.parametrize("value", [numpy.float64(1), numpy.zeros(2), Path("x"), Executes])
def test_refuses_to_write_what_could_not_be_loaded(saved: Path, value: Any) -> None:
    before = saved.read_bytes()
    with pytest.raises(TypeError, match="refuses: keep plain Python values"):
        AtomicCheckpointIO().save_checkpoint({**checkpoint(), "extra": value}, saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_counts_the_bytes_of_a_shared_tensor_once() -> None:
    weight = torch.zeros(100)
    tree = {"a": weight, "b": [weight.view(10, 10), {"c": torch.zeros(3, dtype=torch.int64)}], "d": "x"}
    assert checkpoint_bytes(tree) == 400 + 24


@pytest.fixture
def limit_file_size() -> Iterator[None]:
    """No file of this process may grow over 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("limit_file_size")
def test_file_too_large_leaves_the_last_good_checkpoint(saved: Path) -> None:
    with pytest.raises(CheckpointError, match=r"File too large while saving .* needs about 800000 bytes") as caught:
        AtomicCheckpointIO().save_checkpoint(checkpoint(100_000), saved)
    assert "\n" not in str(caught.value)
    assert len(AtomicCheckpointIO().load_checkpoint(saved)["state_dict"]["w"]) == 1000
    assert list(saved.parent.iterdir()) == [saved]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = tmp_path / "disk"
    folder.mkdir()
    if libc.mount(b"tmpfs", bytes(folder), b"tmpfs", 0, b"size=1m") != 0:
        pytest.skip(f"mounting a small disk needs root: {os.strerror(ctypes.get_errno())}")
    yield folder
    libc.umount(bytes(folder))


def test_full_disk_ends_a_run_with_one_line_and_keeps_its_last_checkpoint(small_disk: Path) -> None:
    class Growing(TinyModule):
        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            checkpoint["ballast"] = torch.zeros(100_000 * self.global_step)

    trainer = make_trainer(small_disk, checkpoint=StepCheckpoint(every_n_steps=1, keep_best=0), max_steps=4)
    with pytest.raises(CheckpointError, match=r"No space left on device while saving step-00000002.ckpt") as caught:
        trainer.fit(Growing())
    message = str(caught.value)
    assert "\n" not in message
    assert "(complete checkpoints: last.ckpt, step-00000001.ckpt)" in message
    folder = small_disk / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-00000001.ckpt"]
    resumed = make_trainer(small_disk, checkpoint=StepCheckpoint(every_n_steps=9, keep_best=0), max_steps=1)
    resumed.fit(TinyModule(), ckpt_path=folder / "last.ckpt")


def test_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file: cannot be made: File exists; no checkpoint was lost"):
        AtomicCheckpointIO().save_checkpoint(checkpoint(), tmp_path / "file" / "step-00000001.ckpt")


def test_a_trained_checkpoint_holds_tensors_and_plain_values_only(tmp_path: Path) -> None:
    make_trainer(tmp_path, max_steps=2, limit_val_batches=1, val_check_interval=1).fit(TinyModule())
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.serialization.get_unsafe_globals_in_checkpoint(str(path)) == []
    with zipfile.ZipFile(path) as archive:
        pickled = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        assert b"numpy" not in archive.read(pickled)
