"""Reward models: loss and gradient of TRL's RewardTrainer; the exported folder is transformers' classifier."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from llm_modules.batch import PreferenceBatch, RewardScores
from llm_modules.data import PreferenceDataModule
from llm_modules.objectives import BradleyTerry, CostModel
from llm_modules.reward import RewardModule
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone
from llm_modules.zoo.reward_model import classifier
from tests.parity.test_trl_sft import LLAMA, TEMPLATE

PAIRS, LENGTH = 8, 96
OBJECTIVES: dict[str, tuple[BradleyTerry, bool, dict[str, Any]]] = {
    "plain": (BradleyTerry(), False, {}),
    "margins": (BradleyTerry(), True, {}),
    "centered": (BradleyTerry(0.05), False, {"center_rewards_coefficient": 0.05}),
}


def rows(margins: bool) -> list[dict[str, Any]]:
    words = "the quick brown fox jumps over a lazy dog and runs away".split()
    return [
        {
            "prompt": f"{i}: " + " ".join(words[i % 7 :][: 1 + i % 3]),
            "chosen": " ".join(words[i % 3 :][: 1 + (7 * i) % 5]) + f" {i}",
            "rejected": " ".join(words[i % 5 :][: 1 + (3 * i) % 7]) + " no",
        }
        | ({"margin": 0.25 * i} if margins else {})
        for i in range(PAIRS)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model/``: a reward model as we export it, lively."""
    path = tmp_path_factory.mktemp("reward")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    module = RewardModule(Backbone(config=LLAMA), sequence_length=LENGTH, seed=3)
    module.configure_model()
    assert module.model is not None
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.mul_(1.5)
    module.export(path / "model")
    tokenizer.save_pretrained(path / "model")
    return path


def made(
    folder: Path, packing: str, margins: bool, objective: BradleyTerry, adapter: Any = None
) -> tuple[RewardModule, PreferenceBatch]:
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows(margins)))
    backbone = Backbone(source=str(folder / "model"), adapter=adapter)
    module = RewardModule(backbone, objective, tokenizer=str(folder / "model"), sequence_length=LENGTH)
    module.configure_model()
    data = PreferenceDataModule(
        sources=[{"path": str(folder / "rows.jsonl")}],  # type: ignore[list-item]
        tokenizer=str(folder / "model"),
        sequence_length=LENGTH,
        batch_size=PAIRS,
        validation_fraction=0.0,
        packing=packing,  # type: ignore[arg-type]
        cache_dir=str(folder / "cache"),
    )
    data.prepare_data()
    data.setup("fit")
    (batch,) = data.train_dataloader()
    return module, batch


