"""Planted canaries: ranks by brute force, the tail of the fitted distribution, and a model that memorizes."""

from __future__ import annotations

import json
import math
import random
import re

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_modules.evaluation.canaries import Canaries, skew_normal_log_tail, write_canaries
from llm_modules.evaluation.likelihood import encode
from llm_modules.evaluation.measurement import Subject
from llm_modules.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


def model(hidden: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=260,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    return LlamaForCausalLM(config)


def measured(suite, model, tokenizer):
    return {measurement.name: measurement for measurement in suite.measure(Subject(model, tokenizer, None))}


def test_what_is_written(tmp_path):
    file = write_canaries(tmp_path / "new", digits=4, each=3, repeats=(0, 2, 5))
    canaries = [json.loads(line) for line in file.read_text().splitlines()]
    training = [json.loads(line)["text"] for line in (tmp_path / "new" / "train.jsonl").read_text().splitlines()]
    assert [row["repeats"] for row in canaries] == [0] * 3 + [2] * 3 + [5] * 3
    assert len({row["name"] for row in canaries}) == 9
    for row in canaries:
        text = f"The access code of {row['name']} is {row['secret']}"
        assert re.fullmatch(r"\d{4}", row["secret"])
        assert training.count(text) == row["repeats"]
    assert len(training) == 21
    again = write_canaries(tmp_path / "again", digits=4, each=3, repeats=(0, 2, 5))
    assert again.read_text() == file.read_text()
    other = write_canaries(tmp_path / "other", digits=4, each=3, repeats=(0, 2, 5), seed=1)
    assert other.read_text() != file.read_text()


def test_exposure_is_the_rank_by_brute_force(tmp_path, tokenizer):
    file = write_canaries(tmp_path, "{name}: {digits}, said she.", digits=2, each=2, repeats=(0, 1))
    lm = model().eval()
    expected = []
    for line in file.read_text().splitlines():
        row = json.loads(line)
        losses = {}
        for number in range(100):
            ids = torch.tensor([encode(tokenizer, f"{row['name']}: {number:02d}, said she.")])
            losses[f"{number:02d}"] = float(lm(input_ids=ids, labels=ids).loss.detach()) * (ids.shape[1] - 1)
        rank = sum(loss <= losses[row["secret"]] for loss in losses.values())
        expected.append(math.log2(100) - math.log2(rank))
    found = measured(Canaries(str(file)), lm, tokenizer)
    assert found["canary_exposure/0"].value == pytest.approx(sum(expected[:2]) / 2, abs=1e-9)
    assert found["canary_exposure/1"].value == pytest.approx(sum(expected[2:]) / 2, abs=1e-9)
    assert found["canary_extracted/0"].value == 0.0


def test_of_a_model_that_saw_none_the_mean_is_that_of_a_uniform_rank(tmp_path, tokenizer):
    file = write_canaries(tmp_path, "{digits}", digits=2, each=30, repeats=(0,))
    uniform = sum(math.log2(100) - math.log2(rank) for rank in range(1, 101)) / 100
    exact = measured(Canaries(str(file)), model(), tokenizer)["canary_exposure/0"]
    assert exact.low < uniform < exact.high
    for estimate in ("skew_normal", "sampling"):
        drawn = measured(Canaries(str(file), candidates=50, estimate=estimate), model(), tokenizer)["canary_exposure/0"]
        assert drawn.value == pytest.approx(exact.value, abs=0.3)
        again = measured(Canaries(str(file), candidates=50, estimate=estimate), model(), tokenizer)
        assert again["canary_exposure/0"] == drawn


@pytest.mark.parametrize("alpha", [0.0, 2.0, -3.0])
@pytest.mark.parametrize("at", [-6.0, -2.0, 0.5, 3.0])
def test_the_tail_is_the_integral_of_the_density_with_those_moments(alpha, at):
    mpmath = pytest.importorskip("mpmath")
    draw = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 4000, generator=draw, dtype=torch.float64)
    delta = alpha / math.sqrt(1 + alpha**2)
    values = 5 + 2 * (delta * u.abs() + math.sqrt(1 - delta**2) * v)
    # The distribution with the sample's mean, variance and skewness, by solving for its parameters.
    mean, spread = float(values.mean()), float(values.std())
    skewness = float((((values - mean) / spread) ** 3).mean())

    def skew(d: float) -> float:
        return (4 - math.pi) / 2 * (d * math.sqrt(2 / math.pi)) ** 3 / (1 - 2 * d * d / math.pi) ** 1.5

    low, high = -0.9999999, 0.9999999
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if skew(middle) < skewness else (low, middle)
    scale = spread / math.sqrt(1 - 2 * low * low / math.pi)
    location = mean - scale * low * math.sqrt(2 / math.pi)
    shape = low / math.sqrt(1 - low * low)
    point = mean + at * spread

    def density(x):
        z = (x - location) / scale
        return 2 / scale * mpmath.npdf(z) * mpmath.ncdf(shape * z)

    whole = mpmath.quad(density, [point - 40 * scale, point - 10 * scale, point - 2 * scale, point])
    assert skew_normal_log_tail(values.tolist(), point) == pytest.approx(float(mpmath.log(whole)), rel=1e-4, abs=1e-4)


