"""Samples, safety in training and in `validate`, and `predict` under strategies that spread the weights: as in one
process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cli.test_safety import RECIPE
from tests.ranks import run_command, said

pytestmark = [pytest.mark.slow, pytest.mark.cluster]

STRATEGIES = ("fsdp2", "fsdp1", "zero3", "tp")
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": "all-linear"}}


def write(folder: Path, adapter: bool) -> None:
    folder.mkdir()
    words = (("rob", "I can't."), ("sing", "La la."))
    chat = [{"prompt": f"{word} {i}", "completion": answer} for i in range(40) for word, answer in words]
    asked = [{"prompt": f"{word} {i}", "label": label, "category": label} for i in range(40, 44) for word, label in
             (("rob", "unsafe"), ("sing", "safe"))]  # fmt: skip
    for name, rows in (("chat", chat), ("asked", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config: dict[str, Any] = yaml.safe_load(RECIPE)
    config["model"]["init_args"]["backbone"]["config"] |= {"num_key_value_heads": 2, "tie_word_embeddings": True}
    config["model"]["init_args"]["generator"] = {"max_new_tokens": 8}
    if adapter:
        config["model"]["init_args"]["backbone"]["adapter"] = LORA
        # Of matrices that begin at zero Adam makes large steps of rounding.
        config["model"]["init_args"]["optimizer"]["init_args"]["eps"] = 1e-3
    config["trainer"] |= {"max_steps": 40, "val_check_interval": 20}
    samples = {"prompts": [[{"role": "user", "content": "sing 50"}], "rob"], "generator": {"max_new_tokens": 8}}
    config["trainer"]["callbacks"].append({"class_path": "callbacks.Samples", "init_args": samples})
    (folder / "safe.yaml").write_text(yaml.safe_dump(config))


def results(folder: Path, ranks: int, *words: str) -> tuple[str, str, dict[str, float], str]:
    """safety.csv, samples.jsonl, what validate measures, and the predictions, of one run."""
    spread = (*words, *(("--trainer.devices", str(ranks)) if ranks > 1 else ()))
    for verb in ("fit", "validate", "predict"):
        more = ("--ckpt_path", "best") if verb != "fit" else ()
        command = [verb, "-c", "safe", *spread, *more]
        assert set(run_command(folder, command, ranks)) == {0}, f"{verb}: {said(folder)}"
    run = folder / "runs/safe/0"
    measured = json.loads((run / "validate.json").read_text())["metrics"][0]
    safety = {name: value for name, value in measured.items() if name.startswith("safety/")}
    texts = [(run / name).read_text() for name in ("safety.csv", "samples.jsonl", "predictions.jsonl")]
    return texts[0], texts[1], safety, texts[2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """By whether there is an adapter."""
    folder, found = tmp_path_factory.mktemp("alone"), {}
    for adapter in (False, True):
        write(folder / str(adapter), adapter)
        found[adapter] = results(folder / str(adapter), 1)
    return found


@pytest.mark.parametrize(("strategy", "adapter"), [*((name, False) for name in STRATEGIES), ("fsdp2", True)])
def test_two_processes_say_what_one_does(strategy: str, adapter: bool, alone: dict[bool, Any], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, adapter)
    shared = strategy == "tp"  # both ranks have the same rows
    words = ["-c", f"strategies/{strategy}", "--data.batch_size", "8" if shared else "4"]
    found = results(folder, 2, *words)
    safety, samples, measured, predictions = alone[adapter]
    assert len(safety.splitlines()) > 10
    assert len(samples.splitlines()) >= 6
    assert measured
    assert len(predictions.splitlines()) >= 10
    assert found == (safety, samples, measured, predictions)
