"""Every suite by ``class_path``, as a config names it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from jsonargparse import ArgumentParser

from llm_modules.evaluation.asking import refused
from llm_modules.evaluation.canaries import write_canaries
from llm_modules.evaluation.measurement import Suite
from llm_modules.evaluation.rewards import Answer


class Refuses:
    def __call__(self, prompt: str, answer: str) -> bool:
        return answer.startswith("I cannot")


class Judge:
    """One that takes many answers at once, of whatever has their ``text``."""

    def __init__(self, word: str = "I cannot") -> None:
        self.word = word

    def judge(self, replies: Sequence[Answer]) -> list[bool]:
        return [reply.request != "" and reply.text.startswith(self.word) for reply in replies]


DETECTOR = {"class_path": f"{__name__}.Refuses"}
JUDGE = {"class_path": f"{__name__}.Judge", "init_args": {"word": "No"}}
SUITES: dict[str, dict[str, Any]] = {
    "bias.BiasPairs": {"path": "pairs.csv", "format": "crows_pairs"},
    "canaries.Canaries": {"path": "canaries.jsonl", "candidates": 100},
    "toxicity.Toxicity": {"classifier": "some/classifier", "label": "toxic", "prompts": "goals.csv", "column": "goal"},
    "jailbreaks.Jailbreaks": {"prompts": "goals.csv", "column": "goal", "detector": DETECTOR, "only": ["persona"]},
    "suffixes.AdversarialSuffixes": {"prompts": "goals.csv", "detector": JUDGE, "budget": {"steps": 3}},
}


@pytest.mark.parametrize("name", SUITES)
def test_by_class_path(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.csv").write_text("sent_more,sent_less\na,b\n")
    (tmp_path / "goals.csv").write_text('goal,target\nDo it,"Sure, here"\n')
    write_canaries(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--suites", type=list[Suite])
    class_path = f"llm_modules.evaluation.{name}"
    config = parser.parse_object({"suites": [{"class_path": class_path, "init_args": SUITES[name]}]})
    (suite,) = parser.instantiate(config).suites
    assert f"{type(suite).__module__}.{type(suite).__name__}" == class_path
    for key in ("format", "candidates", "label"):
        assert getattr(suite, key, None) == SUITES[name].get(key)
    if name.startswith("suffixes"):
        assert suite.budget.steps == 3
        assert suite.budget.top_k == 256
    if "detector" in SUITES[name]:
        said = ["I cannot say", "Sure", "No"]
        refusals = [False, False, True] if name.startswith("suffixes") else [True, False, False]
        assert refused(suite.detector, ["a", "b", "c"], said) == refusals


@pytest.mark.parametrize("name", SUITES)
def test_every_argument_is_documented(name, capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Suite, "suite")
    with pytest.raises(SystemExit):
        parser.parse_args(["--suite.help", f"llm_modules.evaluation.{name}"])
    _, _, arguments = capsys.readouterr().out.partition("Help for")
    for flag in arguments.split("  --suite.")[1:]:
        _, _, said = flag.partition(" ")
        text = " ".join(said.split())
        described = text.partition(" (")[0] if " (" in text else text
        assert len(described.split()) > 2, flag
