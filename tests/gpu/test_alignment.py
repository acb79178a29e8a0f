"""Preference tuning, reward models and reinforcement learning on one GPU: what the same run gives on a CPU."""

from __future__ import annotations

import csv
import json
import sys
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest
import yaml
from lightning.pytorch.plugins.precision import MixedPrecision, Precision

from llm_modules.generation import Generator
from recipes.__main__ import main
from tests.cli.policy_recipe import RECIPE
from tests.unit.test_generation_rollout import FAMILIES, built, sample

pytestmark = pytest.mark.gpu

TUNINGS = ("preference/quickstart", "preference/kto-quickstart", "reward/quickstart")
POLICIES: dict[str, dict[str, Any]] = {
    "GRPO": {"class_path": "llm_modules.objectives.GRPO", "init_args": {"kl": 0.1}},
    "PPO": {"class_path": "llm_modules.objectives.PPO"},
    "OnlineDPO": {"class_path": "llm_modules.objectives.OnlineDPO"},
}


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)


def fit(recipe: str, name: str, *words: str) -> list[dict[str, float]]:
    """The training columns of metrics.csv, of each step."""
    assert main(["fit", "-c", recipe, "--runs_dir", name, *words]) == 0
    with next(Path(name).rglob("metrics.csv")).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("train/loss")]
    kept = ("train/", "rollout/")
    return [{key: float(value) for key, value in row.items() if value and key.startswith(kept)} for row in rows]


def assert_same(found: list[dict[str, float]], expected: list[dict[str, float]], tolerance: float) -> None:
    assert len(found) == len(expected) > 0
    for step, (row, known) in enumerate(zip(found, expected, strict=True)):
        for key in known:
            difference = abs(row[key] - known[key])
            assert difference <= tolerance * (1 + abs(known[key])), f"step {step}, {key}: {row[key]}, not {known[key]}"


@pytest.mark.parametrize("recipe", TUNINGS)
def test_tuning_is_that_of_a_cpu(recipe: str) -> None:
    words = ("--trainer.max_steps", "4", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "0")
    # At a reward model's own rate the first steps throw it about, and rounding with it.
    words += ("--leave_out", "[ExportFolder, RunReport]", "--model.init_args.optimizer.init_args.lr", "1e-4")
    known = fit(recipe, "cpu", *words, "--trainer.accelerator", "cpu", "--trainer.precision", "32-true")
    on_gpu = ("--trainer.accelerator", "gpu", "--trainer.devices", "1")
    assert_same(fit(recipe, "gpu", *words, *on_gpu, "--trainer.precision", "32-true"), known, 1e-4)
    losses = [{"train/loss": row["train/loss"]} for row in known]
    assert_same(fit(recipe, "bf16", *words, *on_gpu, "--trainer.precision", "bf16-mixed"), losses, 0.02)


def test_prompts_shared_or_apart() -> None:
    """The same losses, in fp32 with our own operator and in bf16 with torch's flash kernel."""
    words = ("--trainer.max_steps", "3", "--trainer.log_every_n_steps", "1", "--trainer.limit_val_batches", "0")
    words += ("--leave_out", "[ExportFolder, RunReport]", "--trainer.accelerator", "gpu", "--trainer.devices", "1")
    for precision, tolerance in (("32-true", 1e-5), ("bf16-mixed", 0.01)):
        run = (*words, "--trainer.precision", precision)
        together, apart = (
            fit("preference/quickstart", f"{precision}-{shared}", *run, "--data.init_args.share_prompts", shared)
            for shared in ("true", "false")
        )
        keys = ("train/loss", "train/reward_chosen") if precision == "32-true" else ("train/loss",)
        kept = [[{key: row[key] for key in keys if key in row} for row in rows] for rows in (together, apart)]
        assert_same(*kept, tolerance)


@pytest.mark.parametrize("objective", POLICIES)
def test_policies_learn_as_on_a_cpu(objective: str) -> None:
    """The same answers, rewards and losses in fp32, with keys and values that grow and with a recorded step; then in
    bf16, where other answers are drawn, the log-probabilities of sampling are those of training up to rounding."""
    config = yaml.safe_load(RECIPE)
    arguments = config["model"]["init_args"]
    arguments["objective"] = POLICIES[objective]
    arguments["rewards"][0]["init_args"]["function"] = "own_rewards.letters"
    arguments["optimizer"]["init_args"]["lr"] = 1e-3
    arguments["backbone"]["config"] |= {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config["trainer"] |= {"max_steps": 8, "val_check_interval": 100}
    config["leave_out"] = ["ExportFolder", "RunReport"]
    Path("rl.yaml").write_text(yaml.safe_dump(config))
    Path("own_rewards.py").write_text("def letters(answer):\n    return sum(map(ord, answer.text)) % 11 / 10\n")
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(20)))
    known = fit("rl", "cpu")
    on_gpu = ("--trainer.accelerator", "gpu")
    for cache in ("dynamic", "static"):
        assert_same(fit("rl", cache, *on_gpu, "--model.init_args.generator.cache", cache), known, 1e-3)
        words = (*on_gpu, "--model.init_args.generator.cache", cache, "--trainer.precision", "bf16-mixed")
        narrow = fit("rl", f"bf16-{cache}", *words)
        assert max(row["train/sampling_difference"] for row in narrow[::4]) < 0.05


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gemma2"])
@pytest.mark.parametrize("narrow", [False, True])
def test_a_recorded_step_is_the_step(family: str, narrow: bool) -> None:
    """Rows leave, and the step is recorded again; in bf16 the graph casts the weights."""
    model, tokenizer = built(family)
    model.cuda()
    found = {}
    for cache in ("dynamic", "static"):
        settings = Generator(strategy="sample", max_new_tokens=40, seed=3, batch_size=12, cache=cache)  # type: ignore[arg-type]
        plugin = MixedPrecision("bf16-mixed", "cuda") if narrow else Precision()
        with plugin.forward_context():
            found[cache] = [answer for group in sample(model, tokenizer, settings)[1] for answer in group]
    for grown, fixed in zip(found["dynamic"], found["static"], strict=True):
        alike = zip(grown.token_ids, fixed.token_ids, strict=False)
        shared = len(list(takewhile(lambda pair: pair[0] == pair[1], alike)))
        assert shared > 0  # the first comes of the same reading of the prompt; in bf16 a later one may fall otherwise
        assert narrow or grown.token_ids == fixed.token_ids
        assert grown.logprobs[:shared] == pytest.approx(fixed.logprobs[:shared], abs=0.1 if narrow else 1e-4)
    assert len({len(answer.token_ids) for answer in found["static"]}) > 1
