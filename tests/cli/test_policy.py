"""Reinforcement learning by the command: it learns, goes on exactly inside of an iteration; mistakes are one line."""

from __future__ import annotations

import csv
import os
import warnings
from pathlib import Path

import pytest
import torch

from llm_modules.language_model import LanguageModelModule
from llm_modules.zoo import Backbone
from recipes.__main__ import main
from tests.cli.policy_recipe import PPO, RECIPE, REWARDS, folder
from tests.parity.test_trl_sft import LLAMA

__all__ = ["folder"]

pytestmark = pytest.mark.usefixtures("folder")

ROOT = Path(__file__).parents[2]


def write_base(folder: str, seed: int) -> None:
    module = LanguageModelModule(Backbone(config=LLAMA), sequence_length=64, seed=seed)
    module.configure_model()
    module.export(folder)


def rows(run: int, leave_out: tuple[str, ...] = ("time", "throughput/", "memory/")) -> list[dict[str, str]]:
    with Path(f"runs/rl/{run}/metrics.csv").open(newline="") as file:
        return [
            {name: value for name, value in row.items() if value and not name.startswith(leave_out)}
            for row in csv.DictReader(file)
        ]


def test_it_learns_and_goes_on_exactly_inside_of_an_iteration() -> None:
    from transformers import AutoModelForCausalLM

    assert main(["fit", "-c", "rl", "--trainer.max_steps", "40"]) == 0
    whole = rows(0)
    rewards = [float(row["rollout/reward"]) for row in whole if "rollout/reward" in row]
    assert rewards[-1] > 3 * max(rewards[0], 0.01)
    assert rewards[0] == rewards[3] != rewards[4]  # an iteration has four steps
    AutoModelForCausalLM.from_pretrained("runs/rl/0/export")
    for step in (3, 12, 18):  # 12: between two iterations
        checkpoint = f"runs/rl/0/checkpoints/step-{step:08}.ckpt"
        assert main(["fit", "-c", "rl", "--trainer.max_steps", "20", "--ckpt_path", checkpoint]) == 0
    for run, step in ((1, 3), (2, 12), (3, 18)):
        again = [row for row in rows(run) if "train/loss" in row]
        for a, b in zip(again, [row for row in whole if "train/loss" in row][step:20], strict=True):
            assert a.items() ^ b.items() == set()


def test_a_reward_with_chance_in_it_goes_on_exactly_too() -> None:
    Path("rl.yaml").write_text(RECIPE.replace("own_rewards.vowels", "own_rewards.dice"))
    assert main(["fit", "-c", "rl"]) == 0
    assert main(["fit", "-c", "rl", "--trainer.val_check_interval", "4"]) == 0
    assert (
        main(["fit", "-c", "rl", "--trainer.accumulate_grad_batches", "2", "--trainer.val_check_interval", "24"]) == 0
    )
    assert main(["fit", "-c", "rl", "--ckpt_path", "runs/rl/0/checkpoints/step-00000003.ckpt"]) == 0
    whole, validated, parts, again = (
        [row["rollout/reward"] for row in rows(run) if "rollout/reward" in row] for run in range(4)
    )
    assert len({*whole}) == 3
    assert whole == validated == parts
    assert again == whole[3:]


@pytest.mark.parametrize("overlay", [[], ["-c", "adapters/pissa"]], ids=["whole", "adapters"])
def test_with_a_critic_it_goes_on_exactly_too(overlay: list[str]) -> None:
    words = ["--model.objective", PPO, "--model.objective.kl_target", "3.0", "--model.objective.kl_horizon", "20"]
    words = [*overlay, *words]
    assert main(["fit", "-c", "rl", *words]) == 0
    whole = [row for row in rows(0) if "train/loss" in row]
    assert whole[-1]["rollout/kl_weight"] != whole[0]["rollout/kl_weight"]
    assert "train/value_reward" in whole[0]
    assert main(["fit", "-c", "rl", *words, "--ckpt_path", "runs/rl/0/checkpoints/step-00000006.ckpt"]) == 0
    assert [row for row in rows(1) if "train/loss" in row] == whole[6:]
    if overlay:
        state = torch.load("runs/rl/0/checkpoints/step-00000006.ckpt", weights_only=True)
        whole_ones = {name for name in state["state_dict"] if ".lora_" not in name}
        assert whole_ones == {"critics.0.hf.lm_head.weight"}
        assert state["litrecipes"]["policy"]["critics"][0]["adapter"]["first"]  # what it took out of the base


def test_rewards_go_by_their_bare_names() -> None:
    words = ["--model.rewards", "[ExactAnswer, {class_path: Format, init_args: {pattern: '.*', weight: 0.5}}]"]
    assert main(["fit", "-c", "rl", *words, "--dry-run"]) == 0


def test_safe_rlhf_logs_what_it_holds() -> None:
    assert main(["fit", "-c", "rl", "-c", "safe", "--trainer.max_steps", "8"]) == 0
    found = [row for row in rows(0) if "train/loss" in row]
    assert float(found[0]["rollout/multiplier"]) == 1.0
    assert float(found[-1]["rollout/multiplier"]) != 1.0
    assert {"rollout/cost", "rollout/over_limit", "train/value_cost"} <= set(found[0])


