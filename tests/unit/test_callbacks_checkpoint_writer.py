"""Checkpoints in shards, and checkpoints that are written while training goes on: the same as the plain ones."""

from __future__ import annotations

import os
import resource
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callback_runs import TinyModule, make_trainer
from safetensors.torch import load_file

from callbacks import AtomicCheckpointIO, StepCheckpoint
from callbacks.checkpoint_errors import CheckpointError
from callbacks.checkpoint_folder import save_folder
from callbacks.metrics_csv import MACHINE_COLUMNS, read_rows

FORMS = [(False, True), (True, False), (True, True)]


def fit(folder: Path, steps: int, *more: pl.Callback, resume: str | None = None, **options: Any) -> None:
    checkpoint = StepCheckpoint(**({"every_n_steps": 2, "keep_best": 0} | options))
    trainer = make_trainer(folder, *more, checkpoint=checkpoint, max_steps=steps)
    trainer.fit(TinyModule(), ckpt_path=None if resume is None else folder / "checkpoints" / resume)


def measured(folder: Path) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if k not in MACHINE_COLUMNS} for row in read_rows(folder / "metrics.csv")]


def plain(tree: Any) -> Any:
    """A loaded checkpoint with all of its tensors read, as numbers: what can be compared."""
    if isinstance(tree, torch.Tensor):
        return (str(tree.dtype), tree.tolist())
    if hasattr(tree, "items"):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize(("sharded", "asynchronous"), FORMS)
def test_holds_the_same_as_a_plain_one_and_resumes_the_run(sharded: bool, asynchronous: bool, tmp_path: Path) -> None:
    options = {"sharded": sharded, "asynchronous": asynchronous}
    fit(tmp_path / "plain", 7)
    fit(tmp_path / "other", 4, **options)
    found = sorted(path.name for path in (tmp_path / "other/checkpoints").iterdir())
    assert found == ["last.ckpt", "step-00000004.ckpt"]  # the older ones went, the newest is complete
    assert (tmp_path / "other/checkpoints/last.ckpt").is_dir() == sharded
    fit(tmp_path / "other", 7, resume="last.ckpt", **options)
    read = [
        AtomicCheckpointIO().load_checkpoint(tmp_path / f"{name}/checkpoints/last.ckpt") for name in ("plain", "other")
    ]
    whole, other = (plain(checkpoint) for checkpoint in read)
    for key in ("files", "shapes", "shared"):
        other.pop(key, None)
    assert other.keys() == whole.keys()
    for key in whole.keys() - {"callbacks"}:
        assert other[key] == whole[key], key
    assert list(other["state_dict"]) == list(whole["state_dict"])
    assert measured(tmp_path / "other") == measured(tmp_path / "plain")


def test_shards_are_safetensors_and_hold_all_that_is_large(tmp_path: Path) -> None:
    fit(tmp_path, 2, sharded=True)
    path = tmp_path / "checkpoints/step-00000002.ckpt"
    (shard,) = path.glob("*.safetensors")
    assert {file.name for file in path.iterdir()} == {shard.name, "state.pt"}
    names = {f"state_dict.{name}" for name in TinyModule().state_dict()}
    assert names < set(load_file(shard))
    assert all(name.startswith(("state_dict.", "optimizer.0.")) for name in load_file(shard))


class Hold:
    """Makes the writer wait until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.go = threading.Event()
        original = torch.save

        def save(*arguments: Any) -> None:
            assert self.go.wait(60)
            original(*arguments)

        monkeypatch.setattr(torch, "save", save)


class At(pl.Callback):
    """Does something after a step."""

    def __init__(self, step: int, do: Any) -> None:
        self.step, self.do = step, do

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.do()


@pytest.mark.parametrize("sharded", [False, True])
def test_training_goes_on_and_the_file_is_of_its_own_step(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path / "plain", 3)
    hold, folder = Hold(monkeypatch), tmp_path / "held/checkpoints"
    seen: list[list[str]] = []

    def look() -> None:
        seen.append([path.name for path in folder.glob("[!.]*")])
        hold.go.set()

    fit(tmp_path / "held", 6, At(5, look), every_n_steps=3, keep_last=-1, sharded=sharded, asynchronous=True)
    assert seen == [[]]  # after step 5 that of step 3 was not written yet, and nothing pointed to it
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-00000003.ckpt", "step-00000006.ckpt"]
    assert os.readlink(folder / "last.ckpt") == "step-00000006.ckpt"
    expected = AtomicCheckpointIO().load_checkpoint(tmp_path / "plain/checkpoints/last.ckpt")
    found = AtomicCheckpointIO().load_checkpoint(folder / "step-00000003.ckpt")
    for key in ("state_dict", "optimizer_states", "loops", "global_step"):
        assert plain(found[key]) == plain(expected[key]), key


class TooLarge(TinyModule):
    """Its checkpoints from step 4 on are larger than the file system takes."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.global_step >= 4:
            checkpoint["ballast"] = torch.zeros(100_000)


