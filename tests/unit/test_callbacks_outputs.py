"""Samples, MaskAudit, ExportFolder and Memory on a tiny real language model."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from callback_runs import TinyModule, make_trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from callbacks import ExportFolder, MaskAudit, Memory, MetricsCSV, Samples, StepCheckpoint
from callbacks.metrics_csv import read_rows
from llm_modules.generation import Generator
from llm_modules.tokenizer import load_tokenizer


class TinyLanguageModel(pl.LightningModule):
    """A Llama of 50 kB that learns to say `a`, with random numbers in its step."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(load_tokenizer("builtin:bytes")),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
        )
        self.model = LlamaForCausalLM(config)
        self.tokenizer = load_tokenizer("builtin:bytes")
        self.exported: list[dict[str, Any]] = []

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train/loss", loss)
        self.log("random", random.random() + float(torch.rand(())))
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/loss", self.model(input_ids=batch, labels=batch).loss)

    def train_dataloader(self) -> Any:
        ids = self.tokenizer("a" * 12, return_tensors="pt").input_ids
        return torch.utils.data.DataLoader(ids.repeat(16, 1), batch_size=2)

    val_dataloader = train_dataloader

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.03)

    def export(self, folder: Path, info: dict[str, Any]) -> None:
        self.exported.append(info)
        self.model.save_pretrained(folder)


def fit(folder: Path, *callbacks: Any, resume: bool = False, **arguments: Any) -> TinyLanguageModel:
    random.seed(1)
    module = TinyLanguageModel()
    settings: dict[str, Any] = {"max_steps": 16, "limit_val_batches": 1, "val_check_interval": 8} | arguments
    settings.setdefault("checkpoint", StepCheckpoint(every_n_steps=4, keep_last=4))
    trainer = make_trainer(folder, *callbacks, **settings)
    trainer.fit(module, ckpt_path=folder / "checkpoints" / "last.ckpt" if resume else None)
    return module


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


class Drawing(Generator):
    """Uses up random numbers of every kind."""

    def generate(self, *arguments: Any, **named: Any) -> Any:
        random.random()
        torch.rand(())
        return super().generate(*arguments, **named)


def sampler(**arguments: Any) -> Samples:
    return Samples(["aa", "a"], Drawing(max_new_tokens=5), **arguments)


def test_samples_show_what_was_learned_and_do_not_disturb_training(tmp_path: Path) -> None:
    fit(tmp_path / "without")
    fit(tmp_path / "with", sampler(every_n_steps=3))
    rows = samples(tmp_path / "with")
    assert [(row["step"], row["row"]) for row in rows] == [(s, r) for s in (0, 3, 6, 8, 9, 12, 15, 16) for r in (0, 1)]
    assert rows[0]["prompt"] == "aa"
    assert rows[0]["text"] != "aaaaa"
    assert rows[-1]["text"] == "aaaaa"
    assert rows[-1]["finish"] == "length"
    columns = ("train/loss", "val/loss", "random")
    losses = [
        [[row[name] for name in columns] for row in read_rows(tmp_path / name / "metrics.csv")]
        for name in ("without", "with")
    ]
    assert losses[0] == losses[1]