def test_prompts_are_answered_until_enough_of_them_tell_something() -> None:
    words = ["--data.batch_size", "8", "--model.dynamic_sampling", "2", "--trainer.max_steps", "4"]
    assert main(["fit", "-c", "rl", *words]) == 0
    first = rows(0)[0]
    assert float(first["rollout/kept"]) <= 4.0
    assert float(first["rollout/prompts"]) in (4.0, 8.0)


def test_what_is_logged_is_of_all_answers_and_each_step_has_something_to_learn(tmp_path: Path) -> None:
    """Of 15 prompts one has answers that differ, for two optimizer steps."""
    Path("own_rewards.py").write_text(
        REWARDS + "def rare(answer):\n    return float(answer.reference == '13' and sum(map(ord, answer.text)) % 2)\n"
    )
    Path("rl.yaml").write_text(RECIPE.replace("own_rewards.vowels", "own_rewards.rare"))
    words = [
        "--data.batch_size",
        "15",
        "--model.dynamic_sampling",
        "3",
        "--model.group_size",
        "8",
        "--model.optimizer.lr",
        "1e-4",
    ]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*to learn from")
        assert main(["fit", "-c", "rl", *words, "--trainer.max_steps", "4"]) == 0
    steps = [row for row in rows(0) if "train/loss" in row]
    assert (steps[0]["rollout/prompts"], steps[0]["rollout/kept"]) == ("15.0", "1.0")
    assert float(steps[0]["rollout/constant_groups"]) == pytest.approx(14 / 15)
    assert 0 < float(steps[0]["rollout/reward"]) < 1 / 15
    assert all(float(row["train/grad_norm"]) > 0 for row in steps)


def test_equal_rewards_are_said(recwarn: pytest.WarningsRecorder) -> None:
    Path("rl.yaml").write_text(RECIPE.replace("own_rewards.vowels", "own_rewards.same"))
    assert main(["fit", "-c", "rl", "--trainer.max_steps", "4"]) == 0
    assert any("to no prompt did two answers have different rewards" in str(w.message) for w in recwarn)
    assert float(rows(0)[0]["rollout/constant_groups"]) == 1.0


def test_its_invariance_is_checked(capfd: pytest.CaptureFixture[str]) -> None:
    words = ["--model.objective", "llm_modules.objectives.PPO"]
    assert main(["check", "invariance", "-c", "rl", *words]) == 0
    said = capfd.readouterr().out
    assert "invariance: the answers to 4 prompts as 1 micro-batches" in said
    assert "  4 micro-batches  " in said
    assert said.endswith("passed\n")


RATIOS = """\
from dataclasses import replace
from llm_modules.objectives import GRPO


class RatiosOfTheMicroBatch(GRPO):
    def terms(self, batch, logprobs, values):
        ratio = (logprobs.detach() - batch.old_logprobs).exp()
        return super().terms(replace(batch, advantages=batch.advantages / ratio.mean()), logprobs, values)
"""


@pytest.mark.slow
@pytest.mark.parametrize("epochs", ["1", "2"])
def test_ratios_that_are_averaged_over_a_micro_batch(epochs: str, capfd: pytest.CaptureFixture[str]) -> None:
    """All of them are 1 where the policy is the one that answered."""
    Path("own_ratios.py").write_text(RATIOS)
    words = ["--model.epochs", epochs, "--model.minibatches", "1", "--model.objective.kl", "0.1"]
    words = ["--model.objective", "llm_modules.objectives.GRPO", *words]
    assert main(["check", "invariance", "-c", "rl", *words]) == 0
    words[1] = "own_ratios.RatiosOfTheMicroBatch"
    assert main(["check", "invariance", "-c", "rl", *words]) == 1
    assert "the gradient depends on how answers are cut into micro-batches" in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.cluster
def test_ranks_have_the_gradient_of_one_process(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their answers are cut, and not the prompts, of which all together have ``data.batch_size``."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(ROOT)]))
    Path("own_ratios.py").write_text(RATIOS)
    words = ["check", "gradients", "-c", "rl", "-c", "strategies/ddp", "--devices", "2"]
    words += ["--model.epochs", "1", "--model.minibatches", "1", "--model.objective"]
    assert main([*words, "llm_modules.objectives.GRPO"]) == 0
    said = capfd.readouterr().out
    assert "the answers to 4 prompts in 2 x 1 parts; one process as 1; fp32" in said
    assert said.endswith("passed\n")
    assert main([*words, "own_ratios.RatiosOfTheMicroBatch"]) == 1
    assert "the gradient depends on how answers are cut into micro-batches" in capfd.readouterr().err


def test_a_checkpoint_of_another_length_of_iteration_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "rl", "--trainer.max_steps", "3"]) == 0
    checkpoint = "runs/rl/0/checkpoints/step-00000003.ckpt"
    assert main(["fit", "-c", "rl", "--model.epochs", "3", "--ckpt_path", checkpoint]) == 2
    assert "made inside of an iteration of model.epochs 2 and minibatches 2, now 3 and 2" in capfd.readouterr().err


