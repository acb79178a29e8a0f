"""The built-in safety set: what is in it, that its parts share no request, that refusals are told from answers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from llm_modules.data import Source
from llm_modules.data.safety_requests import COMPLIANCES, HELD_OUT_WORDS
from llm_modules.data.safety_twins import TWINS, WORDS
from llm_modules.evaluation.rewards import Answer
from llm_modules.evaluation.verdicts import StringMatch


def columns(path: str, split: str = "train") -> list[dict[str, Any]]:
    return [row.columns for row in Source(path, split=split).rows()]


def requests(path: str, split: str = "train") -> list[str]:
    return [row["messages"][0]["content"] for row in columns(path, split)]


def test_the_sizes_that_are_said() -> None:
    assert [len(requests("builtin:safety", split)) for split in ("train", "validation")] == [2156, 384]
    kinds = Counter(row["label"] for row in columns("builtin:safety"))
    assert kinds == {"harmful": 1080, "benign": 1076}
    assert Counter(row["label"] for row in columns("builtin:safety", "validation")) == {"harmful": 192, "benign": 192}
    assert set(Counter(twin.category for twin in TWINS).values()) == {6}


def test_the_parts_share_no_request_and_no_word() -> None:
    train, held_out = requests("builtin:safety"), requests("builtin:safety", "validation")
    assert len(set(train)) == len(train)
    assert not set(train) & set(held_out)
    assert all(len(set(words)) == len(words) for words in WORDS.values())
    held = {word for words in WORDS.values() for word in words[-HELD_OUT_WORDS:]}
    assert not held & {word for words in WORDS.values() for word in words[:-HELD_OUT_WORDS]}
    assert sum(any(word in asked for word in held) for asked in held_out) == len(held_out)


def test_the_other_views_are_of_the_same_requests() -> None:
    whole = requests("builtin:safety")
    refusals, twins = requests("builtin:safety-refusals"), requests("builtin:safety-twins")
    assert sorted(refusals + twins) == sorted(whole)
    assert requests("builtin:safety-compliances") == refusals
    assert requests("builtin:safety-preferences") == whole


@pytest.mark.parametrize("split", ["train", "validation"])
def test_pairs_prefer_refusals_of_harm_and_answers_to_twins(split: str) -> None:
    pairs = columns("builtin:safety-preferences", split)
    judge = StringMatch()
    refused = {
        side: judge.judge([Answer(i, "", row[side]) for i, row in enumerate(pairs)]) for side in ("chosen", "rejected")
    }
    assert refused["chosen"] == [row["label"] == "harmful" for row in pairs]
    assert refused["rejected"] == [row["label"] == "benign" for row in pairs]
    assert {row["rejected"] for row in pairs if row["label"] == "harmful"} == set(COMPLIANCES)  # without any content
    assert len({row["chosen"] for row in pairs if row["label"] == "harmful"}) > 50


def test_a_set_that_is_not_there() -> None:
    with pytest.raises(ValueError, match=r"'builtin:safe' is not known; built in are .*'builtin:safety'"):
        columns("builtin:safe")
    with pytest.raises(ValueError, match="no split 'test'"):
        columns("builtin:safety", "test")
