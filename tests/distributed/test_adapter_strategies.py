"""Every kind of adapter, and adapters on a quantized base, train under every strategy what one process trains.

Or are refused in one line before the first step. Cells share launches; the tables are those of
``llm_modules/strategies/README.md`` (see ``test_strategies.py``).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from recipes.__main__ import main
from tests.distributed.strategy_cells import STEPS
from tests.distributed.test_strategies import LORA, LOSS, SAVED_AFTER, WEIGHTS, Launches, check_table, difference

pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def peft(name: str, **arguments: Any) -> dict[str, Any]:
    return {"adapter": {"class_path": f"peft.{name}", "init_args": arguments}}


ADAPTERS: dict[str, dict[str, Any]] = {
    "DoRA": peft("LoraConfig", r=4, use_dora=True),
    "rsLoRA": peft("LoraConfig", r=4, use_rslora=True),
    "PiSSA": peft("LoraConfig", r=4, init_lora_weights="pissa"),
    "LoRA, head trained": peft("LoraConfig", r=4, modules_to_save=["lm_head"]),
    "AdaLoRA": peft("AdaLoraConfig", init_r=4, target_r=2, tinit=1, tfinal=1, deltaT=1),
    "IA3": peft("IA3Config"),
    "LN tuning": peft("LNTuningConfig"),
    "OFT": peft("OFTConfig", oft_block_size=8),
    "VeRA": peft("VeraConfig", r=8),
    "prefix": peft("PrefixTuningConfig", num_virtual_tokens=5),
    "prompt": peft("PromptTuningConfig", num_virtual_tokens=5),
    "p-tuning": peft("PromptEncoderConfig", num_virtual_tokens=5, encoder_hidden_size=16),
    "bottleneck": {"adapter": {"class_path": "llm_modules.zoo.bottleneck.BottleneckConfig", "init_args": {"size": 8}}},
}
QUANTIZED = {
    f"LoRA on {kind}": {"adapter": LORA, "quantization": kind} for kind in ("nf4", "nf4-double", "fp4", "int8")
}
WORDS = {
    ("fsdp1", "AdaLoRA"): "AdaLoRA prunes by whole weights",
    ("zero3", "AdaLoRA"): "AdaLoRA prunes by whole weights",
    ("tp", "prefix"): "makes keys and values of all heads",
    **{("tp", name): "cannot be split by tensor parallelism" for name in ("DoRA", "AdaLoRA", "IA3", "OFT", "VeRA")},
    **{("tp", name): "a quantized base cannot be split" for name in QUANTIZED},
    **{("fsdp1", name): "FSDP1 lays weights of one dtype end to end" for name in QUANTIZED},
}
"""What is refused, and how."""


@pytest.fixture(scope="module")
def launches(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    jobs = {name: {"stage": "sft", "model": "llama", "backbone": b} for name, b in (ADAPTERS | QUANTIZED).items()}
    return Launches(tmp_path_factory.mktemp("adapters"), jobs)


@pytest.fixture(scope="module")
def reference(launches: Launches) -> dict[str, dict[str, Any]]:
    cells = [launches.cell("single", job, 1) for job in launches.jobs]
    results = launches.run(cells, timeout=1200)
    return {cell["job"]: results[cell["name"]] for cell in cells}


@pytest.mark.parametrize(
    ("jobs", "strategies"),
    [
        (list(ADAPTERS), ("fsdp2", "fsdp1", "zero3", "tp")),
        (list(QUANTIZED), ("ddp", "fsdp2", "fsdp1", "zero2", "zero3", "tp")),
    ],
    ids=["adapters", "quantized"],
)
def test_every_adapter_trains_what_one_process_trains(
    jobs: list[str], strategies: tuple[str, ...], launches: Launches, reference: dict[str, dict[str, Any]]
) -> None:
    cells = [launches.cell(name, job, 2) for name in strategies for job in jobs]
    results = launches.run(cells, timeout=1200)
    table: dict[str, dict[str, str]] = {}
    for cell in cells:
        result, expected, row = results[cell["name"]], reference[cell["job"]], table.setdefault(cell["job"], {})
        words = WORDS.get((cell["strategy"], cell["job"]))
        if words is not None or "refused" in result:
            assert words in result.get("refused", "trained"), (cell["name"], result.get("refused"))
            assert "\n" not in result["refused"]
            row[cell["strategy"]] = "refused"
            continue
        assert len(result["losses"]) == STEPS
        assert expected["losses"][0] != expected["losses"][-1]
        loss, weights = difference(result, expected)
        norm = max(abs(a - b) / b for a, b in zip(result["norms"], expected["norms"], strict=True))
        assert loss <= LOSS, cell
        assert weights <= WEIGHTS, cell
        assert norm <= 1e-5, cell
        row[cell["strategy"]] = f"{loss:.0e}, {weights:.0e}"
    check_table("adapters" if jobs == list(ADAPTERS) else "quantized bases", table)


@pytest.mark.parametrize("job", ["LoRA on nf4-double", "AdaLoRA"])
def test_what_one_saves_the_others_resume_and_export(
    job: str, launches: Launches, reference: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    layouts = ((1, "single"), (2, "ddp"), (2, "fsdp2"))
    saved = {name: str(tmp_path / f"{name}.ckpt") for _, name in layouts}
    for world in (1, 2):
        cells = [
            launches.cell(name, job, world, steps=SAVED_AFTER, save=saved[name])
            for size, name in layouts
            if size == world
        ]
        launches.run(cells, timeout=1200)
    for world in (1, 2):
        cells = [
            launches.cell(name, job, world, resume=path)
            for size, name in layouts
            if size == world
            for source, path in saved.items()
            if source != name
        ]
        results = launches.run(cells, timeout=1200)
        for cell in cells:
            assert len(results[cell["name"]]["losses"]) == STEPS - SAVED_AFTER, cell
            loss, weights = difference(results[cell["name"]], reference[job])
            assert loss <= LOSS, cell
            assert weights <= WEIGHTS, cell
    for words, file in (([], "adapter_model.safetensors"), (["--merge"], "model.safetensors")):
        folders = {name: tmp_path / f"{name}{len(words)}" for name in saved}
        for name, path in saved.items():
            assert main(["export", path, str(folders[name]), *words]) == 0
        expected = load_file(folders["single"] / file)
        for folder in folders.values():
            exported = load_file(folder / file)
            assert exported.keys() == expected.keys()
            for key, value in exported.items():
                torch.testing.assert_close(value, expected[key], rtol=0, atol=WEIGHTS, msg=f"{folder.name} {key}")