@pytest.fixture
def limit_file_size() -> Iterator[None]:
    """No file of this process may grow over 100 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("limit_file_size")
@pytest.mark.parametrize(("sharded", "asynchronous"), FORMS)
def test_an_error_stops_the_run_in_one_line_and_the_former_checkpoint_stays(
    sharded: bool, asynchronous: bool, tmp_path: Path
) -> None:
    checkpoint = StepCheckpoint(every_n_steps=2, keep_best=0, sharded=sharded, asynchronous=asynchronous)
    trainer = make_trainer(tmp_path, checkpoint=checkpoint, max_steps=50)
    with pytest.raises(CheckpointError, match=r"File too large while saving step-00000004.ckpt: it needs") as caught:
        trainer.fit(TooLarge())
    assert "\n" not in str(caught.value)
    assert trainer.global_step <= 6  # at the latest when the next one is due
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "step-00000002.ckpt"]
    fit(tmp_path, 3, resume="last.ckpt")


@pytest.mark.usefixtures("limit_file_size")
def test_a_shard_that_does_not_fit_is_told_with_its_size(tmp_path: Path) -> None:
    path, parts = tmp_path / "step-00000001.ckpt", {"state_dict.w": torch.zeros(100_000)}
    with pytest.raises(CheckpointError, match=r"File too large .* needs about 400000 bytes") as caught:
        save_folder(parts, {"state_dict": ["w"], "optimizer_states": [], "shared": {}}, path, None)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_what_is_written_when_the_run_fails_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold = Hold(monkeypatch)

    def fail() -> None:
        threading.Timer(0.3, hold.go.set).start()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, 9, At(3, fail), asynchronous=True)
    assert (tmp_path / "checkpoints/step-00000002.ckpt").is_file()


def removed(path: Path) -> None:
    next(path.glob("*.safetensors")).unlink()


def truncated(path: Path) -> None:
    shard = next(path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-3])


def damaged(path: Path) -> None:
    shard = next(path.glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(bytes(data))


def added(path: Path) -> None:
    (path / "shard-00002-model-00001-of-00001.safetensors").write_bytes(b"")


def half_listed(path: Path) -> None:
    (path / "state.pt").write_bytes((path / "state.pt").read_bytes()[:-100])


class Executes:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (os.environ["EXECUTED"],)


def executes(path: Path) -> None:
    rest = torch.load(path / "state.pt", weights_only=True)
    torch.save({**rest, "x": Executes()}, path / "state.pt")


def foreign(path: Path) -> None:
    rest = torch.load(path / "state.pt", weights_only=True)
    del rest["files"]
    torch.save(rest, path / "state.pt")


BAD = {
    "removed": (removed, "safetensors is missing"),
    "truncated": (truncated, "safetensors has [0-9]+ bytes instead of [0-9]+"),
    "damaged": (damaged, "safetensors is damaged: wrong checksum"),
    "added": (added, "shard-00002-model-00001-of-00001.safetensors does not belong to it"),
    "half listed": (half_listed, "state.pt: truncated, damaged or no checkpoint"),
    "executes": (executes, "state.pt: holds posix.mkdir, which loading would have to execute"),
    "foreign": (foreign, "state.pt: not a checkpoint of a run in shards"),
    "no list": (lambda path: (path / "state.pt").unlink(), "a folder, not a checkpoint file"),
}


@pytest.mark.parametrize("kind", BAD)
def test_says_in_one_line_why_shards_cannot_be_loaded(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tmp_path, 2, sharded=True)
    path, (spoil, message) = tmp_path / "checkpoints/step-00000002.ckpt", BAD[kind]
    monkeypatch.setenv("EXECUTED", str(tmp_path / "executed"))
    spoil(path)
    with pytest.raises(CheckpointError, match=message) as caught:
        AtomicCheckpointIO().load_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_what_a_killed_run_left_of_a_folder_goes_at_the_next_save(tmp_path: Path) -> None:
    leftover = tmp_path / "checkpoints/.step-00000001.ckpt-partial"
    leftover.mkdir(parents=True)
    (leftover / "shard").write_bytes(b"half")
    fit(tmp_path, 2)
    assert not leftover.exists()


def test_a_folder_that_goes_loses_its_name_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit(tmp_path, 2, sharded=True)
    path, gone = tmp_path / "checkpoints/step-00000002.ckpt", []
    monkeypatch.setattr("shutil.rmtree", lambda path: gone.append(Path(path).name))  # killed just then
    AtomicCheckpointIO().remove_checkpoint(path)
    assert not path.exists()
    assert gone == [".step-00000002.ckpt-partial"]