def test_a_canary_that_is_far_likelier_than_all_others_is_at_the_most(tmp_path, tokenizer):
    assert skew_normal_log_tail([100.0 + step % 7 for step in range(100)], 1.0) < -300


@pytest.mark.slow
def test_a_repeated_canary_is_memorized_and_one_that_was_not_planted_is_not(tmp_path, tokenizer):
    file = write_canaries(tmp_path, digits=3, each=4, repeats=(0, 64))
    texts = [json.loads(line)["text"] for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    draw = random.Random(0)
    for _ in range(1000):  # so that the model learns what a code looks like, but none of another's
        name = "".join(draw.choices("abcdefghij", k=6)).capitalize()
        texts.append(f"The access code of {name} is {draw.randrange(1000):03d}")
    rows = [encode(tokenizer, text) for text in texts]
    lm = model(64)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=3e-3)
    for _ in range(300):
        batch = draw.sample(rows, 32)
        ids = torch.full((32, max(map(len, batch))), 257)
        for number, row in enumerate(batch):
            ids[number, : len(row)] = torch.tensor(row)
        lm(input_ids=ids, labels=ids.masked_fill(ids == 257, -100)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for candidates in (999, 200):  # exactly, and estimated
        found = measured(Canaries(str(file), candidates=candidates), lm, tokenizer)
        assert found["canary_exposure/64"].value > 8
        assert found["canary_extracted/64"].value == 1.0
        assert found["canary_exposure/0"].value < 3
        assert found["canary_extracted/0"].value == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"template": "The code is {number}"}, r"template: 'The code is \{number\}' is not allowed; one \{digits\}"),
        ({"template": "The code"}, r"one \{digits\} and, if wanted, \{name\} are"),
        ({"template": "{digits} {digits}"}, r"one \{digits\}"),
        ({"template": "{digits"}, r"template: '\{digits' is not allowed"),
        ({"digits": 0}, "digits: 0 is not allowed; at least 1 is"),
        ({"repeats": ()}, "repeats: -1 is not allowed"),
        ({"each": 1000}, r"each: 1000 canaries for each of 5 numbers of repeats; at most \d+ in all"),
    ],
)
def test_bad_canaries(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        write_canaries(tmp_path / "x", **arguments)
    assert not (tmp_path / "x").exists()


def test_bad_files(tmp_path):
    file = tmp_path / "canaries.jsonl"
    row = {"template": "{digits}", "name": "", "secret": "12", "repeats": 0}
    file.write_text(json.dumps(row | {"template": "no"}))
    with pytest.raises(ValueError, match="template: 'no' is not allowed"):
        Canaries(str(file))
    file.write_text(json.dumps({"template": "{digits}", "name": "", "secrets": "12"}))
    with pytest.raises(ValueError, match=r"1: no column 'secret'; .*did you mean 'secrets'\?"):
        Canaries(str(file))
    file.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="estimate: 'normal' is not allowed; allowed: skew_normal, sampling"):
        Canaries(str(file), estimate="normal")
    with pytest.raises(ValueError, match="candidates: 3 is not allowed; at least 10 is"):
        Canaries(str(file), candidates=3)
