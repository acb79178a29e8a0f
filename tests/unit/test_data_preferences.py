"""Pairs of answers: the formats, what is refused, the tokens, and the batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llm_modules.batch import IGNORE_INDEX, PreferenceBatch
from llm_modules.data import PreferenceDataModule
from llm_modules.data.preferences import PreferenceEncoder, dialogue, preference_pair
from llm_modules.data.sources import Row
from llm_modules.data.templates import set_template
from llm_modules.data.tokenization import content_hash
from llm_modules.tokenizer import byte_tokenizer

USER, GOOD, BAD = {"role": "user", "content": "2 + 2?"}, "4", "five"


def answer(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def row(**columns: Any) -> Row:
    return Row(columns, "pairs.jsonl", 7)


def sides(*before: dict[str, str]) -> dict[str, Any]:
    return {"chosen": [*before, answer(GOOD)], "rejected": [*before, answer(BAD)]}


SYSTEM = {"role": "system", "content": "Be short."}
TALK = [{"role": "user", "content": "Hi"}, answer("Hello."), USER]
HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: 2 + 2?\n\nAssistant: "


@pytest.mark.parametrize(
    ("columns", "prompt"),
    [
        ({"prompt": "2 + 2?", "chosen": GOOD, "rejected": BAD}, [USER]),
        ({"messages": [USER], "chosen": GOOD, "rejected": BAD}, [USER]),
        ({"prompt": [USER], "chosen": [answer(GOOD)], "rejected": [answer(BAD)]}, [USER]),
        ({"prompt": [USER], "chosen": answer(GOOD), "rejected": answer(BAD)}, [USER]),
        ({"chosen": [USER, answer(GOOD)], "rejected": [USER, answer(BAD)]}, [USER]),
        ({"prompt": [USER], "chosen": [USER, answer(GOOD)], "rejected": [USER, answer(BAD)]}, [USER]),
        (
            {"chosen": HH + GOOD, "rejected": HH + BAD},
            [{"role": "user", "content": "Hi"}, answer("Hello."), USER],
        ),
        ({"prompt": HH, "chosen": " " + GOOD, "rejected": " " + BAD}, TALK),
        ({"prompt": HH.removesuffix("\n\nAssistant: "), "chosen": GOOD, "rejected": BAD}, TALK),
        # What comes before is said twice, as a whole or in part.
        ({"prompt": "Hi", **sides(*TALK)}, TALK),
        ({"prompt": "2 + 2?\n", **sides(*TALK)}, TALK),
        ({"prompt": "Hi", "chosen": HH + GOOD, "rejected": HH + BAD}, TALK),
        ({"prompt": HH, "chosen": HH + GOOD, "rejected": HH + BAD}, TALK),
        ({"messages": [*TALK, answer(GOOD)], **sides(*TALK)}, TALK),
        ({"prompt": "2 + 2?", "messages": [USER, answer(BAD)], **sides(USER)}, [USER]),
        ({"prompt": [SYSTEM, USER], **sides(USER)}, [SYSTEM, USER]),
        ({"prompt": [SYSTEM, TALK[0]], **sides(*TALK)}, [SYSTEM, *TALK]),
        ({"prompt": "2 + 2?", **sides(SYSTEM, USER)}, [SYSTEM, USER]),
        # It is said in two parts.
        ({"prompt": [SYSTEM], **sides(USER)}, [SYSTEM, USER]),
        ({"prompt": TALK[:2], **sides(USER)}, TALK),
        ({"prompt": "Hi", **sides(*TALK[1:])}, TALK),
    ],
)
def test_formats(columns: dict[str, Any], prompt: list[dict[str, str]]) -> None:
    pair = preference_pair(row(**columns))
    assert (pair.prompt, pair.chosen, pair.rejected) == (prompt, answer(GOOD), answer(BAD))


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        (
            {"prompt": "a", "chosen": GOOD},
            "no column 'rejected'; a pair needs chosen and rejected; columns: prompt, chosen",
        ),
        ({"prompt": "a", "chosen": "", "rejected": BAD}, "an empty answer in 'chosen'"),
        ({"prompt": "a", "chosen": "  ", "rejected": BAD}, "the chosen answer is empty"),
        ({"prompt": "a", "chosen": GOOD, "rejected": GOOD + " "}, "chosen and rejected are the same"),
        ({"chosen": [USER, answer(GOOD)], "rejected": [answer("?"), USER, answer(BAD)]}, "the prompts of chosen and"),
        ({"chosen": GOOD, "rejected": BAD}, "no prompt: chosen and rejected are texts"),
        ({"prompt": [USER], "chosen": [USER], "rejected": BAD}, "chosen ends with the user"),
        ({"chosen": HH + GOOD, "rejected": HH + BAD + "\n\nHuman: why?"}, "rejected ends with the user"),
        ({"prompt": [USER], "chosen": 4, "rejected": BAD}, "chosen is of type int"),
        ({"prompt": [USER, answer("x")], "chosen": GOOD, "rejected": BAD}, "the prompt ends with the assistant"),
        ({"prompt": 7, "chosen": GOOD, "rejected": BAD}, "prompt is of type int"),
        ({"prompt": [{"text": "a"}], "chosen": GOOD, "rejected": BAD}, "prompt: message 1 is no object with"),
        ({"prompt": HH + "Four", "chosen": GOOD, "rejected": BAD}, "the prompt ends with the assistant"),
        (
            {"prompt": "Another?", **sides(USER)},
            "prompt (or messages) and the messages of chosen are two different prompts; leave one of them out",
        ),
        (
            {"messages": [USER, answer("?")], **sides(USER)},
            "prompt (or messages) and the messages of chosen are two different prompts",
        ),
    ],
)
def test_what_is_no_pair_is_said_with_its_place(columns: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=r"pairs\.jsonl:7: ") as caught:
        preference_pair(row(**columns))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_dialogue_keeps_what_is_said() -> None:
    assert dialogue("no turns") == []
    assert dialogue("\n\nHuman: a\n\nb\n\nAssistant: c") == [{"role": "user", "content": "a\n\nb"}, answer("c")]


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
TOOLS = [{"type": "function", "function": {"name": "add"}}]


def encoder(length: int = 200, too_long: Any = "truncate") -> PreferenceEncoder:
    tokenizer = byte_tokenizer()
    set_template(tokenizer, "chatml")
    return PreferenceEncoder(tokenizer, length, too_long)


def test_tokens_are_two_conversations_whose_answers_are_predicted() -> None:
    made = encoder()
    found = made([row(prompt="2 + 2?", chosen=GOOD, rejected=BAD)])
    assert found.splits is not None
    assert found.trained is not None
    (split,) = found.splits
    parts = [(found.tokens[:split], found.trained[:split]), (found.tokens[split:], found.trained[split:])]
    for (tokens, trained), text in zip(parts, (GOOD, BAD), strict=True):
        assert made.tokenizer.decode(tokens[trained]) == f"{text}<|im_end|>"
        begin = made.tokenizer.decode(tokens[: int(np.argmax(trained))])
        assert begin == "<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert found.lengths.tolist() == [len(found.tokens)]
    # Of it a run's order is made: another one, and a run that began earlier would not go on.
    assert found.hashes.tolist() == [content_hash(repr(([USER], GOOD, BAD)).encode())]
    called = row(prompt="2 + 2?", chosen=[answer(GOOD) | {"tool_calls": [CALL]}], rejected=BAD)
    with_tools = row(prompt="2 + 2?", chosen=GOOD, rejected=BAD, tools=TOOLS)
    assert len({int(encoder(1000)([one]).hashes[0]) for one in (called, with_tools)} | {*found.hashes.tolist()}) == 3


def conversations(found: Any, tokenizer: Any) -> list[str]:
    """The texts of a pair, with a bar where what is predicted begins."""
    (split,) = found.splits
    texts = []
    for part in (slice(0, split), slice(split, None)):
        tokens, trained = found.tokens[part], found.trained[part]
        begin = int(np.argmax(trained))
        texts.append(f"{tokenizer.decode(tokens[:begin])}|{tokenizer.decode(tokens[begin:])}")
    return texts


@pytest.mark.parametrize("name", ["system", "system_prompt"])
def test_a_system_message_of_its_own_stands_before_both_conversations(name: str) -> None:
    made = encoder()
    texts = conversations(
        made([row(prompt="2 + 2?", chosen=GOOD, rejected=BAD, **{name: "Be short."})]), made.tokenizer
    )
    head = "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert texts == [f"{head}|{text}<|im_end|>\n" for text in (GOOD, BAD)]
    pair = preference_pair(row(messages=[SYSTEM, USER], chosen=GOOD, rejected=BAD, system="Another."))
    assert pair.prompt == [SYSTEM, USER]


def test_tools_are_shown_and_calls_are_predicted() -> None:
    made = encoder(1000)
    columns = {"prompt": "2 + 2?", "tools": json.dumps(TOOLS), "chosen": [CALLED], "rejected": BAD}
    chosen, rejected = conversations(made([row(**columns)]), made.tokenizer)
    assert f"# Tools\n{json.dumps(TOOLS)}<|im_end|>" in chosen
    call = f"<tool_call>\n{json.dumps(CALL['function'])}\n</tool_call><|im_end|>"
    assert chosen.endswith(f"assistant\n|\n{call}\n")
    assert rejected.endswith(f"assistant\n|{BAD}<|im_end|>\n")
    columns |= {"chosen": [answer("Let me add.") | {"tool_calls": [CALL]}], "rejected": [answer("Let me add.")]}
    chosen, rejected = conversations(made([row(**columns)]), made.tokenizer)
    assert chosen.endswith(f"|Let me add.\n{call}\n")
    assert rejected.endswith("|Let me add.<|im_end|>\n")


def test_what_the_template_leaves_out_of_a_pair_is_said() -> None:
    plain = byte_tokenizer()
    set_template(plain, "llama3")
    columns = {"prompt": "2 + 2?", "chosen": [CALLED], "rejected": BAD}
    with pytest.raises(ValueError, match=r"pairs\.jsonl:7: the chat template leaves out message 2's call of 'add'"):
        PreferenceEncoder(plain, 1000)([row(**columns)])
    with pytest.raises(ValueError, match=r"pairs\.jsonl:7: has tools, and the chat template leaves them out"):
        PreferenceEncoder(plain, 1000)([row(**columns | {"chosen": GOOD}, tools=TOOLS)])
    thought = row(prompt="2 + 2?", chosen=[answer(GOOD) | {"reasoning_content": "Two and two."}], rejected=GOOD)
    with pytest.raises(
        ValueError, match=r"pairs\.jsonl:7: chosen and rejected are the same as the chat template writes"
    ):
        encoder()([thought])
    dropping = PreferenceEncoder(encoder().tokenizer, 200, bad_pairs="drop")
    found = dropping([thought])
    assert found.trained is not None
    assert not found.trained.any()
    assert found.counts["rows dropped that are no pair"] == 1


@pytest.mark.parametrize("too_long", ["truncate", "drop"])
def test_too_long(too_long: str) -> None:
    rows = [row(prompt="a", chosen="b" * 60, rejected="c"), row(prompt="a" * 90, chosen="b", rejected="c")]
    found = encoder(60, too_long)(rows)
    assert found.trained is not None
    assert found.splits is not None
    assert found.counts["pairs longer than the sequence length"] == 2
    assert found.counts["pairs dropped as too long"] == (1 if too_long == "truncate" else 2)
    first = found.trained[: found.lengths[0]]
    assert first.any() == (too_long == "truncate")
    assert not found.trained[found.lengths[0] :].any()  # nothing of these answers fits
    assert max(found.splits[0], found.lengths[0] - found.splits[0]) == 60


def test_answers_that_are_the_same_when_they_are_cut_are_dropped() -> None:
    found = encoder(60)([row(prompt="a", chosen="b" * 60 + "x", rejected="b" * 60 + "y")])
    assert found.trained is not None
    assert not found.trained.any()
    assert found.counts["pairs dropped as too long"] == 1


def test_too_long_can_be_an_error() -> None:
    with pytest.raises(ValueError, match=r"pairs.jsonl:7: \d+ tokens, more than sequence_length 60 \(data.too_long"):
        encoder(60, "error")([row(prompt="a" * 90, chosen="b", rejected="c")])


def test_rows_that_are_no_pair_can_be_dropped_and_are_counted(tmp_path: Path) -> None:
    good = {"prompt": "2 + 2?", "chosen": GOOD, "rejected": BAD}
    bad = [
        {**good, "rejected": GOOD},
        {"chosen": HH + GOOD, "rejected": "\n\nHuman: ?\n\nAssistant: 5"},
        {"chosen": "x"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [bad[0], good, *bad[1:]]))
    module = PreferenceDataModule(
        sources=[{"path": str(tmp_path / "rows.jsonl")}],  # type: ignore[list-item]
        tokenizer="builtin:bytes",
        chat_template="chatml",
        sequence_length=128,
        batch_size=1,
        validation_fraction=0.0,
        bad_pairs="drop",
        cache_dir=str(tmp_path / "cache"),
    )
    module.prepare_data()
    module.setup("fit")
    (batch,) = module.train_dataloader()
    assert module.corpus.origin(batch.rows[0]).endswith("rows.jsonl:2")
    assert "rows dropped that are no pair: 3" in module.audit().lines
    with pytest.raises(
        ValueError, match=r"pairs.jsonl:7: chosen and rejected are the same.*bad_pairs.*allowed too: drop"
    ):
        encoder()([row(**{**good, "chosen": BAD})])


def data(folder: Path, packing: Any, rows: int = 8, share_prompts: bool = False) -> PreferenceDataModule:
    lines = [{"prompt": f"q{i} " * (1 + i % 4), "chosen": "yes " * (i + 1), "rejected": f"no {i}"} for i in range(rows)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = PreferenceDataModule(
        sources=[{"path": str(folder / "rows.jsonl")}],  # type: ignore[list-item]
        tokenizer="builtin:bytes",
        chat_template="chatml",
        sequence_length=128,
        batch_size=4,
        validation_fraction=0.0,
        packing=packing,
        share_prompts=share_prompts,
        cache_dir=str(folder / "cache"),
    )
    made.prepare_data()
    made.setup("fit")
    return made


@pytest.mark.parametrize("packing", ["batch", "none"])
def test_batches_hold_pairs_of_one_prompt(packing: str, tmp_path: Path) -> None:
    module = data(tmp_path, packing)
    tokenizer = module.prepared_tokenizer
    for batch in module.train_dataloader():
        assert isinstance(batch, PreferenceBatch)
        assert batch.pairs == 4
        texts = []
        owner = batch.answer_of(torch.arange(batch.input_ids.numel()))
        for number in range(8):
            mine = owner == number
            ids, labels = batch.input_ids.flatten()[mine], batch.labels.flatten()[mine]
            texts.append(
                (tokenizer.decode(ids[labels == IGNORE_INDEX]).partition("<|im_start|>assistant")[0],
                 tokenizer.decode(ids[labels != IGNORE_INDEX]))
            )  # fmt: skip
        for chosen, rejected in zip(texts[::2], texts[1::2], strict=True):
            assert chosen[0] == rejected[0]
            assert chosen[1].startswith("yes")
            assert rejected[1].startswith("no")
        counts = batch.counts()
        assert counts["pairs"] == 4
        assert counts["tokens_chosen"] == sum(len(tokenizer(c[1])["input_ids"]) for c in texts[::2])
        assert counts["tokens"] > counts["tokens_chosen"]


def test_a_rank_without_rows_counts_no_pair(tmp_path: Path) -> None:
    empty = data(tmp_path, "batch")._collator().empty()
    assert empty.counts() == {"tokens": 0.0, "positions": 0.0, "pairs": 0.0, "tokens_chosen": 0.0}


def test_built_in_pairs_are_right_and_worse_answers_to_the_same_question() -> None:
    from llm_modules.data.python_docs import conversations, preferences

    right = {r["id"]: r["messages"][-1]["content"] for r in conversations("validation")}
    pairs = list(preferences("validation"))
    assert len(pairs) > 200
    assert all(pair["chosen"] == right[pair["id"]] != pair["rejected"] for pair in pairs)
    broken = [pair for pair in pairs if pair["chosen"].startswith(pair["rejected"]) and pair["rejected"][-1] != "."]
    assert 0.3 * len(pairs) < len(broken) < 0.7 * len(pairs)
    assert {pair["rejected"] for pair in pairs if pair not in broken} <= set(right.values())


def test_numbers_kept_of_pairs_are_those_of_pairs_that_were_dealt(tmp_path: Path) -> None:
    module = data(tmp_path, "batch")
    count, values = module.pair_values("scores")
    assert (count, values) == (8, None)
    left_out = module.corpus.documents["train"][:2]
    module.corpus.documents["train"] = module.corpus.documents["train"][2:]
    module.keep_pair_values("scores", np.ones((8, 2)))
    assert module.pair_values("scores")[1] is not None
    assert module.pair_values("others")[1] is None
    module.corpus.documents["train"] = left_out
    assert module.pair_values("scores")[1] is None
    module.keep_pair_values("scores", np.full((8, 2), 2.0))
    module.corpus.documents["train"] = np.arange(8)
    found = module.pair_values("scores")[1]
    assert found is not None
    assert sorted(found[:, 0]) == [1.0] * 6 + [2.0] * 2


def test_a_shared_prompt_is_there_once(tmp_path: Path) -> None:
    """All but the last of its tokens; taken apart, the batch is the one in which nothing is shared."""
    shared, apart = (data(tmp_path, "batch", share_prompts=share) for share in (True, False))
    for once, twice in zip(shared.train_dataloader(), apart.train_dataloader(), strict=True):
        assert once.document_offsets is not None
        documents = once.input_ids[0].tensor_split(once.document_offsets[1:-1].long())
        texts = [shared.prepared_tokenizer.decode(document) for document in documents]
        for prompt, chosen, rejected in zip(texts[::3], texts[1::3], texts[2::3], strict=True):
            assert prompt.endswith("<|im_end|>\n<|im_start|>assistant")
            assert chosen.startswith("\nyes")
            assert rejected.startswith("\nno ")
        assert once.input_ids.numel() < 0.8 * twice.input_ids.numel()
        assert once.counts() | {"positions": 0.0} == twice.counts() | {"positions": 0.0}
        again = once.apart()
        for name in ("input_ids", "labels", "position_ids", "document_offsets"):
            assert torch.equal(getattr(again, name), getattr(twice, name)), name
        assert again.rows == once.rows == twice.rows
        assert len(once.rows) == once.pairs
        assert torch.equal(again.answer_of(torch.arange(20)), twice.answer_of(torch.arange(20)))
        assert again.shared_keys is None


@pytest.mark.parametrize(
    ("pair", "common"),
    [
        (
            {"prompt": "a", "chosen": "same x", "rejected": "same y"},
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n",
        ),
        ({"chosen": [USER, answer("b"), USER, answer("c")], "rejected": [USER, answer("b"), USER, answer("d")]}, None),
    ],
)
def test_answers_that_begin_alike_share_their_prompt_alone(
    pair: dict[str, Any], common: str | None, tmp_path: Path
) -> None:
    """What is predicted is of one answer."""
    (tmp_path / "rows.jsonl").write_text((json.dumps(pair) + "\n") * 2)
    module = PreferenceDataModule(
        sources=[{"path": str(tmp_path / "rows.jsonl")}],  # type: ignore[list-item]
        tokenizer="builtin:bytes",
        chat_template="chatml",
        sequence_length=128,
        batch_size=2,
        validation_fraction=0.0,
        cache_dir=str(tmp_path / "cache"),
    )
    module.prepare_data()
    module.setup("fit")
    (batch,) = module.train_dataloader()
    first = batch.input_ids[0, : batch.document_offsets[1] + 1]
    text = module.prepared_tokenizer.decode(first)
    assert text.endswith("<|im_start|>assistant\n")
    assert common is None or text == common
    assert (batch.labels[0, : batch.document_offsets[1] + 1] == IGNORE_INDEX).all()
