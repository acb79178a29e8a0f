"""Reward models: one step's gradient over micro-batches, packing, shared prompts and checkpointing."""

from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Trainer
from torch import Tensor

from llm_modules import RewardModule
from llm_modules.data import PreferenceDataModule
from llm_modules.objectives import BradleyTerry
from llm_modules.zoo import Backbone
from tests.invariance.gradients import LLAMA, KeepGradients
from tests.invariance.test_gradient_invariance import assert_same_gradient
from tests.invariance.test_preference_invariance import REFERENCE, VARIANTS, Moved, write_pairs


def gradient(settings: dict[str, Any]) -> dict[str, Tensor]:
    backbone = Backbone(config=LLAMA, activation_checkpointing=settings.get("activation_checkpointing", False))
    module = RewardModule(backbone, BradleyTerry(0.1), sequence_length=160, seed=1)
    data = PreferenceDataModule(
        sources=[{"path": settings["path"]}],  # type: ignore[list-item]
        batch_size=settings["batch_size"],
        packing=settings["packing"],
        share_prompts=settings.get("share_prompts", True),
        validation_fraction=0.0,
        tokenizer="builtin:bytes",
        chat_template="chatml",
        sequence_length=160,
        seed=1,
        cache_dir=settings["cache"],
    )
    kept = KeepGradients()
    Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        accumulate_grad_batches=settings["accumulate"],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[Moved(), kept],
    ).fit(module, datamodule=data)
    return kept.steps[0]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("reward")
    made = {"path": str(write_pairs(folder)), "cache": str(folder / "cache")}
    return made | {"expected": gradient(made | REFERENCE)}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_process(settings: dict[str, Any], name: str) -> None:
    assert_same_gradient(gradient(settings | REFERENCE | VARIANTS[name]), settings["expected"])
