"""Distillation: one step's gradient over micro-batches, packing, ranks, heads and what the teacher is.

Bounds of the design: 1e-5 over the whole gradient, 1e-4 for each parameter tensor, relative, in fp32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from llm_modules.data import ConversationDataModule, PrepromptDataModule
from llm_modules.distillation import DistillationModule
from llm_modules.objectives import ForwardKL, GeneralizedJSD, ReverseKL
from llm_modules.zoo import Backbone
from tests.invariance.gradients import LLAMA, KeepGradients, write_rows
from tests.invariance.test_gradient_invariance import assert_same_gradient
from tests.ranks import run_program

TEACHER = LLAMA | {"hidden_size": 48, "num_hidden_layers": 1}
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "lora_alpha": 8}}
KINDS: dict[str, dict[str, Any]] = {
    "a larger teacher": {"teacher": TEACHER, "objective": "JSD"},
    "a preprompt": {"preprompt": "Say it in a friendly way.", "objective": "forward"},
    "a preprompt and LoRA": {"preprompt": "Say it.", "objective": "reverse", "adapter": LORA},
}
OBJECTIVES: dict[str, Any] = {
    "forward": lambda: ForwardKL(temperature=2.0, cross_entropy=0.3),
    "reverse": ReverseKL,
    "JSD": lambda: GeneralizedJSD(0.3),
}
REFERENCE = {"batch_size": 8, "accumulate": 1, "packing": "none"}
VARIANTS: dict[str, dict[str, Any]] = {
    "2x4": {"batch_size": 2, "accumulate": 4},
    "1x8": {"batch_size": 1, "accumulate": 8},
    "packed 8x1": {"packing": "batch"},
    "packed 2x4": {"packing": "batch", "batch_size": 2, "accumulate": 4},
    "plain head, packed": {"packing": "batch", "head": "plain"},
    "checkpointed, packed": {"activation_checkpointing": True, "packing": "batch"},
}


class Moved(Callback):
    """The student is not where its teacher is."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            for number, parameter in enumerate(pl_module.parameters()):
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(number)
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def run(settings: dict[str, Any]) -> tuple[list[dict[str, Tensor]], dict[str, float], Trainer]:
    """Gradients of the optimizer steps, and what was logged."""
    backbone = Backbone(
        config=LLAMA,
        adapter=settings.get("adapter"),
        head=settings.get("head", "chunked"),
        head_chunk=7,
        activation_checkpointing=settings.get("activation_checkpointing", False),
    )
    module = DistillationModule(
        backbone,
        Backbone(config=settings["teacher"]) if "teacher" in settings else None,
        OBJECTIVES[settings["objective"]](),
        reference=settings.get("reference", "auto"),
        sequence_length=160,
        seed=1,
    )
    preprompt = {"preprompt": settings["preprompt"]} if "preprompt" in settings else {}
    kind: Any = PrepromptDataModule if preprompt else ConversationDataModule
    data = kind(
        sources=[{"path": settings["path"]}],
        batch_size=settings["batch_size"],
        packing=settings["packing"],
        validation_fraction=0.0,
        tokenizer="builtin:bytes",
        chat_template="chatml",
        sequence_length=160,
        seed=1,
        cache_dir=settings["cache"],
        **preprompt,
    )
    kept, devices = KeepGradients(), settings.get("devices", 1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=1,
        accumulate_grad_batches=settings["accumulate"],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[Moved(), kept],
    )
    trainer.fit(module, datamodule=data)
    return kept.steps, {name: float(value) for name, value in trainer.callback_metrics.items()}, trainer


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("distillation")
    settings = KINDS[request.param] | {"path": str(write_rows(folder, "sft")), "cache": str(folder / "cache")}
    gradients, logged, _ = run(settings | REFERENCE)
    return settings | {"expected": gradients[0], "logged": logged}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_process(kind: dict[str, Any], name: str) -> None:
    gradients, logged, _ = run(kind | REFERENCE | VARIANTS[name])
    assert_same_gradient(gradients[0], kind["expected"])
    for metric in ("train/loss", "train/kl", "train/nll", "train/teacher_nll"):
        assert logged[metric] == pytest.approx(kind["logged"][metric], rel=1e-5, abs=1e-6)
    assert logged["train/kl"] > 1e-4


@pytest.mark.slow
def test_two_processes(kind: dict[str, Any], tmp_path: Path) -> None:
    settings = {key: value for key, value in kind.items() if key not in ("expected", "logged")} | REFERENCE
    settings |= {"devices": 2, "batch_size": 2, "accumulate": 2, "packing": "batch"}
    run_program(f"{__name__}:save", settings, str(tmp_path / "out.pt"), folder=tmp_path, timeout=300)
    assert_same_gradient(torch.load(tmp_path / "out.pt")[0], kind["expected"])


def test_the_adapter_switched_off_is_the_copy_of_the_base(tmp_path: Path) -> None:
    settings = KINDS["a preprompt and LoRA"] | REFERENCE | {"packing": "batch"}
    settings |= {"path": str(write_rows(tmp_path, "sft")), "cache": str(tmp_path / "cache")}
    off, copy = (run(settings | {"reference": kind}) for kind in ("base", "copy"))
    assert off[1]["train/loss"] == pytest.approx(copy[1]["train/loss"], rel=1e-6)
    assert_same_gradient(off[0][0], copy[0][0])


def save(settings: dict[str, Any], out: str) -> None:
    """For ranks: rank 0 saves what `run` gives."""
    gradients, _, finished = run(settings)
    if finished.is_global_zero:
        torch.save(gradients, out)
