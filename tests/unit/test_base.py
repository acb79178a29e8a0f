"""LLMModule in a real Trainer: what is logged, counted, clipped, seeded, saved and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch.nn import functional as F

from llm_modules.data import TextDataModule
from llm_modules.language_model import LanguageModelModule
from llm_modules.schedules import WarmupCosine
from llm_modules.strategies.gradients import clip_gradients, gradient_norm, unscale_gradients
from llm_modules.zoo import Backbone

LLAMA = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.0}


class Record(Callback):
    def __init__(self) -> None:
        self.logged: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"text": "ab " * (1 + 3 * (i % 5)) + str(i)}) + "\n" for i in range(24)))
    return path


def module(config: dict[str, Any] = LLAMA, lean: bool = True, **arguments: Any) -> LanguageModelModule:
    return LanguageModelModule(Backbone(config=config, lean=lean), sequence_length=64, seed=3, **arguments)


def data(rows: Path, **arguments: Any) -> TextDataModule:
    given = {"batch_size": 2, "packing": "none", "validation_fraction": 0.25, **arguments}
    return TextDataModule(
        sources=[{"path": str(rows)}], tokenizer="builtin:bytes", sequence_length=64, seed=3,
        cache_dir=str(rows.parent / "cache"), **given,
    )  # fmt: skip


def trainer(**arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "max_steps": 3, "accumulate_grad_batches": 2, "logger": False, "num_sanity_val_steps": 0,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False,
        "use_distributed_sampler": False, "log_every_n_steps": 1,
    }  # fmt: skip
    return Trainer(**(defaults | arguments))


def test_validation_loss_is_the_mean_over_all_tokens(rows: Path) -> None:
    model, source, record = module(), data(rows), trainer()
    [measured] = record.validate(model, datamodule=source, verbose=False)
    total, count = 0.0, 0
    with torch.no_grad():
        for batch in source.val_dataloader():
            logits = model.model.hf(batch.input_ids).logits
            total += float(
                F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), reduction="sum")
            )
            count += int((batch.labels[:, 1:] != -100).sum())
    assert measured["val/loss"] == pytest.approx(total / count, rel=1e-6)
    assert measured["val/perplexity"] == pytest.approx(torch.tensor(total / count).exp().item(), rel=1e-5)


def test_train_loss_is_the_window_mean_and_tokens_are_counted(rows: Path) -> None:
    seen: list[Any] = []

    class Batches(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            with torch.no_grad():
                seen.append((pl_module.objective_step(batch).terms["loss"].sum.item(), batch.counts()["tokens"], batch))

    record, model = Record(), module()
    trainer(callbacks=[Batches(), record]).fit(model, datamodule=data(rows))
    for step in range(3):
        pair = seen[2 * step : 2 * step + 2]
        expected = sum(loss for loss, _, _ in pair) / sum(count for _, count, _ in pair)
        assert record.logged[2 * step + 1]["train/loss"] == pytest.approx(expected, rel=1e-5)
    assert model.tokens_seen == sum(batch.input_ids.numel() - batch.padding for _, _, batch in seen)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_scale_is_taken_out_before_clipping(fused: bool) -> None:
    """Fused optimizers do so inside their step, which is too late."""
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([weight], fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale((weight * torch.tensor([3.0, 0.0, 4.0])).sum()).backward()
    if not fused:  # as Lightning does
        scaler.unscale_(optimizer)
    unscale_gradients(optimizer, scaler)
    norm = gradient_norm(optimizer)
    clip_gradients(optimizer, 1.0, norm)
    scaler.step(optimizer)
    assert float(norm) == 5.0
    torch.testing.assert_close(optimizer.state[weight]["exp_avg"], torch.tensor([0.06, 0.0, 0.08]))


def test_clipping_scales_to_the_norm_and_logs_the_norm_before(rows: Path) -> None:
    record = Record()
    norms: list[float] = []

    class AtTheStep(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            def norm(optimizer: Any, *_: Any) -> None:
                grads = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                norms.append(float(torch.nn.utils.get_total_norm(grads)))

            trainer.optimizers[0].register_step_post_hook(norm)

    trainer(gradient_clip_val=0.01, callbacks=[record, AtTheStep()]).fit(module(), datamodule=data(rows))
    assert len(norms) == 3
    assert record.logged[1]["train/grad_norm"] > 0.1
    assert max(norms) == pytest.approx(0.01, rel=1e-3)


def test_dropout_is_a_function_of_seed_and_step(rows: Path) -> None:
    def losses(seed: int, disturb: bool) -> list[float]:
        record, model = Record(), LanguageModelModule(Backbone(config=GPT2), sequence_length=64, seed=seed)

        class Disturb(Callback):
            def on_train_batch_start(self, *_: Any) -> None:
                if disturb:
                    torch.rand(7)

        trainer(callbacks=[record, Disturb()]).fit(model, datamodule=data(rows))
        return [logged["train/loss"] for logged in record.logged[1::2]]

    assert losses(3, disturb=False) == losses(3, disturb=True)
    assert losses(3, disturb=False) != losses(4, disturb=False)


def test_checkpoint_of_another_model_says_what_differs(rows: Path, tmp_path: Path) -> None:
    first = trainer(max_steps=1)
    first.fit(module(), datamodule=data(rows))
    first.save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=r"another model.*intermediate_size") as error:
        trainer().fit(module(LLAMA | {"intermediate_size": 48}), datamodule=data(rows), ckpt_path=tmp_path / "one.ckpt")
    assert "\n" not in str(error.value)


def test_export_loads_in_transformers_with_equal_logits(rows: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = module(lean=False)  # as the reloaded model computes: equal to the last bit
    trainer().fit(model, datamodule=data(rows))
    model.export(tmp_path / "out", {"recipe": "test", "metrics": {"val/loss": 1.5}, "data": ["rows.jsonl"]})
    ids = torch.tensor([[5, 6, 7, 8]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model.model.hf.set_attn_implementation("sdpa")  # the kernel that the reloaded model has: equal to the last bit
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.model.eval().hf(ids).logits)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").decode([65, 66]) == model.tokenizer.decode([65, 66])
    card = (tmp_path / "out" / "README.md").read_text()
    assert "test" in card
    assert "| val/loss | 1.5 |" in card
    assert f"{model.tokens_seen:,}" in card


def test_run_length_is_steps_or_epochs_whichever_is_less(rows: Path) -> None:
    model = module(schedule=lambda optimizer: WarmupCosine(optimizer))
    fitted = trainer(max_steps=100, max_epochs=2)
    fitted.fit(model, datamodule=data(rows))
    assert fitted.global_step == fitted.lr_scheduler_configs[0].scheduler.total_steps
    assert 0 < fitted.global_step < 100


def test_a_run_without_a_length_needs_none_without_a_schedule(rows: Path) -> None:
    model = module(schedule=lambda optimizer: WarmupCosine(optimizer))
    with pytest.raises(ValueError, match=r"max_steps or trainer\.max_epochs"):
        trainer(max_steps=-1, max_epochs=-1, max_time="00:00:00:05").fit(model, datamodule=data(rows))


def test_gradients_do_not_live_beside_the_next_forward_pass(rows: Path) -> None:
    alive: list[bool] = []

    class Look(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            alive.append(any(p.grad is not None for p in pl_module.parameters()))

    trainer(callbacks=[Look()]).fit(module(), datamodule=data(rows))
    assert alive == [False, True] * 3  # within a window of two micro-batches they must


def test_numbers_are_exact_under_bf16_true(rows: Path) -> None:
    seen: list[int] = []

    class Count(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(batch.tokens()[1])

    rows.write_text("".join(json.dumps({"text": "ab " * (9 + i % 10) + str(i)}) + "\n" for i in range(80)))
    record, model, source = Record(), module(), data(rows, batch_size=9, validation_fraction=0.5)
    fitted = trainer(precision="bf16-true", accumulate_grad_batches=1, callbacks=[Count(), record])
    fitted.fit(model, datamodule=source)
    assert any(count % 2 for count in seen if count > 256)  # bf16 has no odd number above 256
    assert model.tokens_seen == sum(seen)
    assert record.logged[0]["lr"] == pytest.approx(1e-3, rel=1e-6)

    measurer = trainer(precision="bf16-true")
    [measured] = measurer.validate(model, datamodule=source, verbose=False)
    total, count = 0.0, 0.0
    with torch.no_grad(), measurer.precision_plugin.forward_context():
        for batch in source.val_dataloader():
            total += model.objective_step(batch).terms["loss"].sum.item()
            count += batch.counts()["tokens"]
    assert measured["val/loss"] == pytest.approx(total / count, rel=1e-5)


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_resumed_run_takes_the_optimizers_settings_from_the_config(
    rows: Path, tmp_path: Path, scheduled: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def made(**settings: float) -> LanguageModelModule:
        schedule = (lambda optimizer: WarmupCosine(optimizer, total_steps=8)) if scheduled else None
        return module(optimizer=lambda groups: torch.optim.AdamW(groups, **settings), schedule=schedule)

    def resumed(**settings: float) -> tuple[dict[str, Any], float]:
        record = Record()
        second = trainer(max_steps=3, callbacks=[record])
        second.fit(made(**settings), datamodule=data(rows), ckpt_path=tmp_path / "two.ckpt")
        return {group["kind"]: group["weight_decay"] for group in second.optimizers[0].param_groups}, record.logged[1][
            "lr"
        ]

    first = trainer(max_steps=2)
    first.fit(made(lr=0.1, weight_decay=0.5), datamodule=data(rows))
    first.save_checkpoint(tmp_path / "two.ckpt")
    factor = first.lr_scheduler_configs[0].scheduler.factor(2) if scheduled else 1.0
    capsys.readouterr()
    decays, rate = resumed(lr=0.1, weight_decay=0.5)
    assert (decays, rate) == ({"matrix": 0.5, "embedding": 0.5, "vector": 0.0}, pytest.approx(0.1 * factor))
    assert "model.optimizer" not in capsys.readouterr().err
    decays, rate = resumed(lr=0.01, weight_decay=0.25)
    assert (decays, rate) == ({"matrix": 0.25, "embedding": 0.25, "vector": 0.0}, pytest.approx(0.01 * factor))
    said = capsys.readouterr().err
    assert "model.optimizer: lr is 0.01 from here on, and was 0.1 up to the checkpoint\n" in said
    assert "model.optimizer: weight_decay is 0.25 from here on" in said


def test_a_checkpoint_of_another_optimizer_is_refused(rows: Path, tmp_path: Path) -> None:
    first = trainer(max_steps=1)
    first.fit(module(), datamodule=data(rows))
    first.save_checkpoint(tmp_path / "one.ckpt")
    other = module(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.1))
    with pytest.raises(ValueError, match=r"ckpt_path: made with the optimizer AdamW, whose .* no use to SGD; resume"):
        trainer().fit(other, datamodule=data(rows), ckpt_path=tmp_path / "one.ckpt")
    trainer().validate(other, datamodule=data(rows), ckpt_path=tmp_path / "one.ckpt", verbose=False)
