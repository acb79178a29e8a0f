"""Toxicity: the published statistics of a small classifier's scores, each text classified by itself."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from llm_modules.evaluation.measurement import Subject
from llm_modules.evaluation.toxicity import Toxicity
from llm_modules.generation import Generator
from llm_modules.tokenizer import byte_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 260,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "initializer_range": 0.5,
    "pad_token_id": 257,
}


def classifier(folder: Any, **options: Any) -> str:
    torch.manual_seed(1)
    labels = {"id2label": {0: "fine", 1: "toxic"}, "label2id": {"fine": 0, "toxic": 1}}
    model = LlamaForSequenceClassification(LlamaConfig(**SIZES, max_position_embeddings=24, **(labels | options)))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def prompts(tmp_path) -> str:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": {"text": "So I"}, "say": "They"}, {"prompt": {"text": "The long story"}, "say": "We all"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=64))
    return Subject(model, byte_tokenizer(), Generator(strategy="sample", max_new_tokens=20, seed=3))


@pytest.mark.parametrize("problem", [None, "multi_label_classification"])
def test_the_statistics_of_scores_taken_one_by_one(tmp_path, prompts, subject, problem):
    folder = classifier(tmp_path / "classifier", problem_type=problem)
    suite = Toxicity(folder, "toxic", prompts, threshold=0.4, samples=3, batch_tokens=40)
    found = {measurement.name: measurement for measurement in suite.measure(subject)}
    asked = ["So I"] * 3 + ["The long story"] * 3
    said = [c.text for c in subject.generator.generate(subject.model, subject.tokenizer, asked)]
    assert len(set(said)) == 6
    model = LlamaForSequenceClassification.from_pretrained(folder)
    scores = []
    for text in said:
        ids = torch.tensor([subject.tokenizer(text)["input_ids"][:24]])
        logits = model(ids).logits[0].detach()
        scores.append(float(logits[1].sigmoid() if problem else logits.softmax(0)[1]))
    highest = [max(scores[:3]), max(scores[3:])]
    assert found["toxicity_expected_maximum"].value == pytest.approx(sum(highest) / 2, abs=1e-5)
    assert found["toxicity_mean"].value == pytest.approx(sum(scores) / 6, abs=1e-5)
    assert found["toxicity_probability"].value == sum(value >= 0.4 for value in highest) / 2
    assert found["toxicity_probability"].count == 2


def test_another_column_and_one_greedy_answer(tmp_path, prompts, subject):
    suite = Toxicity(classifier(tmp_path / "classifier"), "fine", prompts, column="say", samples=1, limit=1)
    assert suite.prompts == ["We all"]  # the one that is drawn
    assert len(Toxicity(str(tmp_path), "fine", prompts, limit=9).prompts) == 2
    greedy = Subject(subject.model, subject.tokenizer, Generator(max_new_tokens=4))
    first, *_ = suite.measure(greedy)
    assert first.count == 1
    assert 0 < first.value < 1


def test_what_is_not_allowed(tmp_path, prompts, subject):
    folder = classifier(tmp_path / "classifier")
    with pytest.raises(ValueError, match=r"label: 'toxi' is not a class of .*: fine, toxic; did you mean 't"):
        Toxicity(folder, "toxi", prompts).measure(subject)
    with pytest.raises(ValueError, match=r"classifier: '/nowhere/at/all' cannot be opened as a classifier"):
        Toxicity("/nowhere/at/all", "toxic", prompts).measure(subject)
    pickled = classifier(tmp_path / "pickled")
    weights = LlamaForSequenceClassification.from_pretrained(pickled).state_dict()
    torch.save(weights, tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"classifier: .* cannot be opened as a classifier"):
        Toxicity(pickled, "toxic", prompts).measure(subject)
    with pytest.raises(
        ValueError, match=r"samples: 25 is not allowed with generator.strategy 'greedy'.*strategy: sample"
    ):
        Toxicity(folder, "toxic", prompts).measure(Subject(subject.model, subject.tokenizer, Generator()))
    with pytest.raises(ValueError, match=r"threshold: 0 is not allowed; above 0"):
        Toxicity(folder, "toxic", prompts, threshold=0)
    with pytest.raises(ValueError, match=r"no column 'prompts'; .*did you mean 'prompt'"):
        Toxicity(folder, "toxic", prompts, column="prompts")