def theirs(folder: Path, margins: bool, arguments: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    import datasets
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    messages = [
        {
            side: [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[side]}]
            for side in ("chosen", "rejected")
        }
        | {key: row[key] for key in ("margin",) if key in row}
        for row in rows(margins)
    ]
    trainer = RewardTrainer(
        model=AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float64),
        args=RewardConfig(
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
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    (batch,) = trainer.get_train_dataloader()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in trainer.model.named_parameters() if p.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradient_are_those_of_trl(name: str, folder: Path) -> None:
    pytest.importorskip("trl")
    objective, margins, arguments = OBJECTIVES[name]
    expected, gradients = theirs(folder, margins, arguments)
    for packing in ("batch", "none"):
        module, batch = made(folder, packing, margins, objective)
        assert module.model is not None
        output = module.objective_step(batch)
        loss = output.terms["loss"].sum / batch.pairs
        loss.backward()
        assert float(loss) == pytest.approx(float(expected), rel=1e-6, abs=1e-6), packing
        found = {n.replace("lm_head", "score"): p.grad for n, p in module.model.hf.named_parameters()}
        assert found.keys() == gradients.keys()
        whole = torch.cat([g.flatten() for g in gradients.values()]).norm()
        apart = torch.cat([(found[key] - g).flatten() for key, g in gradients.items()]).norm()  # type: ignore[operator]
        assert whole > 1e-3
        assert apart <= 1e-5 * whole, packing


def test_the_folder_is_a_classifier_whose_logit_is_the_score(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    module, batch = made(folder, "batch", False, BradleyTerry())
    with torch.no_grad():
        scores = module.scores(batch)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "model").eval()
    with torch.no_grad():
        chosen, rejected = read_by(model, folder, batch)
    torch.testing.assert_close(chosen, scores.chosen, rtol=0, atol=1e-6)
    torch.testing.assert_close(rejected, scores.rejected, rtol=0, atol=1e-6)
    assert scores.chosen.std() > 0.1


def read_by(model: Any, folder: Path, batch: PreferenceBatch) -> tuple[Tensor, Tensor]:
    """What transformers' classifier says of the chosen and the rejected answers of a batch, one text at a time."""
    from transformers import AutoTokenizer

    tokenizer, given = AutoTokenizer.from_pretrained(folder / "model"), rows(False)
    said = []
    for place in batch.rows:
        for side in ("chosen", "rejected"):
            talk = [{"role": "user", "content": given[place]["prompt"]}]
            talk += [{"role": "assistant", "content": given[place][side]}]
            said.append(model(tokenizer.apply_chat_template(talk, return_tensors="pt")["input_ids"]).logits.squeeze())
    return torch.stack(said[::2]), torch.stack(said[1::2])


def test_lora_is_that_of_peft_for_sequence_classification(folder: Path, tmp_path: Path) -> None:
    """On the same weights the same loss and gradients, the head's too; what is exported, merged, says the same."""
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForSequenceClassification

    arguments = {"r": 4, "lora_alpha": 8}
    module, batch = made(
        folder, "batch", False, BradleyTerry(), {"class_path": "peft.LoraConfig", "init_args": arguments}
    )
    assert module.model is not None
    ours = {name: p for name, p in module.model.hf.named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in ours.values():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    loss = module.objective_step(batch).terms["loss"].sum / batch.pairs
    loss.backward()
    base = AutoModelForSequenceClassification.from_pretrained(folder / "model", dtype=torch.float64)
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", **arguments)
    plain = peft.get_peft_model(base, config).eval()
    head = "score.modules_to_save.default.weight"
    theirs = {name.replace(head, "lm_head.weight"): p for name, p in base.named_parameters() if p.requires_grad}
    assert ours.keys() == theirs.keys()
    with torch.no_grad():
        for name, parameter in theirs.items():
            parameter.copy_(ours[name])
    chosen, rejected = read_by(plain, folder, batch)
    expected = -logsigmoid(chosen - rejected).mean()
    expected.backward()
    assert float(loss) == pytest.approx(float(expected), rel=1e-6)
    whole = torch.cat([p.grad.flatten() for p in theirs.values()]).norm()  # type: ignore[union-attr]
    apart = torch.cat([(ours[n].grad - p.grad).flatten() for n, p in theirs.items()]).norm()  # type: ignore[operator]
    assert apart <= 1e-5 * whole
    assert all(p.grad.norm() > 1e-4 * whole for p in theirs.values())  # type: ignore[union-attr]
    module.export(tmp_path / "merged")
    exported = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float64).eval()
    for found, wanted in zip(read_by(exported, folder, batch), (chosen, rejected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_weights_of_two_dtypes_are_saved_as_they_are() -> None:
    """As in half precision beside a router's bias in fp32."""
    from transformers import AutoConfig

    config = AutoConfig.for_model("llama", **{k: v for k, v in LLAMA.items() if k != "model_type"}, vocab_size=320)
    module = RewardModule(Backbone(config=LLAMA, dtype="bfloat16"), sequence_length=LENGTH, seed=3)
    module.configure_model()
    assert module.model is not None
    state = module.model.hf.state_dict()
    state["model.norm.weight"] = state["model.norm.weight"].float()
    model = classifier(config, state, "lm_head")
    assert (model.model.norm.weight.dtype, model.score.weight.dtype) == (torch.float32, torch.bfloat16)


def test_a_rank_without_rows_scores_nothing(folder: Path) -> None:
    for packing in ("batch", "none"):
        module, _ = made(folder, packing, False, BradleyTerry())
        data = PreferenceDataModule(
            sources=[{"path": str(folder / "rows.jsonl")}],  # type: ignore[list-item]
            tokenizer=str(folder / "model"),
            sequence_length=LENGTH,
            packing=packing,  # type: ignore[arg-type]
            validation_fraction=0.0,
            cache_dir=str(folder / "cache"),
        )
        data.prepare_data()
        data.setup("fit")
        output = module.objective_step(data._collator().empty())
        assert float(output.terms["loss"].sum.detach()) == 0.0
        output.terms["loss"].sum.backward()


def values(*safe: tuple[float, float]) -> Tensor:
    return torch.tensor([[float("nan"), *pair] for pair in safe])


def test_the_cost_is_that_of_safe_rlhf() -> None:
    """Equation 7: with ``w`` the more harmful answer, and s = +1 for harm, -1 for none."""
    chosen, rejected = torch.tensor([-0.3, 0.7]), torch.tensor([1.1, 0.2])
    scores = RewardScores(chosen, rejected, values((1, 0), (0, 0)))
    sign = torch.tensor([[-1.0, 1.0], [1.0, 1.0]])  # chosen, rejected
    expected = -logsigmoid(rejected - chosen) - logsigmoid(sign[:, 0] * chosen) - logsigmoid(sign[:, 1] * rejected)
    torch.testing.assert_close(CostModel().losses(scores), expected)
    by_hand = [0.22041741, 0.55435524, 0.28733532, 0.97407698, 0.40318605, 0.59813887]
    assert CostModel().losses(scores).tolist() == pytest.approx([sum(by_hand[:3]), sum(by_hand[3:])], abs=1e-6)
    torch.testing.assert_close(CostModel(signs=0).losses(scores), -logsigmoid(rejected - chosen))
    output = CostModel()(scores)
    assert float(output.metrics["accuracy"][0]) == 1.0
    with pytest.raises(ValueError, match="CostModel needs the columns chosen_safe and rejected_safe"):
        CostModel().losses(RewardScores(chosen, rejected, values((1, 0), (0, float("nan")))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BradleyTerry(-1), r"objective.centering: -1 is negative"),
        (lambda: CostModel(-1), r"objective.signs: -1 is negative"),
    ],
)
def test_settings_that_make_no_sense(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
