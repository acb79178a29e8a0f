"""Bias by pair likelihood: small sets worked out by hand under a bigram model, and the published formulas."""

from __future__ import annotations

import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from llm_modules.evaluation.bias import BiasPairs, Triple, bbq_scores, common_tokens, stereoset_scores
from llm_modules.evaluation.measurement import Measurement, Subject
from llm_modules.tokenizer import byte_tokenizer


class Bigrams(nn.Module):
    """log p(next byte | byte): uniform, but for the bytes that are named with their probability."""

    def __init__(self, tokenizer: Any, **likely: dict[str, float]) -> None:
        super().__init__()
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace())
        self.embedding = nn.Embedding(260, 1)
        table = torch.full((260, 260), 1 / 260)
        for before, following in likely.items():
            row = tokenizer(before)["input_ids"][0]
            table[row] = (1 - sum(following.values())) / (260 - len(following))
            for after, probability in following.items():
                table[row, tokenizer(after)["input_ids"][0]] = probability
        self.register_buffer("table", table.log())

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table[input_ids])


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def measured(suite: BiasPairs, tokenizer: Any, **likely: dict[str, float]) -> dict[str, Measurement]:
    found = suite.measure(Subject(Bigrams(tokenizer, **likely), tokenizer, None))
    assert len({measurement.name for measurement in found}) == len(found)
    return {measurement.name: measurement for measurement in found}


def written(folder: Any, name: str, rows: Any) -> str:
    file = folder / name
    if name.endswith(".csv"):
        names = list(rows[0])
        file.write_text("\n".join([",".join(names), *(",".join(row[n] for n in names) for row in rows)]) + "\n")
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows) if name.endswith("l") else json.dumps(rows))
    return str(file)


def test_crows_pairs_by_hand(tmp_path, tokenizer):
    # p(b|x) = 1/2, p(c|a) = 1/2, p(c|b) = 1/4; every other byte is likelier after nothing in particular.
    rows = [
        {"sent_more": "xbc", "sent_less": "xac", "bias_type": "age"},  # 1/2 * 1/4 against small * 1/2
        {"sent_more": "ac", "sent_less": "bc", "bias_type": "age"},  # 1/260 * 1/2 against 1/260 * 1/4
        {
            "sent_more": "xab",
            "sent_less": "xbb",
            "bias_type": "religion",
        },  # a after x is rarer than b, b after a than b
        {"sent_more": "xb", "sent_less": "xa", "bias_type": "religion"},  # nothing in common after what differs
    ]
    suite = BiasPairs(written(tmp_path, "pairs.csv", rows), "crows_pairs")
    found = measured(suite, tokenizer, x={"b": 0.5}, a={"c": 0.5}, b={"c": 0.25})
    whole, given = "crows_pairs_stereotype", "crows_pairs_given_group"
    assert {name: (m.value, m.count) for name, m in found.items()} == {
        whole: (0.75, 4),
        f"{whole}/age": (1.0, 2),
        f"{whole}/religion": (0.5, 2),
        # Of the common tokens after the group: c after b against c after a; the other way round; b after a and b.
        given: (1 / 3, 3),
        f"{given}/age": (0.5, 2),
        f"{given}/religion": (0.0, 1),
    }
    # Wilson's interval of 3 of 4.
    z2 = 1.959964**2
    middle, half = (0.75 + z2 / 8) / (1 + z2 / 4), math.sqrt(z2 * (0.1875 / 4 + z2 / 64)) / (1 + z2 / 4)
    assert found[whole].low == pytest.approx(middle - half)
    assert found[whole].high == pytest.approx(middle + half)


def test_a_limit_is_spread_over_the_file(tmp_path):
    rows = [{"sent_more": str(number), "sent_less": "x"} for number in range(10)]
    path = written(tmp_path, "pairs.csv", rows)
    found = [int(row["sent_more"]) for row in BiasPairs(path, "crows_pairs", limit=4).rows]
    parts = [range(2), range(2, 5), range(5, 7), range(7, 10)]
    assert all(number in part for number, part in zip(found, parts, strict=True))
    assert [int(row["sent_more"]) for row in BiasPairs(path, "crows_pairs", limit=4).rows] == found
    assert [int(row["sent_more"]) for row in BiasPairs(path, "crows_pairs", limit=10).rows] == list(range(10))


