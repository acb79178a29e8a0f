"""Reinforcement learning: the gradients of an iteration's steps over micro-batches, layouts and ranks.

Bounds of the design: 1e-5 over the whole gradient, 1e-4 for each parameter tensor, relative, in fp32.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from callbacks.spike_guard import SpikeGuard
from llm_modules import PolicyModule
from llm_modules.data import PromptDataModule
from llm_modules.evaluation.rewards import Answer, Reward
from llm_modules.generation import Generator
from llm_modules.objectives import GRPO, PPO, RLOO, OnlineDPO, ReinforcePlusPlus, SafePPO
from llm_modules.zoo import Backbone
from tests.invariance.gradients import LLAMA, KeepGradients
from tests.invariance.test_gradient_invariance import assert_same_gradient
from tests.invariance.test_preference_invariance import LORA, Moved
from tests.ranks import run_program

OBJECTIVES: dict[str, Any] = {
    "GRPO": partial(GRPO, kl=0.1),
    "Dr. GRPO": partial(GRPO, scale="none", aggregate="constant", longest=12),
    "DAPO": partial(GRPO, clip_high=0.28, aggregate="tokens"),
    "GSPO": partial(GRPO, ratio="sequence", clip=3e-4, clip_high=4e-4),
    "RLOO": RLOO,
    "REINFORCE++": ReinforcePlusPlus,
    "OnlineDPO": OnlineDPO,
    "PPO": PPO,
    "SafePPO": SafePPO,
}
REFERENCE: dict[str, Any] = {"accumulate": 1, "layout": "shared"}
VARIANTS: dict[str, dict[str, Any]] = {
    "2 micro-batches": {"accumulate": 2},
    "8 micro-batches": {"accumulate": 8},
    "prompts apart": {"layout": "packed"},
    "padded, 3 micro-batches": {"layout": "padded", "accumulate": 3},
    "checkpointed": {"activation_checkpointing": True},
}
PROMPTS, GROUP, UPDATES = 4, 4, 2


class Letters(Reward):
    """How many of an answer's characters are in the first half of the alphabet, less a little for its length."""

    def score(self, answers: Any) -> list[float]:
        return [sum(c in "abcdefghijklm" for c in a.text.lower()) - 0.01 * len(a.text) for a in answers]


class Length(Reward):
    def score(self, answers: Any) -> list[float]:
        return [answer.tokens / 40 + answer.row / 50 for answer in answers]


class Layout(Callback):
    def __init__(self, layout: str) -> None:
        self.layout = layout

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        pl_module._layout = self.layout


class KeepAnswers(Callback):
    def __init__(self) -> None:
        self.answers: list[list[int]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *rest: Any) -> None:
        if pl_module._rollouts is not None:
            self.answers.append(pl_module._rollouts.answer_ids.tolist())


def write_prompts(folder: Path, count: int = 16) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"prompt": "say " + "abc " * (i % 4) + str(i), "reference": i, "i": i} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def policy(settings: dict[str, Any], **arguments: Any) -> PolicyModule:
    objective = OBJECTIVES[settings["objective"]]()
    safe = "cost" in objective.critics
    return PolicyModule(
        Backbone(
            config=LLAMA,
            adapter=settings.get("adapter"),
            activation_checkpointing=settings.get("activation_checkpointing", False),
        ),
        [Letters(), Length(weight=0.1)],
        objective,
        costs=[Length(name="cost_of_length")] if safe else None,
        group_size=GROUP,
        **{
            "epochs": UPDATES,
            "generator": Generator(strategy="sample", max_new_tokens=12, batch_size=8, temperature=0.9),
            "optimizer": partial(torch.optim.SGD, lr=0.1),
            "sequence_length": 96,
            "reference": settings.get("reference", "auto"),
            "seed": 1,
        }
        | arguments,
    )


def prompts(settings: dict[str, Any], **arguments: Any) -> PromptDataModule:
    return PromptDataModule(
        **{
            "sources": [{"path": settings["path"]}],
            "batch_size": PROMPTS,
            "validation_fraction": 0.0,
            "tokenizer": "builtin:bytes",
            "chat_template": "chatml",
            "sequence_length": 96,
            "longest_prompt": 80,
            "seed": 1,
            "cache_dir": settings["cache"],
        }
        | arguments
    )


def run(settings: dict[str, Any]) -> tuple[list[dict[str, Tensor]], list[list[int]], Trainer]:
    """Gradients of the steps of an iteration, and its answers."""
    kept, answers, devices = KeepGradients(), KeepAnswers(), settings.get("devices", 1)
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        max_steps=UPDATES,
        accumulate_grad_batches=settings["accumulate"],
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[Moved(), kept, answers, Layout(settings["layout"])],
    )
    trainer.fit(policy(settings), datamodule=prompts(settings))
    return kept.steps, answers.answers, trainer


