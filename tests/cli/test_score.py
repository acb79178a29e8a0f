"""Answers are sampled, scored by a reward model, and chosen from; the scores are those of transformers' classifier."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llm_modules.language_model import LanguageModelModule
from llm_modules.reward import RewardModule
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone
from recipes.__main__ import main
from tests.parity.test_trl_sft import LLAMA, TEMPLATE

PROMPTS = ["one", [{"role": "system", "content": "be short"}, {"role": "user", "content": "two"}]]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``model/`` and ``reward/``, lively, of one tokenizer with a template."""
    path = tmp_path_factory.mktemp("models")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for name, kind in (("model", LanguageModelModule), ("reward", RewardModule)):
        module = kind(Backbone(config=LLAMA), sequence_length=96, seed=3)
        module.configure_model()
        assert module.model is not None
        with torch.no_grad():
            for parameter in module.model.parameters():
                parameter.mul_(1.5)
        module.export(path / name)
        tokenizer.save_pretrained(path / name)
    return path


@pytest.fixture(autouse=True)
def folder(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("model", "reward"):
        Path(name).symlink_to(models / name)
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(name).read_text().splitlines()]


def sample(*words: str, out: str = "answers.jsonl") -> int:
    flags = ["--strategy", "sample", "--samples", "3", "--max_new_tokens", "6", "--out", out]
    return main(["generate", "-m", "model", "--file", "prompts.jsonl", *flags, *words])


def score(*words: str, out: str = "out.jsonl", source: str = "answers.jsonl", model: str = "reward") -> int:
    return main(["score", "-m", model, "--file", source, "--out", out, *words])


TOOLS = [{"type": "function", "function": {"name": name}} for name in ("add", "subtract")]


def test_tools_are_generated_under_scored_under_and_kept(models: Path, tmp_path: Path) -> None:
    from llm_modules.tokenizer import load_tokenizer

    shown = "{% if tools %}{{ '<|im_start|>tools\n' + (tools | tojson) + '<|im_end|>\n' }}{% endif %}" + TEMPLATE
    for name in ("model", "reward"):
        Path(name).unlink()
        shutil.copytree(models / name, name)
        tokenizer = byte_tokenizer()
        tokenizer.chat_template = shown
        tokenizer.save_pretrained(name)
    lines: list[dict[str, Any]] = [{"prompt": "one"}, {"prompt": "one", "tools": TOOLS[:1]}]
    lines.append({"prompt": "one", "tools": json.dumps(TOOLS[1:])})
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert sample() == 0
    answers = rows("answers.jsonl")
    assert [row.get("tools") for row in answers] == [None] * 3 + [TOOLS[:1]] * 3 + [TOOLS[1:]] * 3
    ids = load_tokenizer("model").apply_chat_template(
        [{"role": "user", "content": "one"}], tools=TOOLS[:1], add_generation_prompt=True
    )["input_ids"]
    assert answers[3]["prompt_tokens"] == len(ids) > answers[0]["prompt_tokens"]
    assert sample() == 0  # all are there, and of these prompts
    assert rows("answers.jsonl") == answers
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [lines[0], lines[2], lines[1]]))
    assert sample() == 2  # the same texts under other tools are other prompts
    same = [{"prompt": "one", "completion": text, **({} if tools is None else {"tools": tools})}
            for tools in (None, TOOLS[:1]) for text in ("a", "bc")]  # fmt: skip
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in same))
    assert score() == 0
    scores = [row["score"] for row in rows("out.jsonl")]
    assert scores[0] != scores[2]
    assert score("--keep", "best", out="best.jsonl") == 0
    assert [row.get("tools") for row in rows("best.jsonl")] == [None, TOOLS[:1]]
    assert score("--keep", "pairs", out="pairs.jsonl") == 0
    assert [row.get("tools") for row in rows("pairs.jsonl")] == [None, TOOLS[:1]]
    assert score("--keep", "above", "--above=-1e9", out="above.jsonl") == 0
    assert [row.get("tools") for row in rows("above.jsonl")] == [None, None, TOOLS[:1], TOOLS[:1]]


