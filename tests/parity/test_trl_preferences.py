"""Preference losses and gradients: those of TRL's DPOTrainer on the same weights, reference and pairs.

TRL's side is in fp64: in fp32 its sums over tokens are too far from the truth to say something of 1e-6.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from llm_modules.batch import ObjectiveOutput, PairScores
from llm_modules.data import PreferenceDataModule
from llm_modules.language_model import LanguageModelModule
from llm_modules.objectives import APO, CPO, DPO, IPO, ORPO, SPPO, Hinge, PreferenceObjective, SimPO
from llm_modules.preference import PreferenceModule
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone
from tests.parity.test_trl_sft import LLAMA, TEMPLATE

PAIRS, LENGTH = 8, 96
OBJECTIVES: dict[str, tuple[PreferenceObjective, dict[str, Any]]] = {
    "DPO": (DPO(beta=0.1), {"loss_type": ["sigmoid"], "beta": 0.1}),
    "robust": (DPO(0.1, 0.2, robust=True), {"loss_type": ["robust"], "beta": 0.1, "label_smoothing": 0.2}),
    "by token": (DPO(beta=2.0, length_normalized=True), {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
    "hinge": (Hinge(beta=0.1), {"loss_type": ["hinge"], "beta": 0.1}),
    "IPO": (IPO(beta=0.1), {"loss_type": ["ipo"], "beta": 0.1}),
    "SPPO": (SPPO(beta=0.1), {"loss_type": ["sppo_hard"], "beta": 0.1}),
    "APO zero": (APO(beta=0.1), {"loss_type": ["apo_zero"], "beta": 0.1}),
    "APO down": (APO(beta=0.1, kind="down"), {"loss_type": ["apo_down"], "beta": 0.1}),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``policy/`` and ``reference/`` (weights that differ, tokenizer with template) and ``rows.jsonl``."""
    path = tmp_path_factory.mktemp("trl")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for seed, name in enumerate(("policy", "reference"), 3):
        made = LanguageModelModule(Backbone(config=LLAMA), sequence_length=LENGTH, seed=seed)
        made.configure_model()
        assert made.model is not None
        with torch.no_grad():
            for parameter in made.model.parameters():
                parameter.mul_(1.5)
        made.export(path / name)
        tokenizer.save_pretrained(path / name)
    words = "the quick brown fox jumps over a lazy dog and runs away".split()
    rows = [
        {
            "prompt": f"{i}: " + " ".join(words[i % 7 :][: 1 + i % 3]),
            "chosen": " ".join(words[i % 3 :][: 1 + (7 * i) % 5]) + f" {i}",
            "rejected": " ".join(words[i % 5 :][: 1 + (3 * i) % 7]) + " no",
        }
        for i in range(PAIRS)
    ]
    (path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ours(folder: Path, objective: PreferenceObjective, packing: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    module = PreferenceModule(
        Backbone(source=str(folder / "policy")),
        objective,
        tokenizer=str(folder / "policy"),
        sequence_length=LENGTH,
        reference="copy",
    )
    module.configure_model()
    assert module.model is not None
    if objective.needs_reference:
        reference = Backbone(source=str(folder / "reference"))
        built = reference.build(tokenizer=module.tokenizer, sequence_length=LENGTH, seed=0)
        module._copy = (built.requires_grad_(False),)
    (batch,) = loaded(folder, packing).train_dataloader()
    assert batch.pairs == PAIRS
    counts = batch.counts()
    output = module.objective_step(batch)
    loss = sum(term.weight * term.sum / counts[term.count] for term in output.terms.values())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    assert logged(module, output, counts) == pytest.approx(float(loss.detach()), rel=1e-6)
    return loss.detach(), {n: p.grad for n, p in module.model.hf.named_parameters() if p.grad is not None}


def logged(module: PreferenceModule, output: ObjectiveOutput, counts: dict[str, float]) -> float:
    """The `val/loss` of what is held out, which is as TRL logs it the total of all terms."""
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    found: dict[str, float] = {}
    module.log = lambda name, value, **_: found.update({name: value})  # type: ignore[method-assign,assignment,misc]
    module._add_evaluation("val", output, counts)
    module._log_evaluation("val")
    return found["val/loss"]


def loaded(folder: Path, packing: str) -> PreferenceDataModule:
    data = PreferenceDataModule(
        sources=[{"path": str(folder / "rows.jsonl")}],  # type: ignore[list-item]
        tokenizer=str(folder / "policy"),
        sequence_length=LENGTH,
        batch_size=PAIRS,
        validation_fraction=0.0,
        packing=packing,  # type: ignore[arg-type]
        cache_dir=str(folder / "cache"),
    )
    data.prepare_data()
    data.setup("fit")
    return data


def theirs(folder: Path, arguments: dict[str, Any]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    messages = [
        {"prompt": [{"role": "user", "content": row["prompt"]}]}
        | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
        for row in rows
    ]
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64),
        ref_model=AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=torch.float64),
        args=DPOConfig(
            output_dir=str(folder / "peer"),
            max_length=LENGTH,
            per_device_train_batch_size=PAIRS,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            **arguments,
        ),
        train_dataset=datasets.Dataset.from_list(messages),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


def assert_same(
    folder: Path, objective: PreferenceObjective, expected: torch.Tensor, gradients: dict[str, torch.Tensor]
) -> None:
    """Our loss and gradients, packed and padded, are those."""
    for packing in ("batch", "none"):
        loss, found = ours(folder, objective, packing)
        assert loss == pytest.approx(float(expected), rel=1e-6, abs=1e-6), packing
        assert found.keys() == gradients.keys()
        whole = torch.cat([g.flatten() for g in gradients.values()]).norm()
        apart = torch.cat([(found[key] - g).flatten() for key, g in gradients.items()]).norm()
        assert whole > 1e-3
        assert apart <= 1e-5 * whole, packing


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_trl(name: str, folder: Path) -> None:
    pytest.importorskip("trl")
    objective, arguments = OBJECTIVES[name]
    expected, gradients = theirs(folder, arguments)
    if name in ("DPO", "by token"):
        assert abs(float(expected) - math.log(2)) > 0.01  # the margins count
    assert_same(folder, objective, expected, gradients)


def scores() -> PairScores:
    generator = torch.Generator().manual_seed(0)
    values = [-8 * torch.rand(6, generator=generator) - 0.01 for _ in range(4)]
    tokens = [torch.randint(1, 9, (6,), generator=generator).float() for _ in range(2)]
    return PairScores(values[0].requires_grad_(), values[1].requires_grad_(), *tokens, *values[2:])


WITHOUT_REFERENCE: dict[str, tuple[PreferenceObjective, str, dict[str, Any]]] = {
    "CPO": (CPO(0.4, alpha=0.7), "CPO", {"loss_type": "sigmoid", "beta": 0.4, "cpo_alpha": 0.7}),
    "SimPO": (SimPO(2.5, 1.2), "CPO", {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.2, "cpo_alpha": 0.0}),
    "ORPO": (ORPO(0.3), "ORPO", {"beta": 0.3}),
}


def theirs_without_reference(
    folder: Path, kind: str, arguments: dict[str, Any]
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Of TRL's trainer in fp64, on our padded tokens: these trainers tokenize without a chat template."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    config, trainer = {"CPO": (CPOConfig, CPOTrainer), "ORPO": (ORPOConfig, ORPOTrainer)}[kind]
    made = trainer(
        model=AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64),
        args=config(
            output_dir=str(folder / "peer"), max_length=LENGTH, per_device_train_batch_size=PAIRS,
            gradient_checkpointing=False, bf16=False, use_cpu=True, report_to=[], disable_tqdm=True, **arguments,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
        processing_class=AutoTokenizer.from_pretrained(folder / "policy"),
    )  # fmt: skip
    (own,) = loaded(folder, "none").train_dataloader()
    seen = torch.arange(own.input_ids.shape[1]) < own.lengths[:, None]
    batch = {}
    for start, side in enumerate(("chosen", "rejected")):
        for name, values in (("input_ids", own.input_ids), ("attention_mask", seen.long()), ("labels", own.labels)):
            batch[f"{side}_{name}"] = values[start::2]
    made.model.eval()
    loss = made.compute_loss(made.model, batch)
    if kind == "ORPO":  # which takes the prompt into the likelihood; the paper does not (equation 3 and section 4.2)
        ids, mask = batch["chosen_input_ids"], batch["chosen_attention_mask"]
        logits = made.model(ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        of_all, of_answers = (
            torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
            for labels in (ids.masked_fill(mask == 0, -100), batch["chosen_labels"])
        )
        loss = loss - of_all + of_answers
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in made.model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", WITHOUT_REFERENCE)
def test_losses_without_a_reference_are_those_of_trl(name: str, folder: Path) -> None:
    pytest.importorskip("trl")
    objective, kind, arguments = WITHOUT_REFERENCE[name]
    assert_same(folder, objective, *theirs_without_reference(folder, kind, arguments))


def test_conservative_dpo_by_hand() -> None:
    """-(1 - e) log sigmoid(z) - e log sigmoid(-z), in double precision."""
    given = scores()
    found = DPO(beta=0.5, label_smoothing=0.1).losses(given)
    z = 0.5 * ((given[0] - given[4]) - (given[1] - given[5])).detach().double()
    expected = 0.9 * torch.log1p(torch.exp(-z)) + 0.1 * torch.log1p(torch.exp(z))
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_the_divergence_from_the_reference_by_hand() -> None:
    given = scores()
    total, count = DPO()(given).metrics["kl"]
    expected = sum((given[i] - given[i + 4]).double().sum() for i in (0, 1))
    assert (float(total), count) == (pytest.approx(float(expected), rel=1e-6), "tokens")
    assert "kl" not in SimPO()(given._replace(reference_chosen=None, reference_rejected=None)).metrics


@pytest.mark.parametrize(
    "objective", [ORPO(), SimPO(gamma=0.0), IPO(), DPO(length_normalized=True)], ids=lambda o: type(o).__name__
)
def test_rewards_by_token_are_of_what_is_compared(objective: PreferenceObjective) -> None:
    """By token the first pair is the right way round, and its sums are not; of the second it is the other way."""
    counts = torch.tensor([100.0, 10.0]), torch.tensor([10.0, 100.0])
    sums = torch.tensor([-50.0, -20.0]), torch.tensor([-20.0, -50.0])  # -0.5 and -2 a token
    reference = (-0.25 * counts[0], -0.25 * counts[1]) if objective.needs_reference else (None, None)
    found = objective(PairScores(*sums, *counts, *reference))
    right, wrong = objective.losses(PairScores(*sums, *counts, *reference)).tolist()
    assert right < wrong
    chosen, rejected = objective.rewards(PairScores(*sums, *counts, *reference))
    given = torch.tensor([-0.5, -2.0]) + 0.25 * objective.needs_reference
    torch.testing.assert_close(chosen, objective.beta * given)
    torch.testing.assert_close(rejected, objective.beta * given.flip(0))
    assert float(found.metrics["reward_accuracy"][0]) == 1.0
    assert float(found.metrics["reward_margin"][0]) == 0.0


def test_a_certain_answer_has_finite_odds() -> None:
    given = scores()
    certain = given._replace(chosen=torch.zeros(6, requires_grad=True))
    loss = ORPO().losses(certain).sum()
    loss.backward()
    assert loss.isfinite()
    assert certain.chosen.grad is not None
    assert certain.chosen.grad.isfinite().all()
