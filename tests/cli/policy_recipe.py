"""A folder with a recipe of reinforcement learning, its prompts and its rewards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 64
seed_everything: 3
model:
  class_path: llm_modules.PolicyModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 128}
    rewards: [{class_path: llm_modules.evaluation.rewards.FunctionReward, init_args: {function: own_rewards.vowels}}]
    group_size: 4
    epochs: 2
    minibatches: 2
    generator: {strategy: sample, max_new_tokens: 8, batch_size: 32}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2, weight_decay: 0.0}}
data:
  class_path: llm_modules.data.PromptDataModule
  init_args: {sources: [{path: prompts.jsonl}], chat_template: chatml, batch_size: 4, validation_fraction: 0.2,
              longest_prompt: 56}
trainer: {max_steps: 12, accelerator: cpu, devices: 1, log_every_n_steps: 1, val_check_interval: 12,
          check_val_every_n_epoch: null, enable_progress_bar: false}
checkpoint: {every_n_steps: 3, keep_last: 30}
"""
REWARDS = """\
import math, random
import numpy, torch
def dice(answer):
    return random.random() + numpy.random.random() + torch.rand(()).item()
def vowels(answer):
    return sum(c in "aeiou" for c in answer.text) / max(1, answer.tokens)
def same(answer):
    return 1.0
def bad(answer):
    return 1 / (answer.row - answer.row)
def nan(answer):
    return math.nan
def x(answer):
    return float("x" in answer.text)
from llm_modules.evaluation import Reward
from llm_modules.objectives import PolicyObjective
class Half(PolicyObjective):
    def prepare(self, rollouts):
        return {}
class NoScore(Reward):
    pass
class Unset(Reward):
    def __init__(self, weight: float = 1.0):
        pass
    def score(self, answers):
        return [1.0 for answer in answers]
"""
PPO = "llm_modules.objectives.PPO"
SAFE = """\
model:
  init_args:
    objective: {class_path: llm_modules.objectives.SafePPO, init_args: {limit: 0.1}}
    costs: [{class_path: llm_modules.evaluation.rewards.FunctionReward, init_args: {function: own_rewards.x}}]
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    write([{"prompt": f"Say {i}.", "reference": i} for i in range(20)])
    Path("rl.yaml").write_text(RECIPE)
    Path("safe.yaml").write_text(SAFE)
    Path("own_rewards.py").write_text(REWARDS)
    return tmp_path


def write(rows: list[dict[str, Any]]) -> None:
    Path("prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
