"""`recipes check precision`, and the precisions that are refused before training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from recipes.__main__ import main
from recipes.check_precision import keeps_accuracy, overlay

RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 64
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 64, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 64}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
data:
  class_path: llm_modules.data.TextDataModule
  init_args: {sources: [{path: rows.jsonl}], batch_size: 2, packing: documents, validation_fraction: 0.1}
trainer: {max_steps: 8, accelerator: cpu, devices: 1, log_every_n_steps: 1, enable_progress_bar: false}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    rows = [json.dumps({"text": f"row number {i}, " * (1 + i % 9)}) for i in range(120)]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n")
    Path("tiny.yaml").write_text(RECIPE)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--trainer.precision", "16-true"], "becomes NaN at the second step on a CPU; write bf16-true or bf16-mixed"),
        (["-c", "precision/16-mixed"], "`trainer.precision` is 16-mixed: a CPU has no fp16 autocast"),
        (["--trainer.precision", "16"], "`trainer.precision` is 16: a CPU has no fp16 autocast"),
        (["--trainer.precision", "transformer-engine"], "Transformer Engine needs a GPU, and this trains on cpu"),
        (
            ["-c", "precision/fp8"],
            "`model.backbone.fp8`: needs a GPU with fp8 (Hopper or later), and this trains on cpu",
        ),
        (["-c", "precision/fp8", "--trainer.precision", "32-true"], "needs bf16 beside it"),
        (
            ["-c", "strategies/tp", "--model.backbone.fp8", "emulated"],
            "`model.backbone.fp8`: not with strategy.tensor_parallel 2",
        ),
        (
            [
                "--trainer.plugins",
                "[{class_path: lightning.pytorch.plugins.BitsandbytesPrecision, init_args: {mode: nf4}}]",
            ],
            "BitsandbytesPrecision needs a GPU, and this trains on cpu",
        ),
        # What Lightning refuses by itself.
        (
            ["-c", "strategies/fsdp1", "--trainer.devices", "1", "--trainer.precision", "64-true"],
            "not supported in FSDP",
        ),
        (["-c", "strategies/fsdp2", "--trainer.devices", "1", "--trainer.precision", "64-true"], "does not support"),
        (["-c", "precision/nf4"], "whose weights cannot be trained; add an adapter"),
    ],
)
def test_what_the_device_cannot_do_is_refused(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert main(["fit", "-c", "tiny", *words]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1, err
    assert line in err[0]
    assert not (folder / "runs").exists()


def test_half_precision_may_be_looked_at(capsys: pytest.CaptureFixture[str]) -> None:
    """Only training in it is refused, and only where it is done: a recipe for a GPU can be shown on a laptop."""
    assert main(["fit", "-c", "tiny", "--trainer.precision", "16-true", "--print_config"]) == 0
    assert main(["show", "tiny", "--model", "--trainer.precision", "16-true"]) == 0


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "-c: a recipe must be named"),
        (["-c", "tiny", "--steps", "1"], "--steps 1: at least 2 are asked for"),
        (["-c", "tiny", "--limit", "-1"], "--limit -1.0: a percentage above 0 is asked for"),
        (["-c", "tiny", "--precisions", "bf16-mixt"], "did you mean `precision/bf16-mixed`?"),
        (["-c", "tiny", "--precisions", ","], "--precisions: none is named"),
    ],
)
def test_bad_words(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "precision", *words]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert line in err[0]


def test_inside_a_launcher(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert main(["check", "precision", "-c", "tiny"]) == 2
    assert "start it once, outside of torchrun and srun" in capsys.readouterr().err


def test_what_an_overlay_sets() -> None:
    assert dict(overlay("nf4")) == {
        "trainer.precision": '"bf16-mixed"',
        "model.backbone.quantization": '"nf4"',
        "model.backbone.dtype": '"bfloat16"',
    }
    kept = {name: keeps_accuracy(name) for name in ("bf16-mixed", "16-mixed", "fp8", "bf16-true", "nf4")}
    assert kept == {"bf16-mixed": True, "16-mixed": True, "fp8": True, "bf16-true": False, "nf4": False}


@pytest.mark.slow
@pytest.mark.cluster
def test_the_table(capfd: pytest.CaptureFixture[str], folder: Path) -> None:
    """fp32's loss is that of a fit; what a recipe's own overlay says of the precision is not what is compared with."""
    pytest.importorskip("bitsandbytes")
    names = "16-true,bf16-mixed,nf4"
    words = ["-c", "tiny", "-c", "adapters/lora", "--data.batch_size", "4"]
    check = ["check", "precision", *words, "-c", "precision/bf16-true", "--precisions", names, "--steps", "8"]
    assert main([*check, "--limit", "1e-6"]) == 1
    out, err = capfd.readouterr()
    head, titles, *rows = out.splitlines()
    assert head.startswith("tiny, 8 steps on cpu; loss: mean over the last 2")
    assert titles.split() == ["precision", "loss", "difference", "in", "%", "tokens/s", "peak", "GiB"]
    table = {row.split()[0]: row.split()[1:] for row in rows}
    assert list(table) == ["32-true", "16-true", "bf16-mixed", "nf4"]
    assert table["16-true"][0] == "refused:"
    loss = float(table["32-true"][0])
    for name in ("bf16-mixed", "nf4"):
        other, apart, percent = map(float, table[name][:3])
        assert apart == pytest.approx(other - loss, abs=2e-4)
        assert percent == pytest.approx(100 * apart / loss, abs=0.01)
    assert 0 < abs(float(table["bf16-mixed"][2])) < 1
    assert abs(float(table["nf4"][2])) > abs(float(table["bf16-mixed"][2]))  # a base of 4 bits is another model
    assert all(float(row[-2].replace(",", "")) > 0 for name, row in table.items() if name != "16-true")
    assert all(0.1 < float(row[-1]) < 3 for name, row in table.items() if name != "16-true")
    said = [line for line in err.splitlines() if line.startswith("recipes: ")]
    assert len(said) == 1  # quantized weights are another model's, and are only shown
    assert said[0].startswith("recipes: bf16-mixed: the loss is ")
    assert said[0].endswith(" % from 32-true's, beyond 1e-06 %")
    assert sorted(path.name for path in folder.iterdir()) == ["rows.jsonl", "tiny.yaml"]

    assert main(["fit", *words]) == 0
    with Path("runs/tiny/0/metrics.csv").open(newline="") as file:
        losses = [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert loss == pytest.approx(sum(losses[-2:]) / 2, abs=1e-4)


@pytest.mark.slow
def test_a_reference_that_fails(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "precision", "-c", "tiny", "--data.batch_size", "900"]) == 2
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("recipes: ")]
    assert len(said) == 1
    assert "fewer than the 900 of one optimizer step" in said[0]