def test_tools_that_a_template_leaves_out_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [{"prompt": "one", "completion": "a"}, {"prompt": "one", "completion": "a", "tools": TOOLS}]
    Path("prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert score(source="prompts.jsonl") == 2
    assert "prompts.jsonl:2: has tools, and the chat template of -m reward leaves them" in capsys.readouterr().err
    assert sample() == 2
    assert "prompts.jsonl:2: has tools, and the chat template leaves them out: " in capsys.readouterr().err
    assert sample("--raw") == 2
    assert "prompts.jsonl:2: has tools, and they need a chat template (and no --raw)" in capsys.readouterr().err
    assert not Path("answers.jsonl").exists()


def test_answers_are_sampled_scored_and_chosen_from() -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    assert sample() == 0
    answers = rows("answers.jsonl")
    assert [row["row"] for row in answers] == list(range(6))
    assert [row["prompt"] for row in answers] == [PROMPTS[0]] * 3 + [PROMPTS[1]] * 3
    assert len({row["completion"] for row in answers}) > 3
    assert score() == 0
    scored = rows("out.jsonl")
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained("reward"),
        AutoTokenizer.from_pretrained("reward"),
    )
    for row, answer in zip(scored, answers, strict=True):
        assert {key: row[key] for key in answer} == answer
        prompt = row["prompt"] if isinstance(row["prompt"], list) else [{"role": "user", "content": row["prompt"]}]
        talk = [*prompt, {"role": "assistant", "content": row["completion"]}]
        with torch.no_grad():
            logits = model(tokenizer.apply_chat_template(talk, return_tensors="pt")["input_ids"]).logits
        assert row["score"] == pytest.approx(float(logits), abs=1e-5)
    by_prompt = [scored[:3], scored[3:]]
    best = [max(group, key=lambda row: row["score"]) for group in by_prompt]
    worst = [min(group, key=lambda row: row["score"]) for group in by_prompt]
    assert score("--keep", "best", out="best.jsonl") == 0
    assert [row["messages"][-1]["content"] for row in rows("best.jsonl")] == [row["completion"] for row in best]
    assert rows("best.jsonl")[1]["messages"][:-1] == PROMPTS[1]
    assert score("--keep", "pairs", out="pairs.jsonl") == 0
    found = [(row["chosen"], row["rejected"]) for row in rows("pairs.jsonl")]
    assert found == [(a["completion"], b["completion"]) for a, b in zip(best, worst, strict=True)]
    limit = sorted(row["score"] for row in scored)[3]
    assert score("--keep", "above", "--above", str(limit), out="above.jsonl") == 0
    assert [row["score"] for row in rows("above.jsonl")] == [row["score"] for row in scored if row["score"] > limit]


def test_answers_to_a_prompt_need_not_be_neighbours() -> None:
    """Two files of samples, one after the other, are as one of twice as many."""
    assert sample() == 0
    assert sample("--seed", "5", out="more.jsonl") == 0
    one, more = rows("answers.jsonl"), rows("more.jsonl")
    for name, order in (("apart", one + more), ("together", [*one[:3], *more[:3], *one[3:], *more[3:]])):
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in order))
        for keep in ("best", "pairs"):
            assert score("--keep", keep, source=f"{name}.jsonl", out=f"{name}-{keep}.jsonl") == 0
    for keep in ("best", "pairs"):
        apart, together = rows(f"apart-{keep}.jsonl"), rows(f"together-{keep}.jsonl")
        for row in apart + together:  # scored beside other rows: equal but for rounding
            for name in ("score", "scores"):
                row.pop(name, None)
        assert apart == together
    assert [row["of"] for row in rows("apart-best.jsonl")] == [6, 6]


