"""The load-balancing loss of a real step against transformers' own, whose model adds it to its loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from llm_modules.batch import TokenBatch
from llm_modules.objectives.balance import LoadBalance
from llm_modules.zoo.routing import router_statistics, routing_of
from tests.invariance.gradients import run, write_rows
from tests.parity.test_zoo_families import assert_gradients_equal

FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 48},
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 16},
    "qwen3_moe": {"head_dim": 8, "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
}
COMMON: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "router_aux_loss_coef": 0.3,
    "initializer_range": 0.3,
}


def family(name: str, **changes: Any) -> dict[str, Any]:
    return {"model_type": name, **COMMON, **FAMILIES[name], **changes}


class Watch(Callback):
    """Keeps the micro-batches and the weights that they met first."""

    def __init__(self) -> None:
        self.batches: list[TokenBatch] = []
        self.weights: dict[str, Tensor] = {}
        self.hf: Any = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: TokenBatch, batch_idx: int) -> None:
        self.batches.append(batch)
        if not self.weights:
            self.hf = pl_module.model.hf
            self.weights = {name: value.clone() for name, value in self.hf.state_dict().items()}


def step(tmp_path: Path, config: dict[str, Any], **settings: Any) -> tuple[Watch, dict[str, Tensor], dict[str, Any]]:
    """One optimizer step: what it saw, its gradient by name in transformers' model, what it logged."""
    path = write_rows(tmp_path, "sft")
    common = {"stage": "sft", "path": str(path), "cache": str(tmp_path / "cache"), "model": config, "packing": "none"}
    watch = Watch()
    kept, trainer = run({"batch_size": 8, "accumulate": 1, **common, **settings}, callbacks=[watch])
    gradient = {name.removeprefix("model.hf."): value for name, value in kept.steps[0].items()}
    return watch, gradient, {key: float(value) for key, value in trainer.callback_metrics.items()}