def test_samples_leave_every_module_in_its_mode(tmp_path: Path) -> None:
    modes = []

    class Frozen(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
            pl_module.model.model.norm.eval()

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            modes.append({name for name, module in pl_module.named_modules() if not module.training})

    fit(tmp_path, Frozen(), sampler(every_n_steps=1), limit_val_batches=0, max_steps=4)
    assert modes == [{"model.model.norm"}] * 4


def test_samples_of_a_resumed_run_go_on(tmp_path: Path) -> None:
    fit(tmp_path, sampler(), max_steps=8)
    with (tmp_path / "samples.jsonl").open("a") as file:
        file.write('{"step": 16, "row": 0, "prompt": "of a run that was killed later"}\n{"step": 24, "ro')
    fit(tmp_path, sampler(), resume=True)
    assert [row["step"] for row in samples(tmp_path)] == [0, 0, 8, 8, 16, 16]


def test_samples_go_to_tensorboard_and_take_messages(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="tensorboard")
    messages = [{"role": "user", "content": "<b>a</b>"}]
    callback = Samples(["a", messages], Generator(max_new_tokens=3))
    module = TinyLanguageModel()
    module.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    trainer = make_trainer(tmp_path, callback, logger=[MetricsCSV(tmp_path), logger], max_steps=2)
    trainer.fit(module)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert {tag for tag in events.Tags()["tensors"] if tag.startswith("samples")} == {
        "samples/0/text_summary",
        "samples/1/text_summary",
    }
    assert samples(tmp_path)[1]["prompt"] == messages


def test_samples_refuses_no_prompts() -> None:
    with pytest.raises(ValueError, match=r"Samples.prompts: empty"):
        Samples([])


@dataclass
class Report:
    trained: int = 3
    sample: str = "a [b]"
    fatal: list[str] = field(default_factory=list)

    @property
    def lines(self) -> list[str]:
        return [f"trained {self.trained}"]


class Data(pl.LightningDataModule):
    def __init__(self, fatal: list[str]) -> None:
        super().__init__()
        self.fatal = fatal

    def train_dataloader(self) -> Any:
        return TinyModule(length=8).train_dataloader()

    def audit(self, vocabulary: int | None = None) -> Report:
        return Report(fatal=self.fatal)


def test_mask_audit_prints_writes_and_lets_a_good_run_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_trainer(tmp_path, MaskAudit(), max_steps=1).fit(TinyModule(), datamodule=Data([]))
    assert "trained 3\na [b]\n" in capsys.readouterr().err
    found = json.loads((tmp_path / "audit.json").read_text())
    assert found == {"trained": 3, "sample": "a [b]", "fatal": [], "lines": ["trained 3"]}


def test_mask_audit_stops_a_run_that_cannot_be_meant(tmp_path: Path) -> None:
    module = TinyModule()
    before = module.layer.weight.detach().clone()
    data = Data(["data: no turn end is trained", "data: two"])
    with pytest.raises(ValueError, match=r"^data: no turn end is trained; data: two$"):
        make_trainer(tmp_path, MaskAudit(), max_steps=1).fit(module, datamodule=data)
    assert torch.equal(module.layer.weight, before)
    assert not (tmp_path / "checkpoints").exists()


def test_export_of_the_last_weights_with_what_the_run_knows_of_itself(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    (tmp_path / "config.yaml").write_text("data: {init_args: {sources: [{path: x.txt}]}}\n")
    (tmp_path / "environment.json").write_text('{"recipe": "pretrain/x"}')
    module = fit(tmp_path, ExportFolder())
    (info,) = module.exported
    assert info["recipe"] == "pretrain/x"
    assert info["data"] == [{"path": "x.txt"}]
    assert info["step"] == 16
    assert info["metrics"].keys() == {"val/loss"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export")
    ids = torch.arange(8)[None]
    assert torch.equal(loaded(ids).logits, module.model.eval()(ids).logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoints",
        "config.yaml",
        "environment.json",
        "export",
        "metrics.csv",
    ]


def test_export_of_the_mean_and_of_the_best(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    fit(tmp_path, ExportFolder("average", average=2))
    fit(tmp_path / "best", ExportFolder("best"))
    states = [
        torch.load(tmp_path / "checkpoints" / f"step-{step:08d}.ckpt", weights_only=True)["state_dict"]
        for step in (12, 16)
    ]
    name = "model.embed_tokens.weight"
    mean = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()[name]
    torch.testing.assert_close(mean, (states[0][f"model.{name}"] + states[1][f"model.{name}"]) / 2)
    best = torch.load(tmp_path / "best" / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "best" / "export").state_dict()[name]
    assert torch.equal(found, best[f"model.{name}"])


@pytest.mark.parametrize(
    ("export", "checkpoint", "message"),
    [
        ({"weights": "average"}, {"keep_last": 2}, "3 checkpoints cannot be averaged when checkpoint.keep_last is 2"),
        ({"weights": "best"}, {"keep_best": 0}, "'best' needs checkpoint.keep_best to be 1 or more"),
    ],
)
def test_export_says_before_training_what_will_not_be_there(
    tmp_path: Path, export: Any, checkpoint: Any, message: str
) -> None:
    trainer = make_trainer(tmp_path, ExportFolder(**export), checkpoint=StepCheckpoint(**checkpoint), max_steps=1)
    with pytest.raises(ValueError, match=message):
        trainer.fit(TinyModule())
    assert not (tmp_path / "checkpoints").exists()


def test_memory_sees_a_large_tensor(tmp_path: Path) -> None:
    class Holds(TinyModule):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
            if self.global_step == 1:
                self.held = torch.ones(2**26)  # 0.25 GiB
            elif self.global_step == 2:
                del self.held

    make_trainer(tmp_path, Memory(), max_steps=3).fit(Holds())
    now = [float(row["memory/rss_gib"]) for row in read_rows(tmp_path / "metrics.csv")]
    peak = [float(row["memory/peak_gib"]) for row in read_rows(tmp_path / "metrics.csv")]
    assert 0.2 < now[1] - now[0] < 0.3
    assert now[2] < now[1] - 0.2
    assert peak[1] >= now[1] * 0.99
    assert peak[2] == peak[1]
