"""The suites on the real sets: every row is read, and a model that knows nothing has no bias."""

from __future__ import annotations

import csv
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_modules.evaluation.bias import BiasPairs
from llm_modules.evaluation.gradient_search import Budget
from llm_modules.evaluation.jailbreaks import Jailbreaks
from llm_modules.evaluation.measurement import Measurement, Subject
from llm_modules.evaluation.suffixes import AdversarialSuffixes
from llm_modules.generation import Generator
from llm_modules.tokenizer import byte_tokenizer

pytestmark = pytest.mark.data


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=1024,
    )
    return Subject(LlamaForCausalLM(config), byte_tokenizer(), Generator(max_new_tokens=4, batch_size=64))


def measured(suite: Any, subject: Subject) -> dict[str, Measurement]:
    return {measurement.name: measurement for measurement in suite.measure(subject)}


def test_crows_pairs(subject, data_folder, tmp_path):
    found = measured(BiasPairs("data:crows_pairs/crows_pairs.csv", "crows_pairs"), subject)
    assert found["crows_pairs_stereotype"].count == 904
    assert len(found) == 2 * (1 + 9)
    for name in ("crows_pairs_stereotype", "crows_pairs_given_group"):
        # Not the interval: pairs share the names of groups, which weights drawn once like or do not.
        assert found[name].value == pytest.approx(0.5, abs=0.1)
        assert sum(m.count for key, m in found.items() if key.startswith(f"{name}/")) == found[name].count
    rows = list(csv.DictReader((data_folder / "crows_pairs" / "crows_pairs.csv").open(encoding="utf-8")))
    with (tmp_path / "swapped.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["sent_more", "sent_less", "bias_type"])
        writer.writerows([row["sent_less"], row["sent_more"], row["bias_type"]] for row in rows)
    swapped = measured(BiasPairs(str(tmp_path / "swapped.csv"), "crows_pairs"), subject)
    assert {k: m.value for k, m in swapped.items()} == {k: pytest.approx(1 - m.value) for k, m in found.items()}


def test_stereoset_pairs(subject):
    found = measured(BiasPairs("data:stereoset_pairs/stereoset_pairs.csv", "stereoset"), subject)
    assert list(found) == ["stereoset_stereotype"]
    assert found["stereoset_stereotype"].count == 2106
    assert found["stereoset_stereotype"].value == pytest.approx(0.5, abs=0.06)


@pytest.mark.slow
def test_bbq(subject):
    found = measured(BiasPairs("data:bbq_sample/bbq.jsonl", "bbq"), subject)
    assert found["bbq_accuracy_ambiguous"].count == found["bbq_accuracy_clear"].count == 420
    assert found["bbq_bias_ambiguous"].count == 420  # of every row it is known whom it stereotypes
    assert len(found) == 4 * (1 + 6)
    for name in ("bbq_bias_ambiguous", "bbq_bias_clear"):
        assert found[name].low < 0 < found[name].high


def test_advbench(subject):
    path = "data:advbench/harmful_behaviors.csv"
    frames = measured(Jailbreaks(path, lambda prompt, answer: True, column="goal", limit=20), subject)
    assert {m.value for m in frames.values()} == {0.0}
    assert all(m.count == 20 for m in frames.values())
    suite = AdversarialSuffixes(path, lambda prompt, answer: True, budget=Budget(3, 32, 16), start="! ! ! !", limit=2)
    found = measured(suite, subject)
    assert found["suffix_target_loss"].value < found["suffix_target_loss_start"].value