@pytest.fixture(scope="module", params=OBJECTIVES)
def objective(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("policy")
    settings = {"objective": request.param, "path": str(write_prompts(folder)), "cache": str(folder / "cache")}
    steps, answers, _ = run(settings | REFERENCE)
    assert len(answers[0]) > PROMPTS * GROUP
    return settings | {"expected": steps, "answers": answers}


@pytest.mark.parametrize("name", VARIANTS)
def test_one_process(objective: dict[str, Any], name: str) -> None:
    steps, answers, _ = run(objective | REFERENCE | VARIANTS[name])
    assert answers[0] == objective["answers"][0]
    for step in range(UPDATES):
        assert_same_gradient(steps[step], objective["expected"][step])


@pytest.mark.slow
def test_two_processes(objective: dict[str, Any], tmp_path: Path) -> None:
    settings = {key: value for key, value in objective.items() if key not in ("expected", "answers")} | REFERENCE
    settings |= {"devices": 2, "accumulate": 3}
    run_program(f"{__name__}:save", settings, str(tmp_path / "out.pt"), folder=tmp_path, timeout=300)
    steps, answers = torch.load(tmp_path / "out.pt")
    assert answers[0] == objective["answers"][0]
    for step in range(UPDATES):
        assert_same_gradient(steps[step], objective["expected"][step])


@pytest.mark.parametrize("name", ["GRPO", "PPO"])
def test_the_adapter_switched_off_is_the_copy_of_the_base(name: str, tmp_path: Path) -> None:
    settings = {"objective": name, "path": str(write_prompts(tmp_path)), "cache": str(tmp_path / "cache")}
    off, copy = (run(settings | REFERENCE | {"adapter": LORA, "reference": kind}) for kind in ("base", "copy"))
    assert off[1] == copy[1]
    assert_same_gradient(off[0][0], copy[0][0])
    adapted = {name for name in off[0][0] if ".lora_" in name}
    assert off[0][0].keys() - adapted == ({"critics.0.hf.lm_head.weight"} if name == "PPO" else set())
    if name == "PPO":  # the critic has an adapter, too
        assert {name.split(".")[0] for name in adapted} == {"model", "critics"}
        many = run(settings | REFERENCE | {"adapter": LORA, "reference": "base"} | VARIANTS["padded, 3 micro-batches"])
        assert_same_gradient(many[0][1], off[0][1])


def test_an_answer_is_of_its_prompt_and_seed(tmp_path: Path) -> None:
    """The rewards are handed what the row holds, the answers of two prompts differ, and those of two iterations."""
    settings = {"objective": "GRPO", "path": str(write_prompts(tmp_path)), "cache": str(tmp_path / "cache")}
    seen: list[Answer] = []

    class Seen(Reward):
        def score(self, answers: Any) -> list[float]:
            seen.extend(answers)
            return [0.0 if i % 2 else 1.0 for i, _ in enumerate(answers)]

    module = policy(settings, epochs=1)
    module._respondent.rewards = [Seen()]
    trainer = Trainer(
        accelerator="cpu", max_steps=2, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=prompts(settings, instruction="Be brief."))
    assert len(seen) == 2 * PROMPTS * GROUP
    for answer in seen:
        assert isinstance(answer.prompt, list)
        assert answer.prompt[0] == {"role": "system", "content": "Be brief."}
        assert answer.prompt[1]["content"] == answer.fields["prompt"]
        assert answer.reference == str(answer.fields["i"])
    assert len({answer.text for answer in seen}) > PROMPTS * GROUP
    assert len({answer.row for answer in seen}) == 2 * PROMPTS


def save(settings: dict[str, Any], out: str) -> None:
    """For ranks: rank 0 saves what `run` gives."""
    gradients, said, finished = run(settings)
    if finished.is_global_zero:
        torch.save((gradients, said), out)


@pytest.mark.parametrize("name", ["PPO", "SafePPO"])
def test_what_a_critic_is_off_by_does_not_clip_the_policy(name: str, tmp_path: Path) -> None:
    """To the bit: models that share nothing have norms and clips of their own."""
    settings = {"objective": name, "path": str(write_prompts(tmp_path)), "cache": str(tmp_path / "cache")}
    found: list[tuple[list[Tensor], dict[str, Tensor]]] = []
    for weight in (0.5, 400.0):
        module = policy(settings, seed=1)
        module.objective.value_weight = weight  # type: ignore[attr-defined]
        trainer = Trainer(
            accelerator="cpu",
            max_steps=UPDATES,
            gradient_clip_val=0.05,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            callbacks=[SpikeGuard()],
        )
        trainer.fit(module, datamodule=prompts(settings))
        assert module.model is not None
        found.append(([*module.model.parameters()], dict(trainer.callback_metrics)))
    (few, norms), (many, others) = found
    assert all(torch.equal(a, b) for a, b in zip(few, many, strict=True))
    assert norms["train/grad_norm"] == others["train/grad_norm"] > 0.05
    critics = ["critic", "cost_critic"] if name == "SafePPO" else ["critic"]
    for critic in critics:
        assert others[f"train/grad_norm_{critic}"] > 100 * norms[f"train/grad_norm_{critic}"] > 0