def transformers_own(watch: Watch, **mask: Tensor) -> Any:
    """transformers' outputs for the padded micro-batch, and its gradient in ``.grad``."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_config(watch.hf.config, attn_implementation="eager", dtype=torch.float32)
    theirs.load_state_dict(watch.weights)
    (batch,) = watch.batches
    outputs = theirs.train()(
        input_ids=batch.input_ids, labels=batch.labels, use_cache=False, output_router_logits=True, **mask
    )
    outputs.loss.backward()
    return outputs, {name: p.grad for name, p in theirs.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_padded_step_is_transformers_own(name: str, checkpointing: bool, tmp_path: Path) -> None:
    watch, gradient, logged = step(tmp_path, family(name), activation_checkpointing=checkpointing)
    (batch,) = watch.batches
    assert batch.padding > 0
    mask = (torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]).long()
    outputs, expected = transformers_own(watch, attention_mask=mask)
    assert logged["train/router_aux_loss"] == pytest.approx(outputs.aux_loss.item(), rel=1e-6)
    total = logged["train/loss"] + 0.3 * logged["train/router_aux_loss"]
    assert total == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert_gradients_equal(gradient, expected)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_step_without_padding_is_transformers_own(name: str, tmp_path: Path) -> None:
    """One row, as transformers sums it without a mask."""
    watch, gradient, logged = step(tmp_path, family(name), batch_size=1)
    outputs, expected = transformers_own(watch)
    assert logged["train/router_aux_loss"] == pytest.approx(outputs.aux_loss.item(), rel=1e-6)
    assert logged["train/loss"] + 0.3 * logged["train/router_aux_loss"] == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert_gradients_equal(gradient, expected)


def test_what_is_logged_by_hand(tmp_path: Path) -> None:
    """Four micro-batches, each with its own shares, and the load of them all."""
    watch, _, logged = step(tmp_path, family("mixtral"), batch_size=2, accumulate=4)
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_config(watch.hf.config, attn_implementation="eager", dtype=torch.float32)
    theirs.load_state_dict(watch.weights)
    load, rows, total = torch.zeros(3, 4), 0, 0.0
    for batch in watch.batches:
        visits = torch.zeros(3, 4)
        logits = theirs(input_ids=batch.input_ids, use_cache=False, output_router_logits=True).router_logits
        real = (torch.arange(batch.input_ids.shape[1]) < batch.lengths[:, None]).flatten()
        probabilities = [layer.softmax(-1)[real] for layer in logits]
        for layer, probability in enumerate(probabilities):
            for token in probability:
                visits[layer, token.topk(2).indices] += 1
        load, rows = load + visits, rows + int(real.sum())
        share = visits.sum(0) / (3 * real.sum())
        total += float((4 * share @ sum(p.sum(0) for p in probabilities) / 3).detach())
    assert logged["train/router_aux_loss"] == pytest.approx(total / rows, rel=1e-5)
    assert logged["train/expert_load"] == pytest.approx(float((load.amax(1) / load.mean(1)).mean()), rel=1e-6)


def test_statistics_leave_padding_out() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(6, 4), torch.randn(6, 4)]
    load, probability = router_statistics(logits, 2, torch.tensor([2, 1]), 3)
    real = [layer[[0, 1, 3]] for layer in logits]
    whole_load, whole = router_statistics(real, 2, None, 3)
    torch.testing.assert_close(load, whole_load)
    torch.testing.assert_close(probability, whole)
    assert load.sum() == 2 * 2 * 3


def test_balanced_experts_have_a_load_of_one() -> None:
    balance = LoadBalance()
    # 12 positions, two layers, a quarter of the probability to each expert: the least there is, experts a token visits
    term = balance.term(torch.full((2, 4), 6.0), torch.full((4,), 6.0), 2, 0.01, first=True)
    assert term.sum / 12 == pytest.approx(2.0)
    assert balance.busiest() == 1
    balance.term(torch.tensor([[12.0, 12.0, 0, 0]] * 2), torch.full((4,), 6.0), 2, 0.01, first=False)
    assert balance.busiest() == 1.5
    balance.term(torch.tensor([[24.0, 0, 0, 0], [0, 24.0, 0, 0]]), torch.full((4,), 6.0), 1, 0.01, first=True)
    assert balance.busiest() == 4


def test_off_at_a_coefficient_of_zero(tmp_path: Path) -> None:
    """Nothing of the gradient, but still logged."""
    watch, gradient, logged = step(tmp_path, family("mixtral", router_aux_loss_coef=0.0))
    mask = (torch.arange(watch.batches[0].input_ids.shape[1]) < watch.batches[0].lengths[:, None]).long()
    outputs, expected = transformers_own(watch, attention_mask=mask)  # times zero there
    assert logged["train/loss"] == pytest.approx(outputs.loss.item(), rel=1e-6)
    assert logged["train/router_aux_loss"] == pytest.approx(outputs.aux_loss.item(), rel=1e-6)
    assert_gradients_equal(gradient, expected)


def test_off_for_frozen_routers(tmp_path: Path) -> None:
    adapter = {"class_path": "peft.LoraConfig", "init_args": {"r": 2, "target_modules": ["q_proj"]}}
    _, _, logged = step(tmp_path, family("mixtral"), adapter=adapter)
    assert "train/router_aux_loss" not in logged
    assert "train/expert_load" not in logged
    adapter["init_args"] = {"r": 2, "target_parameters": ["mlp.gate.weight"]}
    _, gradient, logged = step(tmp_path, family("mixtral"), adapter=adapter)
    assert logged["train/router_aux_loss"] > 1
    assert gradient


def test_a_family_without_the_loss_in_transformers_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.mixtral import modeling_mixtral

    config = AutoConfig.for_model("mixtral", **COMMON, **FAMILIES["mixtral"])
    with torch.device("meta"):
        hf = AutoModelForCausalLM.from_config(config)
    assert routing_of(hf) == (0.3, 2)
    monkeypatch.delattr(modeling_mixtral, "load_balancing_loss_func")
    with pytest.warns(
        UserWarning, match="'mixtral' has router_aux_loss_coef 0.3, but transformers has no load-balancing"
    ):
        assert routing_of(hf) is None


def test_routers_that_are_not_seen_are_an_error() -> None:
    from llm_modules.tokenizer import byte_tokenizer
    from llm_modules.zoo import Backbone

    model = Backbone(config=family("mixtral")).build(tokenizer=byte_tokenizer(), sequence_length=8, seed=0)
    model.hf.base_model._output_capturing_hooks_installed = True  # they are not
    ids = torch.arange(4)[None]
    with pytest.raises(ValueError, match="recorded no router of this mixture of experts"):
        model(ids, ids, ids)


def test_a_negative_coefficient_is_refused() -> None:
    from llm_modules.zoo import Backbone

    backbone = Backbone(config=family("mixtral", router_aux_loss_coef=-0.1))
    with pytest.raises(ValueError, match=r"^backbone\.config\.router_aux_loss_coef: -0\.1 is negative; allowed: 0 \("):
        backbone.check(vocabulary=64, sequence_length=16)
