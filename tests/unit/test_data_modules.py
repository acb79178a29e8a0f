"""The DataModules as a whole: parts, layouts, ranks, the audit, and every mistake as one line."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from llm_modules.batch import IGNORE_INDEX
from llm_modules.data import ConversationDataModule, Source, TextDataModule

QA = [{"instruction": f"Question {i}?", "response": f"Answer {'x' * i}."} for i in range(40)]


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def conversations(path: str, **settings) -> ConversationDataModule:
    defaults = {
        "tokenizer": "builtin:bytes",
        "sequence_length": 96,
        "batch_size": 4,
        "chat_template": "chatml",
        "cache_dir": str(Path(path).parent / "cache"),
    }
    return ready(ConversationDataModule(**({"sources": [Source(path)]} | defaults | settings)))


def texts(path: str, **settings) -> TextDataModule:
    defaults = {
        "tokenizer": "builtin:bytes",
        "sequence_length": 64,
        "batch_size": 4,
        "cache_dir": str(Path(path).parent / "cache"),
    }
    return ready(TextDataModule(**({"sources": [Source(path)]} | defaults | settings)))


def ready(datamodule):
    datamodule.prepare_data()
    datamodule.setup("fit")
    return datamodule


def refused(function, *arguments, **settings) -> str:
    with pytest.raises(ValueError) as error:
        function(*arguments, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def qa(tmp_path) -> str:
    return write(tmp_path / "qa.jsonl", QA)


# Parts


def test_parts_share_no_document(tmp_path):
    rows = [{"text": f"document {i % 50}"} for i in range(100)]
    datamodule = texts(write(tmp_path / "a.jsonl", rows), validation_fraction=0.2)
    documents = datamodule.corpus.documents
    hashes = {part: set(datamodule.corpus.hashes[numbers].tolist()) for part, numbers in documents.items()}
    assert hashes["train"]
    assert hashes["validation"]
    assert not hashes["train"] & hashes["validation"]
    assert len(documents["train"]) + len(documents["validation"]) == 100


def test_rows_of_one_conversation_fall_on_one_side(tmp_path):
    """As in OpenAssistant, where each row repeats the turns before it, or one question has several answers."""
    rows = []
    for tree in range(30):
        talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"Question {tree}?"}]
        for turn in range(4):
            talk = [*talk, {"role": "assistant", "content": f"Answer {tree}.{turn}."}]
            rows.append({"messages": talk, "tree": tree})
            talk = [*talk, {"role": "user", "content": f"And {turn}?"}]
    path = write(tmp_path / "trees.jsonl", rows)
    datamodule = conversations(path, validation_fraction=0.2, sequence_length=512)
    trees = {part: {number // 4 for number in numbers} for part, numbers in datamodule.corpus.documents.items()}
    assert len(trees["train"]) + len(trees["validation"]) == 30
    assert trees["validation"]


def test_conversations_that_all_begin_alike_are_dealt_by_what_follows(tmp_path):
    rows = [{"prompt": "Write a line.", "completion": f"Line {i}."} for i in range(40)]
    datamodule = conversations(write(tmp_path / "a.jsonl", rows), validation_fraction=0.2)
    assert 0 < len(datamodule.corpus.documents["validation"]) < 40


def test_held_out_sources_are_taken_out_of_the_training(tmp_path):
    train = write(tmp_path / "a.jsonl", [{"text": f"document {i}"} for i in range(10)])
    held = write(tmp_path / "b.jsonl", [{"text": "document 3"}, {"text": "other"}])
    test = write(tmp_path / "c.jsonl", [{"text": "document 4"}])
    datamodule = texts(train, validation_sources=[Source(held)], test_sources=[Source(test)], batch_size=1)
    assert [len(datamodule.corpus.documents[part]) for part in ("train", "validation", "test")] == [8, 2, 1]
    assert "training documents that are also held out, left out: 2" in datamodule.audit().lines
    assert len(datamodule.val_dataloader()) == 1
    assert next(iter(datamodule.test_dataloader())).rows == [12]


def test_builtin_corpora_bring_their_own_validation(tmp_path):
    datamodule = ready(
        TextDataModule(
            sources=[Source("builtin:python-docs", limit=20)],
            tokenizer="builtin:bytes",
            sequence_length=64,
            cache_dir=str(tmp_path),
        )
    )
    origins = datamodule.describe_rows(datamodule.corpus.documents["validation"][:3].tolist())
    assert origins[0] == "builtin:python-docs[validation]:1"
    assert datamodule.audit().documents["train"] == 20


def test_mixtures_follow_their_weights(tmp_path):
    first = write(tmp_path / "a.jsonl", [{"text": f"first {i}"} for i in range(40)])
    second = write(tmp_path / "b.jsonl", [{"text": f"second {i}"} for i in range(10)])
    datamodule = texts(
        first,
        sources=[Source(first, weight=0.5), Source(second, weight=2)],
        packing="batch",
        validation_fraction=0.0,
    )
    seen = []
    for epoch in range(2):
        documents = datamodule.epoch_plan(epoch).segments[:, 0]
        assert (documents < 40).sum() == 20
        assert (np.bincount(documents[documents >= 40] - 40, minlength=10) == 2).all()
        seen += documents[documents < 40].tolist()
    assert sorted(seen) == list(range(40))


# Layouts


@pytest.mark.parametrize("packing", ["documents", "batch", "none"])
def test_the_layouts_hold_the_same_targets(qa, packing):
    datamodule = conversations(qa, packing=packing, validation_fraction=0.0, batch_size=5)
    loader = datamodule.train_dataloader()
    tokenizer = datamodule.prepared_tokenizer
    trained, computed, used = [], 0, 0
    for batch in loader:
        trained += batch.labels[batch.labels != IGNORE_INDEX].tolist()
        both = batch.tokens()
        computed, used = computed + both[0], used + both[1]
        assert batch.counts()["tokens"] == (batch.labels != IGNORE_INDEX).sum()
        if packing == "none":
            assert batch.document_offsets is None
            assert batch.position_ids.tolist() == [list(range(batch.input_ids.shape[1]))] * 5
            assert batch.padding == (batch.input_ids == tokenizer.pad_token_id).sum()
        else:
            offsets = batch.document_offsets.tolist()
            assert batch.document_offsets.dtype == torch.int32
            assert offsets[-1] == batch.input_ids.shape[1] == batch.position_ids.shape[1]
            expected = [i for start, stop in pairwise(offsets) for i in range(stop - start)]
            assert batch.position_ids[0].tolist() == expected
            assert max(np.diff(offsets)) <= batch.max_document == datamodule.corpus.longest(packing)
            assert batch.padding == 0
            for start in offsets[:-1]:
                assert tokenizer.decode(batch.input_ids[0, start : start + 1]) == "<|im_start|>"
    answers = tokenizer.decode(trained)
    if packing == "documents":  # the last rows of an epoch that do not fill a step are left out
        assert set(answers.split("<|im_end|>")[:-1]) <= {row["response"] for row in QA}
    else:
        assert sorted(answers.split("<|im_end|>")[:-1]) == sorted(row["response"] for row in QA)
    assert used < computed if packing == "none" else used == computed


def test_chunks_fill_rows_exactly(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": f"document {i} " * (i + 1)} for i in range(30)])
    datamodule = texts(path, packing="chunks", validation_fraction=0.2)
    for batch in datamodule.train_dataloader():
        assert batch.input_ids.shape == (4, 64)
        assert batch.padding == 0
        assert torch.equal(batch.labels, batch.input_ids)
    # Validation leaves nothing out but a last token alone in its row, where nothing would be predicted.
    held_out = datamodule.corpus.documents["validation"]
    tokens = int((datamodule.corpus.stops - datamodule.corpus.starts)[held_out].sum())
    assert sum(batch.tokens()[1] for batch in datamodule.val_dataloader()) == tokens - (tokens % 64 == 1)


def test_long_text_is_split_and_every_token_predicted_once(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(1000))
    path = write(tmp_path / "a.jsonl", [{"text": text}])
    datamodule = texts(path, packing="batch", batch_size=1, validation_fraction=0.0)
    tokens = sum(batch.counts()["tokens"] for batch in datamodule.train_dataloader())
    assert tokens == 1000  # 1000 letters and the end, without the first


def test_padded_rows_of_a_step_are_sorted_before_they_are_cut(qa):
    datamodule = conversations(qa, packing="none", batch_size=2, validation_fraction=0.0)
    datamodule.trainer = SimpleNamespace(
        distributed_sampler_kwargs=None, accumulate_grad_batches=4, limit_train_batches=1.0, overfit_batches=0
    )
    widths = [batch.input_ids.shape[1] for batch in datamodule.train_dataloader()]
    assert all(widths[i : i + 4] == sorted(widths[i : i + 4], reverse=True) for i in range(0, len(widths), 4))
    grouped = conversations(qa, packing="none", batch_size=4, length_group=4, validation_fraction=0.0)
    plain = conversations(qa, packing="none", batch_size=4, validation_fraction=0.0)
    padding = [sum(batch.padding for batch in module.train_dataloader()) for module in (grouped, plain)]
    assert padding[0] < padding[1] / 2


# Ranks


def of_rank(datamodule, rank: int, world: int, accumulate: int = 1):
    datamodule.trainer = SimpleNamespace(
        distributed_sampler_kwargs={"num_replicas": world, "rank": rank},
        accumulate_grad_batches=accumulate,
        limit_train_batches=1.0,
        overfit_batches=0,
    )
    return datamodule


@pytest.mark.parametrize("packing", ["batch", "none"])
def test_ranks_share_the_rows_of_a_step(qa, packing):
    def steps(world: int, batch_size: int, accumulate: int) -> list[list[int]]:
        loaders = []
        for rank in range(world):
            datamodule = conversations(qa, packing=packing, batch_size=batch_size, validation_fraction=0.0)
            loaders.append(list(of_rank(datamodule, rank, world, accumulate).train_dataloader()))
        assert len({len(loader) for loader in loaders}) == 1
        found = []
        for start in range(0, len(loaders[0]), accumulate):
            window = [loader[start : start + accumulate] for loader in loaders]
            for mine in window:  # each rank knows the sums of its own window
                assert mine[0].window["tokens"] == sum(batch.counts()["tokens"] for batch in mine)
            found.append(sorted(row for mine in window for batch in mine for row in batch.rows))
        return found

    expected = steps(1, 8, 1)
    assert [len(step) for step in expected] == [8] * 5
    for world, batch_size, accumulate in ((2, 4, 1), (2, 2, 2), (4, 1, 2), (1, 2, 4)):
        assert steps(world, batch_size, accumulate) == expected


@pytest.mark.parametrize("world", [1, 2, 3, 5])
@pytest.mark.parametrize("packing", ["batch", "none", "documents"])
def test_validation_sees_every_row_once_over_all_ranks(qa, tmp_path, world, packing):
    held = write(tmp_path / "held.jsonl", QA[:11])
    seen, lengths = [], set()
    for rank in range(world):
        datamodule = conversations(qa, packing=packing, batch_size=2, validation_sources=[Source(held)])
        loader = of_rank(datamodule, rank, world).val_dataloader()
        batches = list(loader)
        lengths.add((len(loader), len(batches)))
        seen += [row for batch in batches for row in batch.rows]
        for batch in batches:
            assert batch.window == {}
            assert bool(batch.rows) == bool(batch.counts()["tokens"])
            assert (batch.document_offsets is None) == (packing == "none")
    assert len(lengths) == 1
    assert sorted(seen) == datamodule.corpus.documents["validation"].tolist()


# Conversations that do not fit


def test_too_long(qa):
    truncated = conversations(qa, sequence_length=60, validation_fraction=0.0)
    report = truncated.audit()
    long = report.counts["longer than the sequence length"]
    # Of one conversation only the line end after the end of the turn is too much: its answer is whole.
    assert report.counts["truncated answers"] == long - 1 > 0
    assert report.documents["train"] == 40
    assert report.lengths[100] == 60
    dropped = conversations(qa, sequence_length=60, too_long="drop", validation_fraction=0.0).audit()
    assert dropped.documents["train"] == 40 - long
    assert dropped.counts["dropped as too long"] == long
    message = refused(conversations, qa, sequence_length=60, too_long="error")
    assert f"qa.jsonl:{40 - long + 1}: " in message
    assert f"more than sequence_length 60 ({long} such rows; data.too_long is 'error'" in message


def test_an_answer_that_is_cut_off_entirely_is_no_row(tmp_path):
    rows = [*QA, {"instruction": "long " * 40, "response": "never seen"}]
    datamodule = conversations(write(tmp_path / "a.jsonl", rows), validation_fraction=0.0)
    report = datamodule.audit()
    assert report.counts["answers cut off entirely"] == 1
    assert report.documents["train"] == 40


# Audit


def test_the_audit_counts_what_can_be_counted_by_hand(tmp_path):
    rows = [{"prompt": "ab", "completion": "cde"}, {"prompt": "f", "completion": "g"}]
    path = write(tmp_path / "a.jsonl", rows)
    report = conversations(path, chat_template="raw", validation_fraction=0.0, batch_size=1, packing="none").audit(
        color=False
    )
    assert report.tokens == 2 + 3 + 1 + 1 + 1 + 1
    assert report.trained == 4 + 2
    assert report.bytes == {"train": 3 + 1 + 2 * len("<|endoftext|>"), "validation": 0, "test": 0}
    assert report.turns == 2
    assert report.endless == 0
    assert report.fatal == []
    assert report.sample in ("ab⟦cde<|endoftext|>⟧", "f⟦g<|endoftext|>⟧")
    assert "tokens: 9, trained 6 (66.7%)" in report.lines
    colored = conversations(path, chat_template="raw", validation_fraction=0.0, batch_size=1).audit(color=True)
    assert "\x1b[32m" in colored.sample


def test_padding_is_counted(tmp_path):
    rows = [{"text": "a"}, {"text": "b" * 9}]
    datamodule = texts(write(tmp_path / "a.jsonl", rows), packing="none", batch_size=2, validation_fraction=0.0)
    report = datamodule.audit()
    (batch,) = datamodule.train_dataloader()
    assert report.positions == batch.input_ids.numel() == 20
    assert report.padding == pytest.approx(batch.padding / 20) == pytest.approx(0.4)


def test_what_is_fatal(tmp_path, qa):
    template = "{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}"
    endless = conversations(qa, chat_template=template)
    assert len(endless.audit().fatal) == 1
    assert "the end of the assistant's turn is never trained" in endless.audit().fatal[0]
    assert conversations(qa, chat_template=template, require_turn_end=False).audit().fatal == []
    assert conversations(qa).audit().fatal == []
    outside = conversations(qa).audit(vocabulary=200).fatal
    assert len(outside) == 1
    assert "outside of the vocabulary of 200 (the largest is 259)" in outside[0]
    long = [{"instruction": "long " * 40, "response": "never seen"}]
    nothing = conversations(write(tmp_path / "b.jsonl", long), validation_fraction=0.0)
    assert nothing.audit().fatal == [
        "data: no token is trained (longer than the sequence length: 1, answers cut off entirely: 1)"
    ]
    assert "an epoch has 0 rows" in refused(nothing.train_dataloader)


# Prompts


def test_prompts_are_what_comes_before_the_answer(tmp_path, qa):
    held = write(tmp_path / "held.jsonl", QA[:5])
    datamodule = conversations(qa, validation_sources=[Source(held)], validation_batch_size=2)
    batches = list(datamodule.predict_dataloader())
    assert [len(batch["prompts"]) for batch in batches] == [2, 2, 1]
    assert batches[0]["prompts"][1] == [{"role": "user", "content": "Question 1?"}]
    assert batches[0]["references"][1] == "Answer x."
    assert datamodule.describe_rows(batches[2]["rows"]) == [f"{held}:5"]
    shares = [of_rank(datamodule, rank, 2).predict_dataloader() for rank in range(2)]
    rows = [row for share in shares for batch in share for row in batch["rows"]]
    assert sorted(rows) == sorted(row for batch in batches for row in batch["rows"])


def test_prompts_of_text(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "abcdefgh"}, {"text": "ijklmnop"}])
    datamodule = texts(path, validation_sources=[Source(path)], prompt_tokens=3)
    (batch,) = datamodule.predict_dataloader()
    assert batch["prompts"] == ["abc", "ijk"]
    assert batch["references"] == ["defgh", "lmnop"]


# Chat formats


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sources": []}, "data.sources: the list is empty"),
        ({"batch_size": 0}, "data.batch_size: 0 is below 1"),
        ({"sequence_length": 1}, "sequence_length: 1 is below 2"),
        ({"validation_fraction": 1.0}, r"data.validation_fraction: 1.0 is not in \[0, 1\)"),
        ({"packing": "document"}, "data.packing: 'document' is not one of"),
        ({"workers": -1}, "data.workers: -1 is below 0"),
        ({"validation_fraction": 0.1, "validation_sources": [Source("x.txt")]}, "validation_sources are given too"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message):
        TextDataModule(
            **({"sources": [Source("x.txt")], "tokenizer": "builtin:bytes", "sequence_length": 8} | settings)
        )


def test_the_cache_folder_follows_the_convention(monkeypatch, tmp_path):
    from llm_modules.data.token_datamodule import cache_folder

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / "litrecipes"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder(None) == tmp_path / ".cache" / "litrecipes"
    assert cache_folder("here") == Path("here")