@pytest.mark.parametrize(("epochs", "minibatches"), [("4", "1"), ("1", "4")])
def test_an_iteration_is_not_cut_anew_inside_of_it(
    epochs: str, minibatches: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", "-c", "rl", "--trainer.max_steps", "6"]) == 0
    words = ["fit", "-c", "rl", "--model.epochs", epochs, "--model.minibatches", minibatches]
    assert main([*words, "--ckpt_path", "runs/rl/0/checkpoints/step-00000003.ckpt"]) == 2
    said = "ckpt_path: made inside of an iteration of model.epochs 2 and minibatches 2, now"
    assert said in capfd.readouterr().err


@pytest.mark.parametrize(("name", "value"), [("top_k", "5"), ("top_p", "0.9"), ("repetition_penalty", "1.2")])
def test_what_narrows_the_draw_is_said(name: str, value: str, recwarn: pytest.WarningsRecorder) -> None:
    assert main(["fit", "-c", "rl", "--trainer.max_steps", "4", f"--model.generator.{name}", value]) == 0
    assert sum(f"model.generator.{name}: answers are drawn from" in str(w.message) for w in recwarn) == 1


def test_a_run_does_not_go_on_against_another_reference(capfd: pytest.CaptureFixture[str]) -> None:
    write_base("base", seed=1)
    begin, end = RECIPE.index("config: {"), RECIPE.index("    rewards:")
    Path("rl.yaml").write_text(RECIPE[:begin] + "source: base\n" + RECIPE[end:])
    words = ["fit", "-c", "rl", "--model.objective", "llm_modules.objectives.GRPO", "--model.objective.kl", "0.1"]
    assert main([*words, "--trainer.max_steps", "8"]) == 0
    words += ["--ckpt_path", "runs/rl/0/checkpoints/step-00000006.ckpt", "--trainer.max_steps", "8"]
    assert main(words) == 0
    whole, again = ([row for row in rows(run) if "train/loss" in row] for run in range(2))
    assert again == whole[6:]
    write_base("base", seed=2)
    assert main(words) == 2
    assert "ckpt_path: the frozen model that this one is compared with is another one" in capfd.readouterr().err
    assert main([*words, "--model.objective.kl", "0"]) == 0  # without a reference it may


def test_another_objective_goes_on_only_between_iterations(capfd: pytest.CaptureFixture[str]) -> None:
    """An iteration's answers have the advantages that its objective prepared."""
    base, kind = ["fit", "-c", "rl", "--trainer.max_steps", "6"], "llm_modules.objectives."
    assert main([*base, "--model.objective", f"{kind}GRPO", "--checkpoint.every_n_steps", "1"]) == 0
    inside, between = (["--ckpt_path", f"runs/rl/0/checkpoints/step-{step:08}.ckpt"] for step in (3, 4))

    def refused(*words: str) -> str:
        capfd.readouterr()
        assert main([*base, *words]) == 2
        errors = capfd.readouterr().err
        assert "Traceback" not in errors
        (line,) = [line for line in errors.splitlines() if line.startswith("recipes: ")]
        return line

    grpo, rloo = f"{kind}policy.GRPO", f"{kind}policy.RLOO"
    other = ["--model.objective", f"{kind}RLOO", "--model.objective.kl", "0"]
    assert f"inside of an iteration of model.objective {grpo}, now {rloo}; go on with" in refused(*other, *inside)
    held = ["--model.objective", f"{kind}GRPO", "--model.objective.kl", "0.1"]
    assert "made inside of an iteration without a reference" in refused(*held, *inside)
    for where in (inside, between):
        line = refused("--model.objective", PPO, *where)
        assert f"made with model.objective {grpo} (critics: none), now {kind}actor_critic.PPO (critics: reward)" in line
    for words in (other, held):
        assert main([*base, *words, *between]) == 0


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_mixture_of_experts_answers_and_says_what_is_left_out(cache: str, capfd: pytest.CaptureFixture[str]) -> None:
    begin, end = RECIPE.index("{model_type: llama"), RECIPE.index("    rewards:")
    experts = "num_local_experts: 4, output_router_logits: true, router_aux_loss_coef: 0.02"
    config = RECIPE[begin:end].replace("llama", "mixtral").replace("}", f", {experts}}}")
    Path("rl.yaml").write_text(RECIPE[:begin] + config + RECIPE[end:])
    words = ["fit", "-c", "rl", "--trainer.max_steps", "4", "--model.generator.cache", cache]
    assert main(words) == 0
    said = "model.backbone.config.router_aux_loss_coef: 0.02 is not part of what PolicyModule trains"
    assert capfd.readouterr().err.count(said) == 1
    if cache == "dynamic":
        assert main([*words, "--model.backbone.config.router_aux_loss_coef", "0.0"]) == 0
        assert "router_aux_loss_coef: 0" not in capfd.readouterr().err
