"""ZeRO-3 with states, and weights, in files trains what one process trains; its checkpoints are as all others.

What DeepSpeed swaps with is compiled when it is first used: here as one unit (see ``libaio.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llm_modules.strategies.zero import find_deepspeed
from llm_modules.strategies.zero_nvme import refuse_without_libaio
from tests.distributed.libaio import install, write_unit
from tests.distributed.test_strategies import LOSS, STEPS, WEIGHTS, Launches, difference

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

# Of each matrix of a feed-forward layer, a process has a little more than the 1 MiB from which DeepSpeed swaps, and not
# a whole number of blocks; the other weights are smaller and stay in memory.
WIDE = {"hidden_size": 256, "intermediate_size": 2051}
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "lora_alpha": 8}}
JOBS: dict[str, dict[str, Any]] = {
    "next token": {"stage": "pretrain", "model": "llama", "config": WIDE},
    "SFT with LoRA": {"stage": "sft", "model": "llama", "config": WIDE, "backbone": {"adapter": LORA}},
}
IN_FILES = 6 * 256 * 2051 // 2  # two layers' three matrices, halved
NVME: dict[str, Any] = {"stage": 3, "offload_optimizer": "nvme", "swap_elements": 400_000}  # four sub-groups and a rest
WHAT: dict[str, dict[str, Any]] = {"optimizer": {}, "both": {"offload_parameters": "nvme"}}
SAVED_AFTER = 3

Results = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if reason := install():
        pytest.skip(reason)
    return tmp_path_factory.mktemp("nvme")


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    """Of one process, of two that swap, and of one that resumes what they saved."""
    launches = Launches(folder, JOBS)
    find_deepspeed()
    launches.program = ("tests.distributed.libaio:main", str(write_unit(folder / "operator")))

    def saves(name: str) -> dict[str, Any]:
        return {"name": f"{name} saves", "steps": SAVED_AFTER, "save": str(folder / f"{name}.ckpt")}

    def single(**more: Any) -> dict[str, Any]:
        return launches.cell("single", "next token", 1) | more

    def swapping(what: str, name: str, job: str = "next token", **more: Any) -> dict[str, Any]:
        drive = folder / "drives" / name
        drive.mkdir(parents=True)
        arguments = NVME | WHAT[what] | {"nvme_path": str(drive)}
        return launches.cell("zero", job, 2) | {"name": name, "arguments": arguments} | more

    one = [single(name="next token"), single() | saves("single"), launches.cell("single", "SFT with LoRA", 1)]
    found = launches.run(one)
    found["SFT with LoRA"] = found[one[2]["name"]]
    two = [swapping("both", "both, SFT with LoRA", "SFT with LoRA"), swapping("both", "sharded", sharded=True)]
    two[1] |= saves("sharded") | {"name": "sharded saves"}
    for what in WHAT:
        two += [
            swapping(what, what),
            swapping(what, f"{what} saves", **{k: v for k, v in saves(what).items() if k != "name"}),
            swapping(what, f"{what} resumes single", resume=str(folder / "single.ckpt")),
            swapping(what, f"{what} resumes {what}", resume=str(folder / f"{what}.ckpt")),
        ]
    found |= launches.run(two, timeout=2400)
    last = [single(name=f"single resumes {name}", resume=str(folder / f"{name}.ckpt")) for name in (*WHAT, "sharded")]
    return found | launches.run(last)


@pytest.mark.parametrize("what", WHAT)
def test_it_trains_what_one_process_trains(what: str, results: Results) -> None:
    """With accumulation and clipping."""
    assert len(results[what]["losses"]) == STEPS
    loss, weights = difference(results[what], results["next token"])
    print(what, f"{loss:.0e}, {weights:.0e}")
    assert loss <= LOSS
    assert weights <= WEIGHTS
    assert results[what]["norms"] == pytest.approx(results["next token"]["norms"], rel=1e-5)


@pytest.mark.parametrize("what", WHAT)
def test_the_parts_were_in_files(what: str, results: Results) -> None:
    files = results[what]["files"]
    for rank in (0, 1):
        own = {Path(name).name: size for name, size in files.items() if f"/rank{rank}/" in name}
        for state in ("exp_avg-", "exp_avg_sq-"):
            sizes = [size for name, size in own.items() if name.startswith(state)]
            assert len(sizes) == 3
            assert sum(sizes) >= 4 * IN_FILES
        weights = [size for name, size in own.items() if name.endswith("_param.tensor.swp")]
        assert len(weights) == (6 if what == "both" else 0)
    assert results[what]["absent"] == (IN_FILES if what == "both" else 0)  # of the weights, between their uses


def test_frozen_weights_in_files(results: Results) -> None:
    result = results["both, SFT with LoRA"]
    assert result["absent"] == IN_FILES
    loss, weights = difference(result, results["SFT with LoRA"])
    assert loss <= LOSS
    assert weights <= WEIGHTS


@pytest.mark.parametrize(
    "name",
    [f"{what} resumes {saved}" for what in WHAT for saved in ("single", what)]
    + [f"single resumes {saved}" for saved in (*WHAT, "sharded")],
)
def test_what_is_saved_under_one_is_resumed_under_the_other(name: str, results: Results) -> None:
    assert len(results[name]["losses"]) == STEPS - SAVED_AFTER
    loss, weights = difference(results[name], results["next token"])
    print(name, f"{loss:.0e}, {weights:.0e}")
    assert loss <= LOSS
    assert weights <= WEIGHTS


def test_what_is_needed_to_compile_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_deepspeed()
    from deepspeed.ops.op_builder import AsyncIOBuilder

    refuse_without_libaio()
    monkeypatch.setattr(AsyncIOBuilder, "is_compatible", lambda self, verbose: False)
    with pytest.raises(ValueError, match=r"something is missing: apt install libaio-dev$"):
        refuse_without_libaio()


def test_no_files_are_left(results: Results, folder: Path) -> None:
    assert len(list((folder / "drives").iterdir())) == 10
    assert not list((folder / "drives").glob("*/*"))
