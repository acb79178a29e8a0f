"""Training a tokenizer: against a brute-force BPE, exact sizes, reloading, the same every time."""

from __future__ import annotations

import itertools
import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from llm_modules.data.tokenizer_training import SMALLEST, save_tokenizer, train_tokenizer
from llm_modules.tokenizer import SPECIAL_TOKENS, load_tokenizer

TEXTS = [
    "the cat sat on the mat",
    "the cat ate the rat that sat on the mat",
    "a hat for the cat, a mat for the rat",
] * 4


def brute_force_merges(words: Counter[tuple[str, ...]], symbols: list[str], count: int) -> list[tuple[str, str]]:
    """BPE as the paper's Algorithm 1: count all pairs anew for each merge; of equals the pair of the lowest ids."""
    ids = {symbol: i for i, symbol in enumerate(symbols)}
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, number in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += number
        best = min(pairs, key=lambda pair: (-pairs[pair], ids[pair[0]], ids[pair[1]]))
        merges.append(best)
        ids.setdefault(best[0] + best[1], len(ids))
        words = Counter({_merged(word, best): number for word, number in words.items()})
    return merges


def _merged(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    parts: list[str] = []
    i = 0
    while i < len(word):
        step = 2 if word[i : i + 2] == pair else 1
        parts.append("".join(word[i : i + step]))
        i += step
    return tuple(parts)


def test_merges_are_those_of_a_brute_force_bpe() -> None:
    rng = random.Random(1)
    words = ["".join(rng.choices("abcde", k=rng.randint(1, 8))) for _ in range(400)]
    counted = Counter(tuple(("Ġ" if i else "") + word) for i, word in enumerate(words))
    expected = brute_force_merges(counted, sorted(pre_tokenizers.ByteLevel.alphabet()), 60)
    trained = train_tokenizer([" ".join(words)], SMALLEST + 60).tokenizer
    model = json.loads(trained.backend_tokenizer.to_str())["model"]
    assert [tuple(merge) for merge in model["merges"]] == expected


def test_has_exactly_the_size_asked_for_and_every_byte() -> None:
    tokenizer = train_tokenizer(TEXTS, SMALLEST + 20).tokenizer
    assert len(tokenizer) == SMALLEST + 20
    assert sorted(tokenizer.get_vocab().values()) == list(range(SMALLEST + 20))
    for text in (
        bytes(range(256)).decode("latin-1"),
        "naïve 日本 🙂 \t\n\r \u2028",
        "    def f(x):\n        return x\n",
    ):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids) == text


def test_special_tokens_are_one_id_and_in_their_places() -> None:
    tokenizer = train_tokenizer(TEXTS, SMALLEST + 20).tokenizer
    assert [tokenizer(token)["input_ids"] for token in SPECIAL_TOKENS] == [[SMALLEST + 16 + i] for i in range(4)]
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|endoftext|>", "<|pad|>")


def test_reloads_as_the_same_fast_tokenizer(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, SMALLEST + 20).tokenizer
    save_tokenizer(tokenizer, tmp_path / "tokenizer")
    for again in (AutoTokenizer.from_pretrained(tmp_path / "tokenizer"), load_tokenizer(str(tmp_path / "tokenizer"))):
        assert again.is_fast
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again.chat_template == tokenizer.chat_template
        for text in [*TEXTS, "something else <|im_end|> 日本"]:
            assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_template_marks_what_the_assistant_says_with_its_turn_end() -> None:
    tokenizer = train_tokenizer(TEXTS, SMALLEST + 20).tokenizer
    messages = [
        {"role": "user", "content": "the cat?"},
        {"role": "assistant", "content": "sat"},
        {"role": "user", "content": "the rat?"},
        {"role": "assistant", "content": "on the mat"},
    ]
    row = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, mark in zip(row["input_ids"], row["assistant_masks"], strict=True) if mark]
    assert tokenizer.decode(marked) == "sat<|im_end|>on the mat<|im_end|>"
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert prompt == "<|im_start|>user\nthe cat?<|im_end|>\n<|im_start|>assistant\n"


def test_the_same_texts_give_the_same_file_whatever_the_threads(tmp_path: Path) -> None:
    rng = random.Random(0)
    texts = [" ".join("".join(rng.choices("abcdefgh", k=rng.randint(1, 9))) for _ in range(200)) for _ in range(40)]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    code = (
        "import json, sys; from llm_modules.data.tokenizer_training import *; from pathlib import Path\n"
        "t = train_tokenizer(json.loads(Path(sys.argv[1]).read_text()), 600).tokenizer\n"
        "save_tokenizer(t, Path(sys.argv[2]))"
    )
    for threads in ("1", "3"):
        out = tmp_path / threads
        environment = {**os.environ, "RAYON_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "true"}
        environment["PYTHONHASHSEED"] = threads
        command = [sys.executable, "-c", code, str(tmp_path / "texts.json"), str(out)]
        subprocess.run(command, check=True, env=environment)
    first, second = ((tmp_path / threads / "tokenizer.json").read_bytes() for threads in ("1", "3"))
    assert first == second


def test_counts_what_it_read() -> None:
    trained = train_tokenizer(iter(TEXTS), SMALLEST + 5)
    assert (trained.documents, trained.characters) == (len(TEXTS), sum(map(len, TEXTS)))


@pytest.mark.parametrize(
    ("texts", "size", "message"),
    [
        (TEXTS, 100, "vocab_size: 100 is below 260"),
        (TEXTS, 5000, r"vocab_size: 5000 is more than these texts can fill .*; write \d+ or less, or add text"),
        ([], 300, "source: there is no text"),
        ([""], 300, "source: there is no text"),
    ],
)
def test_mistakes_are_named(texts: list[str], size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_tokenizer(texts, size)


def test_a_size_that_the_error_names_works() -> None:
    with pytest.raises(ValueError, match="vocab_size") as caught:
        train_tokenizer(TEXTS, 5000)
    most = int(str(caught.value).split("; write ")[1].split()[0])
    assert len(train_tokenizer(TEXTS, most).tokenizer) == most


def test_does_not_write_over_what_is_there(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, SMALLEST + 5).tokenizer
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty; name another, or add --overwrite"):
        save_tokenizer(tokenizer, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    save_tokenizer(tokenizer, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match=r"notes\.txt' is a file; name a folder"):
        save_tokenizer(tokenizer, tmp_path / "notes.txt")


@pytest.mark.data
def test_byte_level_bpe_gives_gpt2s_ids(data_folder: Path) -> None:
    """Our way of setting up a byte-level BPE, with GPT-2's merges, gives GPT-2's ids."""
    from tokenizers import Tokenizer, models

    folder = data_folder / "golden_tokenizer_gpt2"
    symbols = [chr(i) for i in [*range(33, 127), *range(161, 173), *range(174, 256)]]
    symbols += [chr(256 + i) for i in range(256 - len(symbols))]
    assert sorted(symbols) == sorted(pre_tokenizers.ByteLevel.alphabet())
    lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    merges = [(left, right) for left, right in (line.split(" ") for line in lines if line)]
    names = [*symbols, *(left + right for left, right in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rows = [json.loads(line) for line in (folder / "vectors.jsonl").read_text(encoding="utf-8").splitlines()]
    rows += [json.loads(line) for line in (folder / "vectors_extra.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 164
    assert all(tokenizer.encode(row["text"]).ids == row["ids"] for row in rows)
