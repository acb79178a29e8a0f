"""Reinforcement learning by the command: mistakes are one line, and nothing is lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from recipes.__main__ import main
from tests.cli.policy_recipe import PPO, RECIPE, folder, write
from tests.unit.test_evaluation_rewards_contained import kernel_has_landlock

__all__ = ["folder"]

pytestmark = pytest.mark.usefixtures("folder")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--model.rewards", "[{class_path: own_rewards.vowels}]"],
            "rewards.0.class_path` is own_rewards.vowels, a function, no Reward; a function goes in {class_path: "
            "llm_modules.evaluation.FunctionReward, init_args: {function: own_rewards.vowels}}",
        ),
        (
            ["--model.rewards", "[{class_path: FunctionReward, init_args: {function: own_rewards.vowel}}]"],
            "is 'own_rewards.vowel'; module `own_rewards` has no `vowel` (did you mean `vowels`?)",
        ),
        (
            ["--model.rewards", "[{class_path: llm_modules.evaluation.ExactAnswr}]"],
            "module `llm_modules.evaluation` has no `ExactAnswr` (did you mean `ExactAnswer`?)",
        ),
        (
            ["--model.rewards", "[own_rewards.Unset]"],
            "reward own_rewards.Unset: its __init__ must call super().__init__(weight, name), and does not",
        ),
        (["--model.rewards", "[]"], "model.rewards: none that counts"),
        (
            ["--model.rewards.0.init_args.function", "own_rewards.vowls"],
            "function` is 'own_rewards.vowls'; module `own_rewards` has no `vowls` (did you mean `vowels`?)",
        ),
        (["--model.rewards.0.init_args.function", "own_rewads.bad"], "; there is no module `own_rewads`"),
        (
            ["--model.rewards.0.init_args.function", "math.pi"],
            "a function is asked for, and this is of type float",
        ),
        (["--model.rewards", "[llm_modules.evaluation.ExactAnswr]"], "(did you mean `ExactAnswer`?)"),
        (["--model.rewards", "[own_rewards.NoScore]"], "rewards.no_score: NoScore has no score(answers), which"),
        (["--model.rewards.0.init_args.weight", "0"], "model.rewards: none that counts"),
        (
            ["--model.rewards.0.init_args.name", "entropy"],
            "model.rewards: entropy is logged besides; set another `name`",
        ),
        (["--model.generator.seed", "7"], "model.generator.seed: 7, but a policy samples by model.seed"),
        (["--model.generator.logprobs", "true"], "model.generator.logprobs: True, but a policy always has"),
        (["--model.generator.too_long", "truncate"], "model.generator.too_long: truncate, but data.longest_prompt"),
        (["--model.group_size", "1"], "model.group_size: 1 is below 2"),
        (["--model.minibatches", "9"], "model.minibatches: 9 optimizer steps of 4 prompts"),
        (["--model.generator.max_new_tokens", "60"], "model.generator.max_new_tokens: 60, but a prompt of"),
        (["--model.objective", "llm_modules.objectives.SafePPO"], "model.costs: SafePPO holds a cost under a limit"),
        (
            ["-c", "safe", "--model.dynamic_sampling", "2"],
            "model.dynamic_sampling: SafePPO holds the mean cost of all answers",
        ),
        (["--data.batch_size", "64"], "data.batch_size: 64 prompts an iteration, but an epoch has 15"),
        (["--data.batch_size", "5", "--model.dynamic_sampling", "2"], "data.batch_size: 5 is no multiple"),
        (["--model.generator.strategy", "greedy"], "model.generator: strategy greedy does not sample"),
        (
            ["--model.objective", "llm_modules.objectives.OnlineDPO", "--model.drop_unfinished", "true"],
            "model.drop_unfinished: OnlineDPO compares answers",
        ),
        (
            [
                "--model.objective",
                "llm_modules.objectives.ReinforcePlusPlus",
                "--model.objective.baseline",
                "group",
                "--model.group_size",
                "1",
            ],
            "model.group_size: 1 is below 2",
        ),
        (["-c", "adapters/adalora", "--model.objective", PPO], "model.critic.adapter: AdaLoRA prunes the policy only"),
        (
            ["--model.critic", "{config: {model_type: llama}, quantization: nf4}", "--model.objective", PPO],
            "model.critic.quantization: nf4 cannot be trained without an adapter",
        ),
        (["--trainer.limit_train_batches", "5"], "trainer.limit_train_batches: 5 optimizer steps an epoch are no"),
        (
            ["--model.objective", "GRPO", "--model.objective.weighted_kl", "true"],
            "objective.weighted_kl: True, but kl is 0",
        ),
        (
            ["--model.objective", PPO, "--model.objective.kl", "0", "--model.objective.kl_in_loss", "true"],
            "objective.kl_in_loss: True is not allowed; it must be left out where kl is 0",
        ),
        (
            ["--model.objective", PPO, "--model.objective.kl_horizon", "20"],
            "objective.kl_horizon: 20 is not allowed; it must be left out where there is no kl_target",
        ),
        (["--model.reference", "copy"], "model.reference: copy, but GRPO compares with no reference (kl is 0)"),
        (["--model.objective.kl", "0.05"], "no class is named); name one: --model.objective GRPO"),
        (["--model.objective", "PolicyObjective"], "model.objective: PolicyObjective is what objectives are made of"),
        (["--model.objective", "own_rewards.Half"], "model.objective: Half has no terms of its own"),
        (["--data.longest_prompt", "64"], "data.longest_prompt: 64 leaves nothing of sequence_length 64"),
    ],
)
def test_settings_that_cannot_be(words: list[str], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "-c", "rl", *words]) == 2
    errors = capfd.readouterr().err
    assert said in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("function", "said"),
    [("bad", "reward bad: prompts.jsonl:"), ("nan", "reward nan: prompts.jsonl:"), ("absent", "absent")],
)
def test_rewards_that_fail_name_the_row(function: str, said: str, capfd: pytest.CaptureFixture[str]) -> None:
    text = RECIPE.replace("own_rewards.vowels", f"own_rewards.{function}")
    Path("rl.yaml").write_text(text)
    assert main(["fit", "-c", "rl"]) == 2
    errors = capfd.readouterr().err
    assert said in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("reward", "row", "said"),
    [
        ("NumericAnswer", {"reference": "(3, 4)"}, "reward numeric_answer: no number in the reference '(3, 4)'"),
        ("ExactAnswer", {"reference": None}, "reward exact_answer: it has no reference to compare with"),
        ("CodeTests", {"test_list": ["assert ("]}, "reward code_tests: column 'test_list' is no Python"),
    ],
)
@pytest.mark.parametrize("place", [3, 17])
def test_a_row_that_no_reward_could_score_is_found_before_training(
    reward: str, row: dict[str, Any], said: str, place: int, capfd: pytest.CaptureFixture[str]
) -> None:
    if reward == "CodeTests" and not kernel_has_landlock():
        pytest.skip("the kernel has no Landlock")
    fine = [{"prompt": f"Say {i}.", "reference": i, "test_list": ["assert f() == 1"]} for i in range(20)]
    fine[place] |= row
    write(fine)
    Path("rl.yaml").write_text(
        RECIPE.replace(
            "{class_path: llm_modules.evaluation.rewards.FunctionReward, init_args: {function: own_rewards.vowels}}",
            f"{{class_path: llm_modules.evaluation.{reward}}}",
        )
    )
    assert main(["fit", "-c", "rl", "--trainer.max_steps", "4"]) == 2
    errors = capfd.readouterr().err
    assert f"prompts.jsonl:{place + 1}: {said}" in errors
    assert "Traceback" not in errors
    assert not Path("runs/rl/0/metrics.csv").exists()


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise KeyError('nope')", "KeyError: 'nope' (own_rewards.py:2)"),
        ("import sys; sys.exit(3)", "SystemExit: 3 (own_rewards.py:2)"),
        ("return 1e300", "gave 1e+300, which is infinite in fp32"),
    ],
)
def test_rewards_that_cannot_count_name_the_row_and_their_line(
    code: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    Path("own_rewards.py").write_text(f"def vowels(answer):\n    {code}\n")
    assert main(["fit", "-c", "rl"]) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("recipes: ")]
    assert re.fullmatch(r"recipes: reward vowels: \S*prompts.jsonl:\d+: .*", line)
    assert said in line


def test_rewards_that_add_up_to_infinity_are_refused(capfd: pytest.CaptureFixture[str]) -> None:
    Path("own_rewards.py").write_text("def vowels(answer):\n    return 3e38\ndef more(answer):\n    return 3e38\n")
    kind = "class_path: llm_modules.evaluation.FunctionReward, init_args"
    both = ", ".join(f"{{{kind}: {{function: own_rewards.{name}}}}}" for name in ("vowels", "more"))
    assert main(["fit", "-c", "rl", "--model.rewards", f"[{both}]"]) == 2
    assert "what an answer is worth adds up to 6e+38 (costs: 0), which is not finite in fp32" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"question": "x"}, "no column 'prompt' or 'messages'; there are: question"),
        ({"prompt": ""}, "the prompt is ''"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "the prompt ends with the assistant"),
        ({"messages": [{"content": "x"}]}, "a message of the prompt has no role"),
        ({"prompt": "x", "reference": ["1"]}, "reference is of type list"),
    ],
)
def test_rows_that_are_no_prompt(row: dict[str, Any], said: str, capfd: pytest.CaptureFixture[str]) -> None:
    write([{"prompt": "fine"}, row])
    assert main(["fit", "-c", "rl"]) == 2
    assert f"prompts.jsonl:2: {said}" in capfd.readouterr().err