@pytest.mark.parametrize("limit", [920, 460, 230])
def test_a_limit_meets_every_kind_of_a_file_that_repeats_them(tmp_path, limit):
    """BBQ's files do: a stride over them could be a multiple of the period."""
    kinds = [(context, polarity) for polarity in ("neg", "nonneg") for context in ("ambig", "disambig")]
    row = {
        "context": "c", "question": "q", "category": "Age", "label": 2, "ans0": "a", "ans1": "b", "ans2": "c",
        "answer_info": {"ans0": ["", "old"], "ans1": ["", "nonOld"], "ans2": ["", "unknown"]},
        "additional_metadata": {"stereotyped_groups": ["old"]},
    }  # fmt: skip
    rows = [row | dict(zip(("context_condition", "question_polarity"), kinds[i % 4], strict=True)) for i in range(3680)]
    found = BiasPairs(written(tmp_path, "Age.jsonl", rows), "bbq", limit=limit).rows
    counts = Counter((row["context_condition"], row["question_polarity"]) for row in found)
    assert len(found) == limit
    assert all(counts[kind] == pytest.approx(limit / 4, rel=0.25) for kind in kinds)


def test_what_two_sentences_have_in_common():
    assert common_tokens([0, 1, 2, 3, 9], [0, 5, 6, 2, 3]) == [(0, 0), (2, 3), (3, 4)]
    assert common_tokens([7, 7], [7, 7]) == [(0, 0), (1, 1)]
    # Of [1, 2] and [2, 1] difflib finds the first of whichever it is given first.
    assert common_tokens([1, 2], [2, 1]) == [(0, 1)]
    assert common_tokens([2, 1], [1, 2]) == [(1, 0)]


def test_stereoset_pairs_by_hand(tmp_path, tokenizer):
    rows = [
        # Means of log p a token: of four, two are 1/2 and one is 1/10, against one of three. The sums say otherwise.
        {"advantaged": "xbb", "disadvantaged": "xbxb", "gold-direction": "stereo"},
        {"advantaged": "xb", "disadvantaged": "xa", "gold-direction": "antistereo"},
        {"advantaged": "xb", "disadvantaged": "xa", "gold-direction": "stereo"},
    ]
    suite = BiasPairs(written(tmp_path, "pairs.csv", rows), "stereoset")
    found = measured(suite, tokenizer, x={"b": 0.5}, b={"x": 0.1})
    assert {name: (m.value, m.count) for name, m in found.items()} == {"stereoset_stereotype": (2 / 3, 3)}


def stereoset_json(triples: dict[str, list[tuple[str, str, str, str]]]) -> Any:
    labels = ("stereotype", "anti-stereotype", "unrelated")
    return {
        "version": "1.1",
        "data": {
            part: [
                {
                    "id": str(number),
                    "target": target,
                    "bias_type": "profession",
                    "context": "x",
                    "sentences": [{"gold_label": k, "sentence": s} for k, s in zip(labels, sentences, strict=True)],
                }
                for number, (target, *sentences) in enumerate(rows)
            ]
            for part, rows in triples.items()
        },
    }


def test_stereoset_with_unrelated_sentences_by_hand(tmp_path, tokenizer):
    sentences = {
        "intrasentence": [("cook", "xb", "xa", "xc"), ("cook", "xa", "xb", "xc"), ("nurse", "xb", "xa", "xc")],
        # Given the context "x", the sentence " b" is two bytes: the space, and b after it.
        "intersentence": [("nurse", "b", "a", "c")],
    }
    suite = BiasPairs(written(tmp_path, "dev.json", stereoset_json(sentences)), "stereoset")
    likely = {"x": {"b": 0.5, "c": 0.3}, " ": {"a": 0.4, "b": 0.5}}
    found = measured(suite, tokenizer, **likely)
    # cook: ss (1 + 0) / 2; nurse: (1 + 1) / 2.
    # Meaningful before unrelated: one of two, one of two; one of two, two of two (" a" beats " c").
    assert found["stereoset_stereotype"].value == pytest.approx(0.75)
    assert found["stereoset_language_model"].value == pytest.approx((0.5 + 0.75) / 2)
    assert found["stereoset_icat"].value == pytest.approx(0.625 * 0.25 / 0.5)
    assert found["stereoset_stereotype"].count == 2
    assert found["stereoset_stereotype/profession"].value == pytest.approx(0.75)


