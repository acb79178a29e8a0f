"""KTO's loss and gradient: those of TRL's KTOTrainer on the same weights, reference, answers and mismatched answers.

TRL's side is in fp64, as in ``test_trl_preferences``. It pairs each prompt with the answer of the row before it, as
rows come; so it is given the rows in the order of our step.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from llm_modules.data import LabelledDataModule
from llm_modules.objectives import KTO
from llm_modules.preference import PreferenceModule
from llm_modules.zoo import Backbone
from tests.parity.test_trl_preferences import LENGTH, folder  # noqa: F401 - a fixture

ANSWERS = 8
POLICY, REFERENCE = "reference", "policy"
"""The folders the other way round, so that the reference point is above zero."""
NAMES = ("loss", "reward_point", "entropy")
Found = tuple[list[float], dict[str, torch.Tensor]]
"""The values of ``NAMES``, and the gradient."""


class Keep(Callback):
    """The gradient before the optimizer's step, and the rows of the step in their order."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}
        self.rows: list[int] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.rows += batch.rows

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: Any, optimizer: Any) -> None:
        named = pl_module.model.hf.named_parameters()
        self.gradients = {name: p.grad.detach().clone() for name, p in named if p.grad is not None}


def write_rows(path: Path) -> list[dict[str, Any]]:
    words = "the quick brown fox jumps over a lazy dog and runs away".split()
    rows: list[dict[str, Any]] = [
        {
            "prompt": f"{i}: " + " ".join(words[i % 7 :][: 1 + i % 3]),
            "completion": " ".join(words[i % 3 :][: 1 + (7 * i) % 5]) + f" {i}",
            "label": i % 3 > 0,
        }
        for i in range(ANSWERS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def ours(folder: Path, objective: KTO, packing: str, accumulate: int) -> tuple[Found, list[int]]:  # noqa: F811
    module = PreferenceModule(
        Backbone(source=str(folder / POLICY)),
        objective,
        tokenizer=str(folder / "policy"),
        sequence_length=LENGTH,
        reference="copy",
        log_entropy=True,
    )
    module.configure_model()
    reference = Backbone(source=str(folder / REFERENCE))
    built = reference.build(tokenizer=module.tokenizer, sequence_length=LENGTH, seed=0)
    module._copy = (built.requires_grad_(False),)
    data = LabelledDataModule(
        sources=[{"path": str(folder / "labelled.jsonl")}],  # type: ignore[list-item]
        tokenizer=str(folder / "policy"),
        sequence_length=LENGTH,
        batch_size=ANSWERS // accumulate,
        validation_fraction=0.0,
        packing=packing,  # type: ignore[arg-type]
        cache_dir=str(folder / "cache"),
    )
    kept = Keep()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=1,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[kept],
    )
    trainer.fit(module, datamodule=data)
    return ([float(trainer.callback_metrics[f"train/{name}"]) for name in NAMES], kept.gradients), kept.rows


def theirs(folder: Path, rows: list[dict[str, Any]], weights: tuple[float, float]) -> Found:  # noqa: F811
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import KTOConfig, KTOTrainer

    messages = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": row["completion"]}],
            "label": row["label"],
        }
        for row in rows
    ]
    trainer = KTOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / POLICY, dtype=torch.float64),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / REFERENCE, dtype=torch.float64),
        args=KTOConfig(
            output_dir=str(folder / "peer"),
            max_length=LENGTH,
            per_device_train_batch_size=ANSWERS,
            beta=0.3,
            desirable_weight=weights[0],
            undesirable_weight=weights[1],
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=datasets.Dataset.from_list(messages),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    gradients = {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}
    point, entropy = (trainer._metrics["eval"][name][-1] for name in ("kl", "entropy"))
    return [float(loss.detach()), 0.3 * point, entropy], gradients


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.2, 0.7)])
def test_loss_and_gradient_are_those_of_trl(weights: tuple[float, float], folder: Path) -> None:  # noqa: F811
    pytest.importorskip("trl")
    rows = write_rows(folder / "labelled.jsonl")
    objective = KTO(0.3, *weights)
    first, order = ours(folder, objective, "batch", 1)
    expected, gradients = theirs(folder, [rows[i] for i in order], weights)
    assert expected[1] > 0.01  # it counts
    again = [ours(folder, objective, packing, accumulate)[0] for packing, accumulate in (("none", 1), ("batch", 4))]
    for values, found in (first, *again):
        assert values == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert found.keys() == gradients.keys()
        whole = torch.cat([gradient.flatten() for gradient in gradients.values()]).norm()
        apart = torch.cat([(found[n].double() - gradients[n]).flatten() for n in gradients]).norm()
        assert whole > 1e-3
        assert apart <= 1e-5 * whole
