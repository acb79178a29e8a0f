"""The arithmetic of the benchmark of preference tuning, worked out by hand, and how it deals the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import preference


def test_a_tie_is_half_a_win() -> None:
    assert preference.wins([1.0, 2.0, 3.0], [2.0, 2.0, 1.0]) == [0.0, 0.5, 1.0]


def test_a_mean_has_the_error_of_its_sample() -> None:
    # Squares of the deviations: 1/4, 0, 1/4; divided by 2 and by 3.
    mean, error = preference.estimate([0.0, 0.5, 1.0])
    assert (mean, error) == (0.5, pytest.approx((1 / 12) ** 0.5))


def test_wins_at_equal_length_are_where_the_line_meets_zero() -> None:
    # y = 2/3 + x/2 leaves -1/6, 1/3, -1/6: variance 1/6 with one degree of freedom, a third of it at the mean of x.
    mean, error = preference.at_equal_length([0.0, 1.0, 1.0], [-1.0, 0.0, 1.0])
    assert (mean, error) == (pytest.approx(2 / 3), pytest.approx((1 / 18) ** 0.5))
    # Longer answers win, by nothing but their length: at x = 0 half of the points are left.
    mean, error = preference.at_equal_length([0.6, 0.7, 0.8], [1.0, 2.0, 3.0])
    assert (mean, error) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-9))
    assert preference.at_equal_length([0.0, 1.0], [4.0, 4.0]) == preference.estimate([0.0, 1.0])


def test_seeds_are_independent() -> None:
    assert preference.over_seeds([(0.5, 0.03), (0.7, 0.04)]) == (pytest.approx(0.6), pytest.approx(0.025))


def test_the_table_has_mean_error_and_range() -> None:
    found = {"dpo": {1: {"win_rate": (0.5, 0.03)}, 2: {"win_rate": (0.7, 0.04)}}}
    line = preference.table(found, {"win rate, %": ("win_rate", 100)}).splitlines()[-1]
    assert line == "| dpo | 2 | 60.0 ± 2.5 (50.0 to 70.0) |"


def test_dialogues_that_begin_alike_are_on_one_side(tmp_path: Path) -> None:
    def row(opening: str, more: str = "", chosen: str = "Yes.", rejected: str = "No.") -> dict[str, str]:
        prompt = f"\n\nHuman: {opening}{more}\n\nAssistant: "
        return {"chosen": prompt + chosen, "rejected": prompt + rejected}

    rows = [row(f"Question {number}?") for number in range(40)]
    again = [row(f"Question {number}?", "\n\nAssistant: What?\n\nHuman: That!") for number in range(40)]
    bad = [row("Same?", chosen="Yes.", rejected="Yes."), row("Long?", chosen="y" * preference.CHARACTERS)]
    (tmp_path / "hh_rlhf").mkdir()
    for name, written in zip(preference.FILES, (rows, again + bad), strict=True):
        preference.write(tmp_path / "hh_rlhf" / f"{name}.jsonl", written)
    preference.deal(tmp_path, tmp_path, seed=1)
    train, held_out = (preference.read(tmp_path / f"{part}.jsonl") for part in ("train", "held_out"))
    openings = [{row["messages"][0]["content"] for row in part} for part in (train, held_out)]
    assert len(train) + len(held_out) == 80
    assert len(openings[0]) + len(openings[1]) == 40
    assert not openings[0] & openings[1]
    dialogues = (tmp_path / "dialogues.jsonl").read_text()
    assert not any(json.dumps(opening) in dialogues for opening in openings[1])
    assert len(preference.read(tmp_path / "answers.jsonl")) == 2 * len(held_out)
