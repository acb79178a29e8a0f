"""Preference tuning and reward models: one step's gradient over micro-batches, packing, ranks and references.

Bounds of the design: 1e-5 over the whole gradient, 1e-4 for each parameter tensor, relative, in fp32.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from llm_modules import LLMModule, PreferenceModule, RewardModule
from llm_modules.batch import LabelledBatch, LabelledScores, ObjectiveOutput, PairScores, Term
from llm_modules.data import LabelledDataModule, PreferenceDataModule
from llm_modules.objectives import BCO, CPO, DPO, KTO, ORPO, BradleyTerry, LabelledObjective, RewardObjective, SimPO
from llm_modules.zoo import Backbone
from tests.invariance.gradients import LLAMA, KeepGradients
from tests.invariance.test_gradient_invariance import assert_same_gradient
from tests.ranks import run_program


class Own(DPO):
    """As of a user: a part of its own over tokens beside the pairs' loss."""

    def terms(self, scores: PairScores) -> dict[str, Term]:
        return super().terms(scores) | {"likelihood": Term(-scores.chosen.sum(), "tokens_chosen", 0.25)}


class OwnLabelled(KTO):
    """The same of labelled answers."""

    def __call__(self, scores: LabelledScores, point: Tensor | float) -> ObjectiveOutput:
        output = super().__call__(scores, point)
        output.terms["likelihood"] = Term(-scores.logprobs.sum(), "tokens", 0.25)
        return output


OBJECTIVES: dict[str, Any] = {
    "DPO": DPO,
    "SimPO": SimPO,
    "CPO": CPO,
    "ORPO": ORPO,
    "KTO": lambda: KTO(beta=0.5, desirable_weight=1.3),
    "BCO": lambda: BCO(beta=0.5, desirable_weight=1.3, decay=0.5),
    "reward": lambda: BradleyTerry(centering=0.1),
}
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "lora_alpha": 8}}
REFERENCE = {"batch_size": 8, "accumulate": 1, "packing": "none"}
VARIANTS: dict[str, dict[str, Any]] = {
    "2x4": {"batch_size": 2, "accumulate": 4},
    "1x8": {"batch_size": 1, "accumulate": 8},
    "packed 8x1": {"packing": "batch"},
    "packed 2x4": {"packing": "batch", "batch_size": 2, "accumulate": 4},
    "packed 8x1, prompts apart": {"packing": "batch", "share_prompts": False},
    "checkpointed, packed": {"activation_checkpointing": True, "packing": "batch"},
}


class Moved(Callback):
    """The policy is not where the reference is, so that the reference counts."""

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        with torch.no_grad():
            for number, parameter in enumerate(pl_module.parameters()):
                if parameter.requires_grad:
                    generator = torch.Generator().manual_seed(number)
                    parameter.add_(0.02 * torch.randn(parameter.shape, generator=generator))


