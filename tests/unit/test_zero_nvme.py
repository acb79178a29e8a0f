"""What ZeRO-3 with files on an NVMe drive refuses, and its folders."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from llm_modules.optimizers import MuonAdamW
from llm_modules.strategies.zero_nvme import check_request, prepare_weights, refuse_optimizer, swap_folder
from llm_modules.strategies.zero_operators import say_who_compiles

ALLOWED: dict[str, Any] = {"stage": 3, "optimizer": "nvme", "parameters": "nvme", "path": "/drive", "elements": 100}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"optimizer": "ssd"},
            r"strategy.offload_optimizer: 'ssd' is not allowed; true \(host memory\), false or nvme",
        ),
        ({"parameters": "cpu"}, "strategy.offload_parameters: 'cpu' is not allowed"),
        ({"stage": 2}, "strategy.offload_optimizer: nvme needs stage 3; in the others true"),
        ({"optimizer": True}, "strategy.offload_parameters: nvme needs offload_optimizer nvme, too"),
        ({"path": None}, "strategy.nvme_path: is needed with nvme: a folder on such a drive"),
        ({"elements": 0}, "strategy.swap_elements: 0 is not allowed; 1 or more"),
        ({"optimizer": True, "parameters": True}, "strategy.nvme_path: nothing is kept there; set offload_optimizer"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(change: dict[str, Any], message: str) -> None:
    check_request(**ALLOWED)
    check_request(**ALLOWED | {"parameters": True})
    with pytest.raises(ValueError, match=f"^{message}") as caught:
        check_request(**ALLOWED | change)
    assert "\n" not in str(caught.value)


class Owner:
    pass


def test_folders_of_ranks_and_runs_differ_and_go_with_their_owners(tmp_path: Path) -> None:
    owners = [Owner(), Owner(), Owner()]
    folders = [Path(swap_folder(owner, str(tmp_path), rank)) for owner, rank in zip(owners, (0, 0, 1), strict=True)]
    assert len(set(folders)) == 3
    (folders[0] / "states").write_bytes(b"1")
    child = os.fork()
    if child == 0:  # as a loader's worker
        del owners
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert all(folder.is_dir() for folder in folders)
    del owners
    gc.collect()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["missing", "a file"])
def test_where_nothing_can_be_written_is_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "drive"
    if kind == "a file":
        path.write_text("")
    said = {"missing": "No such file or directory", "a file": "Not a directory"}[kind]
    with pytest.raises(ValueError, match=f"^strategy.nvme_path: '{path}': {said}; a folder that can be written to"):
        swap_folder(Owner(), str(path), 0)


def test_other_optimizers_and_quantized_weights_are_refused() -> None:
    weights = [nn.Parameter(torch.ones(2, 2))]
    refuse_optimizer(torch.optim.AdamW(weights, lr=1.0, amsgrad=True))
    for optimizer in (torch.optim.Adagrad(weights), MuonAdamW([{"params": weights}], lr=1.0)):
        with pytest.raises(ValueError, match=r"^strategy.offload_optimizer: nvme swaps the states of torch.optim's"):
            refuse_optimizer(optimizer)
    model = nn.Linear(2, 2)
    model.codes = nn.Parameter(torch.ones(2, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"^strategy.offload_parameters: nvme keeps no quantized weights"):
        prepare_weights({"zero_optimization": {"offload_param": {"device": "nvme"}}}, model, 2)


def test_a_lock_that_a_killed_compiler_left_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    say_who_compiles()
    assert "DeepSpeed compiles its operators at their first use" in capsys.readouterr().err
    lock = tmp_path / "py311_cpu" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    say_who_compiles()
    assert f"waiting while another process compiles deepspeed_shm_comm (for 0 s); if it was killed, remove {lock}" in (
        capsys.readouterr().err
    )
    os.utime(lock, (0, 0))
    with pytest.raises(ValueError, match=f"strategy: {lock}: left by a compiler that was killed"):
        say_who_compiles()
    lock.unlink()
    (lock.parent / "deepspeed_shm_comm.so").touch()
    say_who_compiles()
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(Path, "glob", lambda self, pattern: [lock])  # gone when it is looked at
    say_who_compiles()