def test_a_row_may_have_its_own_system_message() -> None:
    asked, short = {"role": "user", "content": "two"}, {"role": "system", "content": "be short"}
    found = [
        {"prompt": [short, asked], "completion": "a"},
        {"prompt": "two", "system": "be short", "completion": "a"},
        {"prompt": [asked], "system_prompt": "be short", "completion": "a"},
        {"prompt": "two", "completion": "a"},
    ]
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    assert score() == 0
    one, two, three, without = (row["score"] for row in rows("out.jsonl"))
    assert one == pytest.approx(two, abs=1e-6) == pytest.approx(three, abs=1e-6) != pytest.approx(without, abs=1e-4)
    assert score("--keep", "best", out="best.jsonl") == 0
    assert [(row["of"], row["messages"][0]) for row in rows("best.jsonl")] == [(3, short), (1, asked)]


def test_scores_that_are_not_finite_are_not_written(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(models / "reward", "broken")
    weights = load_file("broken/model.safetensors")
    weights["score.weight"].fill_(float("nan"))
    save_file(weights, "broken/model.safetensors", metadata={"format": "pt"})
    Path("answers.jsonl").write_text((json.dumps({"prompt": "a", "completion": "b"}) + "\n") * 2)
    for keep in ("all", "best", "pairs"):
        assert score("--keep", keep, model="broken") == 2
        assert "answers.jsonl:1: its score is nan; -m broken: are its weights finite?" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_what_is_scored_is_never_written_over(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("answers.jsonl", "plain.jsonl"):
        Path(name).write_text(json.dumps({"prompt": "a", "completion": name}) + "\n")
    for name in ("answers.jsonl", "plain.jsonl"):
        assert score("--keep", "better", "--over", "plain.jsonl", "--overwrite", out=name) == 2
        assert f"--out {name}: is there; name another file, or --overwrite (never --file or --over" in (
            capsys.readouterr().err
        )
        assert rows(name) == [{"prompt": "a", "completion": name}]


def test_what_is_kept_is_what_recipes_train_on() -> None:
    from llm_modules.data.chat import conversation
    from llm_modules.data.preferences import preference_pair
    from llm_modules.data.sources import Row

    talk, other = ({"prompt": "2 + 2?", "completion": text} for text in ("four", "five"))
    Path("answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (talk, other)))
    for keep in ("best", "pairs"):
        assert score("--keep", keep, out=f"{keep}.jsonl") == 0
    assert conversation(Row(rows("best.jsonl")[0], "best.jsonl", 1)).messages[0]["content"] == "2 + 2?"
    pair = preference_pair(Row(rows("pairs.jsonl")[0], "pairs.jsonl", 1))
    assert pair.prompt == [{"role": "user", "content": "2 + 2?"}]
    assert {pair.chosen["content"], pair.rejected["content"]} == {"four", "five"}


def test_where_to_distil_is_where_the_preprompt_gave_a_better_answer() -> None:
    """Each answer against the best other one to its prompt, whatever their order and number."""
    from llm_modules.data.chat import conversation
    from llm_modules.data.sources import Row

    assert sample() == 0
    assert sample("--seed", "5", out="plain.jsonl") == 0
    plain = rows("plain.jsonl")
    Path("plain.jsonl").write_text("".join(json.dumps(row) + "\n" for row in reversed(plain[1:])))
    assert score(out="scored.jsonl") == 0
    assert score(out="others.jsonl", source="plain.jsonl") == 0
    best: dict[str, float] = {}
    for row in rows("others.jsonl"):
        key = json.dumps(row["prompt"])
        best[key] = max(best.get(key, row["score"]), row["score"])
    expected = [row for row in rows("scored.jsonl") if row["score"] > best[json.dumps(row["prompt"])]]
    assert 0 < len(expected) < 6
    assert score("--keep", "better", "--over", "plain.jsonl") == 0
    kept = rows("out.jsonl")
    assert [row["messages"][-1]["content"] for row in kept] == [row["completion"] for row in expected]
    assert [row["score"] for row in kept] == pytest.approx([row["score"] for row in expected], abs=1e-5)
    assert conversation(Row(kept[0], "out.jsonl", 1)).messages[-1]["role"] == "assistant"


def test_a_prompt_without_another_answer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    for name, prompt in (("answers.jsonl", "a"), ("plain.jsonl", "b")):
        Path(name).write_text(json.dumps({"prompt": prompt, "completion": "c"}) + "\n")
    assert score("--keep", "better", "--over", "plain.jsonl") == 2
    assert "--over plain.jsonl: no answer to the prompt 'a'; it needs one to each prompt" in capsys.readouterr().err
    assert not Path("out.jsonl").exists()


def test_prompts_with_nothing_to_choose_between_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    Path("answers.jsonl").write_text((json.dumps({"prompt": "a", "completion": "b"}) + "\n") * 2)
    assert score("--keep", "pairs") == 0
    assert rows("out.jsonl") == []
    assert "0 rows of 2 answers" in (said := capsys.readouterr().err)
    assert "1 prompts have no two answers of different scores" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"model": "model"}, "-m model: a language model, no reward model"),
        ({"source": "none.jsonl"}, "--file none.jsonl: no such file"),
        ({"source": "empty.jsonl"}, "--file empty.jsonl: the file is empty"),
        ({"source": "prompts.jsonl"}, "prompts.jsonl:1: a row needs `prompt` (text or messages) and `completion`"),
        ({"source": "odd.jsonl"}, "odd.jsonl:1: a message of the prompt has no role or no content: {'role': 'user'}"),
        ({"source": "long.jsonl"}, "long.jsonl:2: 5021 tokens, more than the reward model's"),
        ({"out": "prompts.jsonl"}, "--out prompts.jsonl: is there; name another file, or --overwrite"),
        ({"words": ["--keep", "above"]}, "--above SCORE goes with --keep above"),
        ({"words": ["--keep", "above", "--above", "nan"]}, "--above nan: no score can be compared with that"),
        ({"words": ["--above", "1"]}, "--above SCORE goes with --keep above"),
        ({"words": ["--keep", "better"]}, "--over FILE goes with --keep better"),
        ({"words": ["--keep", "better", "--over", "none.jsonl"]}, "--over none.jsonl: no such file"),
        ({"words": ["--keep", "better", "--over", "empty.jsonl"]}, "--over empty.jsonl: the file is empty"),
    ],
)
def test_mistakes_are_one_line(words: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("answers.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    Path("empty.jsonl").write_text("")
    Path("odd.jsonl").write_text(json.dumps({"prompt": [{"role": "user"}], "completion": "b"}) + "\n")
    long = [json.dumps({"prompt": "a", "completion": "b" * size}) + "\n" for size in (4000, 5000, 4500)]
    Path("long.jsonl").write_text("".join(long))
    assert score(*words.pop("words", []), **words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("recipes: ")]
    assert message in line
    assert not Path("out.jsonl").exists()


def test_what_is_lost_or_empty_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    Path("answers.jsonl").write_text(json.dumps({"prompt": "a", "completion": "b", "score": "mine"}) + "\n")
    assert score("--keep", "above", "--above", "1000") == 0
    (highest,) = re.findall(r"; none is above 1000, the highest is (-?\d+\.\d{3})$", capsys.readouterr().err, re.M)
    assert rows("out.jsonl") == []
    assert score("--overwrite") == 0
    assert capsys.readouterr().err.endswith("; in 1 rows `score` held something else, which is not kept\n")
    assert f"{rows('out.jsonl')[0]['score']:.3f}" == highest


def test_samples_that_would_be_the_same_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample("--strategy", "greedy") == 2
    assert "--samples 3: all the same under strategy 'greedy'; set --strategy sample" in capsys.readouterr().err
    assert sample("--samples", "0") == 2
    assert "--samples 0: 1 or more" in capsys.readouterr().err