def write_pairs(folder: Path, count: int = 8) -> Path:
    words = "the quick brown fox jumps over the lazy dog and runs away from all of them".split()
    path = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": " ".join(words[i % 5 :][: 2 + (3 * i) % 7]),
            "chosen": " ".join(words[: 1 + (5 * i) % 14]) + f" {i}",
            "rejected": " ".join(words[i % 3 :][: 1 + (7 * i) % 9]) + " no",
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(settings: dict[str, Any]) -> tuple[list[dict[str, Tensor]], list[float], Trainer]:
    """Gradients of the optimizer steps, and their losses."""
    backbone = Backbone(
        config=settings.get("config", LLAMA),
        adapter=settings.get("adapter"),
        activation_checkpointing=settings.get("activation_checkpointing", False),
    )
    objective: Any = OBJECTIVES[settings["objective"]]()
    built = {"sequence_length": 160, "seed": settings.get("seed", 1)}
    module: LLMModule
    if isinstance(objective, RewardObjective):
        module = RewardModule(backbone, objective, **built)
    else:
        module = PreferenceModule(backbone, objective, reference=settings.get("reference", "auto"), **built)
    labelled = isinstance(objective, LabelledObjective)
    kind: Any = LabelledDataModule if labelled else PreferenceDataModule
    data = kind(
        sources=[{"path": settings["path"]}],
        batch_size=settings["batch_size"],
        packing=settings["packing"],
        **({} if labelled else {"share_prompts": settings.get("share_prompts", True)}),
        validation_fraction=0.0,
        tokenizer="builtin:bytes",
        chat_template="chatml",
        sequence_length=160,
        seed=1,
        cache_dir=settings["cache"],
    )
    kept, devices = KeepGradients(), settings.get("devices", 1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=2 if labelled else 1,  # the second step has what the first one left
        accumulate_grad_batches=settings["accumulate"],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[Moved(), kept],
    )
    trainer.fit(module, datamodule=data)
    loss = [float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/loss")]
    return kept.steps, loss, trainer


@pytest.fixture(scope="module", params=OBJECTIVES)
def objective(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp(request.param)
    settings = {"objective": request.param, "path": str(write_pairs(folder)), "cache": str(folder / "cache")}
    steps, _, trainer = run(settings | REFERENCE)
    if isinstance(OBJECTIVES[request.param](), LabelledObjective):
        assert abs(float(trainer.callback_metrics["train/reward_point"])) > 1e-3  # it counts
    return settings | {"expected": steps}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_process(objective: dict[str, Any], name: str) -> None:
    for found, expected in zip(run(objective | REFERENCE | VARIANTS[name])[0], objective["expected"], strict=True):
        assert_same_gradient(found, expected)


def test_a_reward_model_with_an_adapter(tmp_path: Path) -> None:
    settings = {"objective": "reward", "path": str(write_pairs(tmp_path)), "cache": str(tmp_path / "cache")}
    settings |= REFERENCE | {"adapter": LORA}
    (expected,) = run(settings)[0]
    assert "model.hf.lm_head.weight" in expected
    assert sum(".lora_" in name for name in expected) == len(expected) - 1
    for name in ("packed 2x4", "checkpointed, packed"):
        assert_same_gradient(run(settings | VARIANTS[name])[0][0], expected)


def test_the_bound_can_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """KTO with a reference point of each micro-batch, as others have it, is far outside of the bounds."""
    settings = {"objective": "KTO", "path": str(write_pairs(tmp_path)), "cache": str(tmp_path / "cache")} | REFERENCE
    expected = run(settings)[0][0]
    whole = PreferenceModule._labelled_step

    def alone(module: PreferenceModule, objective: Any, batch: Any) -> Any:
        module._point = module._point_of(objective, module._mismatched(objective, batch))
        return whole(module, objective, batch)

    monkeypatch.setattr(LabelledBatch, "look_ahead", lambda batch, window: None)
    monkeypatch.setattr(PreferenceModule, "_labelled_step", alone)
    naive = run(settings | {"batch_size": 2, "accumulate": 4})[0][0]
    difference = torch.cat([(naive[name] - expected[name]).flatten() for name in expected]).norm()
    print(f"whole gradient {difference / torch.cat([want.flatten() for want in expected.values()]).norm():.1e}")
    with pytest.raises(AssertionError):
        assert_same_gradient(naive, expected)


@pytest.mark.slow
def test_two_processes(objective: dict[str, Any], tmp_path: Path) -> None:
    settings = {key: value for key, value in objective.items() if key != "expected"} | REFERENCE
    reference = "copy" if objective["objective"] == "KTO" else "cached"
    settings |= {"devices": 2, "batch_size": 2, "accumulate": 2, "packing": "batch", "reference": reference}
    run_program(f"{__name__}:save", settings, str(tmp_path / "out.pt"), folder=tmp_path, timeout=300)
    for found, expected in zip(torch.load(tmp_path / "out.pt"), objective["expected"], strict=True):
        assert_same_gradient(found, expected)


def test_the_adapter_switched_off_is_the_copy_of_the_base(tmp_path: Path) -> None:
    settings = {"objective": "DPO", "path": str(write_pairs(tmp_path)), "cache": str(tmp_path / "cache")}
    settings |= REFERENCE | {"packing": "batch", "adapter": LORA}
    off, copy = (run(settings | {"reference": kind}) for kind in ("base", "copy"))
    assert abs(off[1][0] - math.log(2)) > 1e-3  # the policy has moved: the reference counts
    assert off[1] == pytest.approx(copy[1], rel=1e-6)
    assert_same_gradient(off[0][0], copy[0][0])


TOTALS: dict[str, tuple[Any, dict[str, float]]] = {
    "ORPO": (lambda: ORPO(beta=0.3), {"odds_ratio": 0.3, "nll_chosen": 1.0}),
    "CPO": (lambda: CPO(alpha=0.7), {"preference": 1.0, "nll_chosen": 0.7}),
    "own": (Own, {"preference": 1.0, "likelihood": 0.25}),
    "own, labelled": (OwnLabelled, {"preference": 1.0, "likelihood": 0.25}),
}


def totals(settings: dict[str, Any]) -> list[dict[str, float]]:
    """What a training step, a validation and a test log."""
    made = TOTALS[settings["objective"]][0]()
    module = PreferenceModule(Backbone(config=LLAMA), made, sequence_length=160, seed=1)
    kind: Any = LabelledDataModule if isinstance(made, LabelledObjective) else PreferenceDataModule
    data = kind(
        sources=[{"path": settings["path"]}], validation_fraction=0.5, batch_size=settings["batch_size"],
        packing=settings["packing"], tokenizer="builtin:bytes", chat_template="chatml", sequence_length=160, seed=1,
        cache_dir=settings["cache"],
    )  # fmt: skip
    devices = settings.get("devices", 1)
    trainer = Trainer(
        accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", max_steps=1, logger=False,
        accumulate_grad_batches=settings["accumulate"], use_distributed_sampler=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, callbacks=[Moved()],
        limit_train_batches=settings["accumulate"],
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return [logged, dict(trainer.test(module, datamodule=data, verbose=False)[0])]


def save_totals(settings: dict[str, Any], out: str) -> None:
    """For ranks."""
    found = totals(settings)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        Path(out).write_text(json.dumps(found))


@pytest.mark.parametrize("name", TOTALS)
def test_the_logged_loss_is_what_is_minimized(name: str, tmp_path: Path) -> None:
    """Its parts have denominators of their own; callbacks go by the weighted total of their means."""
    settings = {"objective": name, "path": str(write_pairs(tmp_path, 24)), "cache": str(tmp_path / "cache")} | REFERENCE
    expected = totals(settings)
    for stage, logged in zip(("train", "val", "test"), [expected[0], *expected], strict=True):
        total = sum(weight * logged[f"{stage}/{part}"] for part, weight in TOTALS[name][1].items())
        assert logged[f"{stage}/loss"] == pytest.approx(total, rel=1e-6)
    for variant in ("2x4", "packed 8x1"):
        for found, whole in zip(totals(settings | VARIANTS[variant]), expected, strict=True):
            losses = {key: value for key, value in whole.items() if key.endswith("/loss")}
            assert {key: found[key] for key in losses} == pytest.approx(losses, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ORPO", "own, labelled"])
def test_the_logged_loss_of_two_processes(name: str, tmp_path: Path) -> None:
    settings = {"objective": name, "path": str(write_pairs(tmp_path, 24)), "cache": str(tmp_path / "cache")} | REFERENCE
    expected = totals(settings)
    settings |= {"devices": 2, "batch_size": 2, "accumulate": 2, "packing": "batch"}
    run_program(f"{__name__}:save_totals", settings, str(tmp_path / "out.json"), folder=tmp_path, timeout=300)
    for found, whole in zip(json.loads((tmp_path / "out.json").read_text()), expected, strict=True):
        losses = {key: value for key, value in whole.items() if key.endswith("/loss")}
        assert {key: found[key] for key in losses} == pytest.approx(losses, rel=1e-5)


@pytest.mark.parametrize(("adapter", "packing"), [(None, "batch"), (LORA, "none")], ids=["whole", "LoRA, padded"])
def test_a_cached_reference_is_the_copy(
    adapter: Any, packing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"objective": "DPO", "path": str(write_pairs(tmp_path)), "cache": str(tmp_path / "cache")}
    settings |= REFERENCE | {"packing": packing, "adapter": adapter}
    copy = run(settings | {"reference": "copy"})
    said = "model.reference: scoring all pairs once"
    for time in range(2):
        cached = run(settings | {"reference": "cached"})
        assert cached[1] == pytest.approx(copy[1], rel=1e-6)
        assert_same_gradient(cached[0][0], copy[0][0])
        assert (said in capsys.readouterr().err) == (time == 0)  # then it is on disk
    for change in ({"seed": 2}, {"config": LLAMA | {"rms_norm_eps": 0.5}}):  # another model's is another
        other = [run(settings | change | {"reference": kind})[1] for kind in ("cached", "copy")]
        assert said in capsys.readouterr().err
        assert other[0] == pytest.approx(other[1], rel=1e-6)
        assert abs(other[0][0] - copy[1][0]) > 1e-4


def test_virtual_tokens_have_a_cached_reference_of_their_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"objective": "DPO", "path": str(write_pairs(tmp_path)), "cache": str(tmp_path / "cache")}
    settings |= REFERENCE | {"adapter": VIRTUAL, "reference": "cached"}
    for seed in (1, 2):
        run(settings | {"seed": seed})
        assert "scoring all pairs once" in capsys.readouterr().err


@pytest.mark.parametrize("adapter", [None, LORA], ids=["whole", "LoRA"])
@pytest.mark.parametrize("reference", ["copy", "cached"])
def test_a_reference_is_asked_about_the_data_at_hand(reference: Any, adapter: Any, tmp_path: Path) -> None:
    """A module that was fitted on some data is validated on others: nothing of the first ones is left."""

    def module_with(reference: Any) -> PreferenceModule:
        backbone = Backbone(config=LLAMA, adapter=adapter)
        return PreferenceModule(backbone, reference=reference, sequence_length=160, seed=1)

    def trainer() -> Trainer:
        return Trainer(
            accelerator="cpu", max_steps=1, use_distributed_sampler=False, logger=False, num_sanity_val_steps=0,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, callbacks=[Moved()],
        )  # fmt: skip

    def data(name: str, start: int) -> PreferenceDataModule:
        (tmp_path / name).mkdir()
        path = write_pairs(tmp_path / name, 24)
        path.write_text("".join(path.read_text().splitlines(keepends=True)[start:]))
        return PreferenceDataModule(
            sources=[{"path": str(path)}], batch_size=4, validation_fraction=0.5, tokenizer="builtin:bytes",  # type: ignore[list-item]
            chat_template="chatml", sequence_length=160, seed=1, cache_dir=str(tmp_path / "cache"),
        )  # fmt: skip

    module, first, other = module_with(reference), data("first", 0), data("other", 5)
    trainer().fit(module, datamodule=first)
    found = [trainer().validate(module, datamodule=d, verbose=False)[0]["val/kl"] for d in (first, other, first)]
    assert found[0] == found[2] != found[1]
    fresh = module_with("copy")
    fresh.configure_model()
    assert module.model is not None
    assert fresh.model is not None
    fresh.model.load_state_dict(module.model.state_dict())
    expected = [trainer().validate(fresh, datamodule=d, verbose=False)[0]["val/kl"] for d in (first, other)]
    assert found[:2] == pytest.approx(expected, rel=1e-6)
    if reference == "cached":
        with pytest.raises(ValueError, match=r"model\.reference: cached, but NoneType keeps nothing"):
            trainer().validate(module, dataloaders=first.val_dataloader(), verbose=False)


def test_an_adapters_folder_that_changes_has_a_cached_reference_of_its_own(tmp_path: Path) -> None:
    """Weights and path stay; lora_alpha, which is in its config alone, decides what they do."""
    made = PreferenceModule(Backbone(config=LLAMA, adapter=LORA), sequence_length=160, seed=1)
    made.configure_model()
    made.export(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    found = set()
    for alpha in (8, 64):
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": alpha}))
        module = PreferenceModule(
            Backbone(config=LLAMA, adapter=str(tmp_path / "adapter")), reference="cached", sequence_length=160, seed=1
        )
        module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        module.configure_model()
        found.add(module._identity(module._copy[0]))
    assert len(found) == 2


VIRTUAL = {"class_path": "peft.PromptTuningConfig", "init_args": {"num_virtual_tokens": 3}}


def test_what_cannot_share_a_prompt_computes_it_twice_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"objective": "DPO", "path": str(write_pairs(tmp_path)), "cache": str(tmp_path / "cache")}
    settings |= REFERENCE | {"adapter": VIRTUAL, "batch_size": 2, "accumulate": 4}
    expected = run(settings)[0][0]
    assert "share_prompts" not in caplog.text
    assert_same_gradient(run(settings | {"packing": "batch"})[0][0], expected)
    assert caplog.text.count("data.share_prompts: each prompt is computed for both of its answers: virtual tokens") == 1


def save(settings: dict[str, Any], out: str) -> None:
    """For ranks: rank 0 saves what `run` gives."""
    gradients, _, finished = run(settings)
    if finished.is_global_zero:
        torch.save(gradients, out)