def test_icat_is_that_of_the_paper():
    """Its three reference models: ideal (lms 100, ss 50: 100), stereotyped (ss 100: 0), random (50, 50: 50)."""

    def of(*scores: tuple[float, float, float]) -> list[float]:
        rows = [(Triple(str(number), "", "", ()), values) for number, values in enumerate(scores)]
        return [measurement.value for measurement in stereoset_scores("s", rows)]

    assert of((2, 1, 0), (1, 2, 0)) == [0.5, 1.0, 1.0]
    assert of((2, 1, 0), (2, 1, 0)) == [1.0, 1.0, 0.0]
    assert of((2, 0, 1), (0, 2, 1)) == [0.5, 0.5, 0.5]


def bbq_row(condition: str, polarity: str, label: int, **fields: Any) -> dict[str, Any]:
    return {
        "context": "x",
        "question": "?",
        "ans0": "c",
        "ans1": "old",
        "ans2": "young",
        "answer_info": {"ans0": ["c", "unknown"], "ans1": ["old", "old"], "ans2": ["young", "nonOld"]},
        "additional_metadata": {"stereotyped_groups": ["old"]},
        "context_condition": condition,
        "question_polarity": polarity,
        "label": label,
        "category": "Age",
    } | fields


def test_bbq_scores_are_the_formulas_of_the_paper():
    ambiguous = [bbq_row("ambig", polarity, 0) for polarity in ("neg", "neg", "nonneg", "nonneg", "neg")]
    clear = [bbq_row("disambig", polarity, 1) for polarity in ("neg", "nonneg", "neg", "nonneg")]
    # Old in answer to a negative question and young to the other are biased.
    found = {m.name: m for m in bbq_scores(ambiguous + clear, [1, 0, 2, 2, 2, 1, 1, 0, 2])}
    accuracy, biased, decided = 1 / 5, 3, 4
    assert found["bbq_accuracy_ambiguous"].value == accuracy
    assert found["bbq_bias_ambiguous"].value == pytest.approx((1 - accuracy) * (2 * biased / decided - 1))
    assert found["bbq_accuracy_clear"].value == 2 / 4
    # Biased: old to neg, young to nonneg; against: old to nonneg; the third is unknown.
    assert found["bbq_bias_clear"].value == pytest.approx(2 * 2 / 3 - 1)
    assert found["bbq_bias_clear"].count == 3
    assert -1 < found["bbq_bias_clear"].low < 1 / 3 < found["bbq_bias_clear"].high < 1


@pytest.mark.parametrize(
    ("groups", "first", "second", "target"),
    [
        (["low SES"], ["a", "lowSES"], ["b", "highSES"], 1),
        (["F"], ["the man", "man"], ["the girl", "girl"], 2),
        (["Black", "African American"], ["Jane", "F-Black"], ["Ann", "F-White"], 1),
        (["Nigerian", "Kenyan"], ["The Kenyan man", "Africa"], ["Kenyan", "Africa"], 2),
        (["old"], ["a", "nonOld"], ["b", "old"], 2),
        (["Transgender women"], ["a", "nonTrans"], ["b", "trans_F"], 2),
        (["x"], ["a", "b"], ["c", "d"], None),
        (["gay", "lesbian"], ["a", "gay"], ["b", "lesbian"], None),
    ],
)
def test_whom_a_row_of_bbq_stereotypes(groups, first, second, target):
    info = {"ans0": ["c", "unknown"], "ans1": first, "ans2": second}
    row = bbq_row("ambig", "neg", 0, answer_info=info, additional_metadata={"stereotyped_groups": groups})
    names = {m.name: m for answer in (1,) for m in bbq_scores([row], [answer])}
    if target is None:  # then the row counts in the accuracy only
        assert list(names) == ["bbq_accuracy_ambiguous"]
    else:
        assert names["bbq_bias_ambiguous"].value == (1 if target == 1 else -1)


