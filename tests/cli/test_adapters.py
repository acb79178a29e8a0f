"""Adapters and quantization through the command: overlays, resume, what leaves, and what is refused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recipes.__main__ import main
from tests.ranks import ROOT, run_command, said

peft = pytest.importorskip("peft")

SHIPPED = ROOT / "configs"
LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
}


def recipe() -> dict[str, Any]:
    return {
        "seed_everything": 7,
        "tokenizer": "builtin:bytes",
        "sequence_length": 64,
        "model": {
            "class_path": "llm_modules.LanguageModelModule",
            "init_args": {
                "backbone": {"config": LLAMA},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                "schedule": {"class_path": "llm_modules.schedules.WarmupCosine", "init_args": {"warmup": 0.1}},
            },
        },
        "data": {
            "class_path": "llm_modules.data.ConversationDataModule",
            "init_args": {
                "sources": [{"path": "rows.jsonl"}],
                "chat_template": "chatml",
                "batch_size": 2,
                "packing": "documents",
                "validation_fraction": 0.2,
            },
        },
        "trainer": {
            "max_steps": 6,
            "accelerator": "cpu",
            "devices": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "accumulate_grad_batches": 2,
            "gradient_clip_val": 1.0,
            "val_check_interval": 4,
            "enable_progress_bar": False,
        },
        "checkpoint": {"every_n_steps": 1, "keep_last": -1},
    }


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LITRECIPES_RUN_FOLDER", raising=False)
    Path("tiny.yaml").write_text(yaml.safe_dump(recipe(), sort_keys=False))
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "word " * (n % 5 + 1)}]}
        for n in range(60)
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def fit(*words: str) -> Path:
    assert main(["fit", "-c", "tiny", *words]) == 0
    return sorted(Path("runs/tiny").iterdir(), key=lambda path: int(path.name))[-1]


def rows_of(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k and k.startswith(("train/", "val/", "step", "lr"))} for row in rows]


OVERLAYS = sorted(path.stem for path in (SHIPPED / "adapters").glob("*.yaml"))


@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_goes_on_top_of_a_recipe(name: str) -> None:
    from llm_modules.zoo import Backbone
    from recipes.compose import compose

    for base in ("sft/quickstart", "pretrain/quickstart"):
        values = compose([base, f"adapters/{name}", "precision/bf16-mixed"]).values
        fields = values["model"]["init_args"]["backbone"]
        assert fields["config"]["model_type"] == "llama"
        if name == "lora-experts":
            with pytest.raises(ValueError, match="matches no parameter; there are no stacked ones in this model"):
                Backbone(**fields).check(vocabulary=260, sequence_length=64, precision="bf16-mixed")
            fields["config"] = {
                "model_type": "mixtral", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
                "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4,
            }  # fmt: skip
        Backbone(**fields).check(vocabulary=260, sequence_length=64, precision="bf16-mixed")


def test_adaloras_penalty_counts_once_an_optimizer_step() -> None:
    """Whatever the accumulation: the difference that it makes to one step of plain gradient descent."""
    from llm_modules.tokenizer import byte_tokenizer
    from llm_modules.zoo import Backbone

    rate, states = 0.1, {}
    for weight in (0.0, 30.0):
        words = ["-c", "adapters/adalora", "--model.backbone.adapter.orth_reg_weight", str(weight)]
        words += ["--model.optimizer", f"{{class_path: torch.optim.SGD, init_args: {{lr: {rate}}}}}"]
        words += ["--model.schedule", "null", "--trainer.gradient_clip_val", "null", "--trainer.max_steps", "1"]
        run = fit(*words)
        states[weight] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    fields = states[30.0]["litrecipes"]["adapter"]["backbone"]
    model = Backbone(**fields).build(tokenizer=byte_tokenizer(), sequence_length=64, seed=7)
    model.adapter.penalty().backward()
    checked = 0
    for name, p in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            made = states[30.0]["state_dict"][f"model.{name}"] - states[0.0]["state_dict"][f"model.{name}"]
            torch.testing.assert_close(made, -rate * p.grad, rtol=1e-3, atol=1e-6)
            checked += int(p.grad.abs().max() > 1e-3)
    assert checked


@pytest.mark.slow
@pytest.mark.parametrize("name", OVERLAYS)
def test_every_overlay_trains_and_leaves(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    header = (SHIPPED / "adapters" / f"{name}.yaml").read_text().splitlines()
    assert f"-c adapters/{name}" in header[1]
    small = {"vera": ["--model.backbone.adapter.r", "16"], "fourierft": ["--model.backbone.adapter.n_frequency", "40"]}
    mixture = "--model.backbone.config.model_type mixtral --model.backbone.config.num_local_experts 4"
    small["lora-experts"] = mixture.split()
    words = ["-c", f"adapters/{name}", "--trainer.max_steps", "2", *small.get(name, [])]
    run = fit(*words)
    assert all(float(row["train/loss"]) > 0 for row in rows_of(run) if row.get("train/loss"))
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert not [key for key in checkpoint["state_dict"] if "embed_tokens" in key]
    assert (run / "export" / "adapter_config.json").is_file()
    capsys.readouterr()
    assert main(["generate", "-m", str(run), "--prompt", "say 3", "--max_new_tokens", "3"]) == 0
    assert main(["export", str(run), "out"]) == 0
    unmerged = name in ("prefix", "prompt", "p-tuning", "bottleneck")
    capsys.readouterr()
    assert main(["export", str(run), "merged", "--merge"]) == (2 if unmerged else 0)
    if unmerged:
        error = capsys.readouterr().err
        assert "cannot be merged" in error
        assert len(error.splitlines()) == 1
        assert not Path("merged").exists()


@pytest.mark.parametrize(
    "kind", ["lora", pytest.param("adalora", marks=pytest.mark.slow), pytest.param("pissa", marks=pytest.mark.slow)]
)
def test_resume_is_exact(kind: str) -> None:
    words = ["-c", f"adapters/{kind}"]
    whole = fit(*words)
    shutil.copytree(whole, "runs/tiny/1", symlinks=True)
    cut = Path("runs/tiny/1")
    for path in (cut / "checkpoints").glob("step-*.ckpt"):
        if int(path.stem[5:]) > 3:
            path.unlink()
    for name in ("last.ckpt", "best.ckpt"):
        (cut / "checkpoints" / name).unlink(missing_ok=True)
    third = cut / "checkpoints" / "step-00000003.ckpt"
    assert main(["fit", "-c", "tiny", *words, "--ckpt_path", str(third)]) == 0
    again = Path("runs/tiny/2")
    expected = [row for row in rows_of(whole) if int(row["step"]) >= 3]
    assert rows_of(again) == expected
    one, other = (torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (whole, again))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


IDS = torch.tensor([[258, *range(40, 60), 259, 1, 2]])


@pytest.mark.parametrize("quantized", [None, pytest.param("nf4", marks=pytest.mark.slow), "int8"])
def test_what_leaves_is_what_was_trained(quantized: str | None) -> None:
    """The unmerged folder in plain peft, and the merged one in plain transformers, against the checkpoint."""
    from transformers import AutoModelForCausalLM

    from llm_modules.tokenizer import byte_tokenizer
    from llm_modules.zoo import Backbone
    from llm_modules.zoo.quantization import quantize

    run = fit("-c", "adapters/lora", "--model.backbone.quantization", quantized or "null")
    last = run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert last.stat().st_size < 400_000
    backbone = Backbone(**checkpoint["litrecipes"]["adapter"]["backbone"])
    trained = backbone.build(tokenizer=byte_tokenizer(), sequence_length=64, seed=7)
    trained.load_state_dict({name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()})
    with torch.no_grad():
        expected = trained.eval().hf(IDS).logits
        assert main(["export", str(run), "out", "--which", "last"]) == 0
        assert main(["export", str(run), "merged", "--which", "last", "--merge"]) == 0
        merged = AutoModelForCausalLM.from_pretrained("merged", attn_implementation="eager").eval()
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=2e-6)
        base = AutoModelForCausalLM.from_pretrained("out/base", attn_implementation="eager")
        if quantized:
            quantize(base, quantized, torch.float32)  # type: ignore[arg-type]
        plain = peft.PeftModel.from_pretrained(base, "out").eval()
        torch.testing.assert_close(plain(input_ids=IDS).logits, expected, rtol=1e-5, atol=2e-6)
    assert {path.name for path in Path("merged").iterdir()} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert not Path("merged/adapter_config.json").exists()
    config = json.loads(Path("out/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(Path("out/base").absolute())
    card = Path("out/README.md").read_text()
    assert "library_name: peft" in card
    assert "Base model: random weights of seed 7" in card
    assert main(["export", str(run), "half", "--merge", "--dtype", "bfloat16"]) == 0
    assert AutoModelForCausalLM.from_pretrained("half").dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4", "int8"])
def test_quantized_overlays_train_and_their_exports_say_the_same(kind: str) -> None:
    """In bf16, so to the rounding of bf16: what `generate` opens, and the merged model."""
    from transformers import AutoModelForCausalLM

    from llm_modules.zoo import open_adapter

    run = fit("-c", "adapters/lora", "-c", f"precision/{kind}", "--trainer.max_steps", "40")
    losses = [float(row["train/loss"]) for row in rows_of(run) if row.get("train/loss")]
    assert losses[-1] < 0.85 * losses[0]
    assert main(["export", str(run), "merged", "--merge", "--which", "last"]) == 0
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = open_adapter(run / "export").eval()(IDS).logits.float()
        merged = AutoModelForCausalLM.from_pretrained("merged").eval()(IDS).logits.float()
    assert (merged - expected).abs().max() < 0.06 * expected.abs().max()
    assert (merged - expected).abs().mean() < 0.02 * expected.abs().mean()


@pytest.mark.slow
@pytest.mark.parametrize("words", [["adapters/lora"], ["adapters/adalora"], ["adapters/lora", "precision/nf4"]])
def test_two_processes_train_what_one_does(words: list[str]) -> None:
    """DistributedDataParallel, the window's micro-batches dealt to two ranks instead of one after another."""
    flags = [word for name in words for word in ("-c", name)]
    flags += ["--trainer.max_steps", "3", "--trainer.precision", "32-true", "--model.backbone.dtype", "float32"]
    one = fit(*flags)
    command = ["fit", "-c", "tiny", *flags, "-c", "strategies/ddp", "--trainer.devices", "2"]
    command += ["--trainer.accumulate_grad_batches", "1", "--trainer.val_check_interval", "2"]
    assert run_command(Path.cwd(), command) == [0, 0], said(Path.cwd())
    two = Path("runs/tiny/1")
    states = [torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"] for run in (one, two)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=0, atol=2e-5, msg=name)
    losses = [[float(row["train/loss"]) for row in rows_of(run) if row.get("train/loss")] for run in (one, two)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-6)


def test_show_counts_what_is_trained(capsys: pytest.CaptureFixture[str]) -> None:
    size = ["--model.backbone.config.hidden_size", "8192", "--model.backbone.config.intermediate_size", "8192"]
    weights = {}
    for overlay in ("bf16-true", "nf4", "int8"):
        words = ["-c", "adapters/lora", "-c", f"precision/{overlay}", *size]
        assert main(["show", "tiny", *words, "--model"]) == 0
        text = capsys.readouterr().out
        line = next(line for line in text.splitlines() if line.startswith("trained "))
        # Seven linear layers, 16 x (in + out) each.
        widths = [(8192, 8192), (8192, 4096), (8192, 4096), (8192, 8192), *[(8192, 8192)] * 3]
        assert f"{16 * sum(a + b for a, b in widths):,} (" in line
        weights[overlay] = float(text.split("(weights ")[1].split(",")[0])
        assert "gradients 0.0" in text
    linear, rest = sum(a * b for a, b in widths), 2 * 320 * 8192
    assert weights["bf16-true"] == pytest.approx(2 * (linear + rest) / 2**30, abs=0.02)
    assert weights["int8"] == pytest.approx((linear + 2 * rest) / 2**30, abs=0.02)
    assert weights["nf4"] == pytest.approx((0.5625 * linear + 2 * rest) / 2**30, abs=0.02)


# --- mistakes


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert main([*words]) == 2
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("recipes: ")]
    assert len(said) == 1, error
    assert "Traceback" not in error
    assert sorted(Path.cwd().rglob("*")) == before
    return said[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-c", "adapters/lra"], "adapters/lra: no such config (did you mean `adapters/lora`?)"),
        (["--model.backbone.adapter", "peft.LoraConfg"], "did you mean 'LoraConfig'?"),
        (["-c", "adapters/lora", "--model.backbone.adapter.rank", "8"], "LoraConfig has no argument 'rank'"),
        (
            ["-c", "adapters/lora", "--model.backbone.adapter.target_modules", "[q_prj]"],
            "backbone.adapter.target_modules: 'q_prj' matches no module (did you mean 'q_proj'?); there are ",
        ),
        (["--model.backbone.adapter", "runs/nowhere"], "backbone.adapter: no folder 'runs/nowhere'"),
        (["--model.backbone.adapter", "3"], "`model.init_args.backbone.adapter` is 3; allowed: "),
        (["-c", "precision/nf4"], "quantization` is nf4, whose weights cannot be trained; add an adapter"),
        (["-c", "adapters/lora", "--model.backbone.quantization", "nf5"], "is 'nf5'; allowed: nf4 or nf4-double or "),
        (["-c", "adapters/pissa", "-c", "precision/nf4"], "changes the base's weights, which"),
        (["-c", "adapters/prefix", "--model.backbone.attention", "sdpa"], "prefix tuning needs 'packed'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "fit", "-c", "tiny", *words)


def test_an_adapter_on_another_base_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    run = fit("-c", "adapters/lora", "--trainer.max_steps", "1")
    checkpoint = str(run / "checkpoints" / "step-00000001.ckpt")
    lora = ["-c", "adapters/lora"]
    capsys.readouterr()
    for more, message in (
        ([*lora, "--seed_everything", "8"], "the adapter's base is random weights of seed 7 (weights "),
        ([*lora, "--model.backbone.adapter.r", "8"], "a checkpoint of another model: adapter.r 16 -> 8"),
        (["-c", "adapters/ia3"], "a checkpoint of another model: "),
        ([*lora, "-c", "precision/nf4"], "the adapter's base is "),
    ):
        assert main(["fit", "-c", "tiny", *more, "--ckpt_path", checkpoint]) == 2
        error = capsys.readouterr().err
        assert message in error, error
        assert "Traceback" not in error
    adapter = str((run / "export").absolute())
    words = ["fit", "-c", "tiny", "--model.backbone.adapter", adapter]
    assert main([*words, "--seed_everything", "8"]) == 2
    assert "not random weights of seed 8" in capsys.readouterr().err
    assert main([*words, "--trainer.max_steps", "1"]) == 0  # and on its own it goes on
    newest = sorted(Path("runs/tiny").iterdir(), key=lambda path: int(path.name))[-1]
    assert main(["export", str(newest), "out"]) == 0


def test_export_refuses_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["fit", "-c", "tiny", "--trainer.max_steps", "1"]) == 0
    assert "holds a whole model, no adapter" in refused(capsys, "export", "runs/tiny/0", "out", "--merge")
    base = tmp_path / "base"
    assert main(["export", "runs/tiny/0", str(base)]) == 0
    run = fit("--model.backbone", f"{{source: {base}, adapter: peft.LoraConfig}}", "--trainer.max_steps", "1")
    assert "--dtype bfloat16: an adapter is written as it was trained" in refused(
        capsys, "export", str(run), "out", "--dtype", "bfloat16"
    )
    assert json.loads((run / "export/adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not (run / "export/base").exists()
    base.rename(tmp_path / "moved")
    assert "say where the base is now with --base" in refused(capsys, "export", str(run), "out")
    assert main(["export", str(run), "out", "--base", str(tmp_path / "moved"), "--merge"]) == 0
    other = tmp_path / "other"
    assert main(["export", "runs/tiny/0", str(other)]) == 0
    weights = other / "model.safetensors"
    from safetensors.torch import load_file, save_file

    state = load_file(weights)
    state["model.norm.weight"] = state["model.norm.weight"] + 0.1
    save_file(state, weights, metadata={"format": "pt"})
    assert "the adapter's base is " in refused(capsys, "export", str(run), "out2", "--base", str(other))