def test_bbq_answers_by_mean_likelihood(tmp_path, tokenizer):
    # After "A:" a space, then the answer: o is likely after it; the other bytes are not, whatever the answer's length.
    rows = [bbq_row("ambig", "neg", 0), bbq_row("disambig", "neg", 2)]
    found = measured(BiasPairs(written(tmp_path, "bbq.jsonl", rows), "bbq"), tokenizer, **{" ": {"o": 0.9}})
    assert {name: m.value for name, m in found.items()} == {
        f"{name}{kind}": value
        for kind in ("", "/Age")
        for name, value in (
            ("bbq_accuracy_ambiguous", 0.0),
            ("bbq_bias_ambiguous", 1.0),
            ("bbq_accuracy_clear", 0.0),
            ("bbq_bias_clear", 1.0),
        )
    }


@pytest.mark.parametrize(
    ("name", "content", "format", "message"),
    [
        ("a.csv", "sent_mor,sent_less\na,b\n", "crows_pairs", r"a.csv:1: no column 'sent_more'; there are: sent_mor, "),
        ("a.csv", "sent_mor,sent_less\na,b\n", "crows_pairs", r"did you mean 'sent_mor'\?"),
        ("a.csv", "sent_more,sent_less\n", "crows_pairs", r"a.csv: the file has no rows"),
        ("a.csv", "", "crows_pairs", r"a.csv: the file is empty"),
        ("a.csv", 'sent_more,sent_less\n"a,b\n', "crows_pairs", r"a.csv: broken CSV"),
        ("a.txt", "x", "crows_pairs", r"format '.txt' is not known; allowed: .jsonl, .json, .csv"),
        ("a.csv", "x", "crow_pairs", r"format: 'crow_pairs' is not allowed; .*did you mean 'crows_pairs'\?"),
        ("a.jsonl", "{", "bbq", r"a.jsonl:1: no JSON"),
        ("a.jsonl", json.dumps(bbq_row("vague", "neg", 0)), "bbq", r"1: context_condition: 'vague' is not allowed"),
        ("a.json", "{}", "stereoset", r"a.json: StereoSet's .json has an object 'data'"),
        ("a.json", "[1]", "bbq", r"a.json:1: an object is needed, not int"),
        ("a.json", "1", "bbq", r"a.json: a list of objects is needed"),
        (
            "a.jsonl",
            json.dumps(bbq_row("ambig", "neg", 0, answer_info="x")),
            "bbq",
            r"1: answer_info: an object is needed",
        ),
        ("a.csv", "sent_less,a\nb,c,d\n", "crows_pairs", r"1: no column 'sent_more'; there are: sent_less, a, None"),
        (
            "a.json",
            json.dumps({"data": {"intrasentence": [{"target": "x"}]}}),
            "stereoset",
            r"1: no column 'bias_type'",
        ),
        (
            "a.csv",
            "advantaged,disadvantaged,gold-direction\na,b,up\n",
            "stereoset",
            r"gold-direction: 'up' is not allowed",
        ),
    ],
)
def test_bad_files(tmp_path, name, content, format, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message) as error:
        BiasPairs(str(tmp_path / name), format)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
def test_not_utf8(tmp_path, name):
    (tmp_path / name).write_bytes("sent_more,sent_less\n\xe9,b\n".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{name}: not UTF-8: byte 0xe9 at offset 20"):
        BiasPairs(str(tmp_path / name), "crows_pairs")


def test_no_file(tmp_path, monkeypatch):
    (tmp_path / "pairs.csv").write_text("a\n")
    with pytest.raises(ValueError, match=r"no such file; did you mean 'pairs.csv'\?"):
        BiasPairs(str(tmp_path / "pair.csv"), "crows_pairs")
    monkeypatch.delenv("LITRECIPES_DATA", raising=False)
    with pytest.raises(ValueError, match="LITRECIPES_DATA is not set"):
        BiasPairs("data:pairs.csv", "crows_pairs")
    monkeypatch.setenv("LITRECIPES_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"pairs\.csv: the file has no rows"):
        BiasPairs("data:pairs.csv", "crows_pairs")
