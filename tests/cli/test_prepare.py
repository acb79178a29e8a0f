"""`recipes prepare` through the command."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llm_modules.tokenizer import load_tokenizer
from recipes.__main__ import main

TEXT = "The cat sat on the mat. The rat that ate the hat sat on the cat. " * 40


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    rows = [{"messages": [{"role": "user", "content": "zzzz zzzz?"}, {"role": "assistant", "content": "zzzz zzzz."}]}]
    (tmp_path / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows * 10))
    return tmp_path


def test_trains_a_tokenizer_on_several_sources(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["prepare", "tokenizer", "--source", "text.txt", "talk.jsonl", "--vocab_size", "280", "--out", "made/here"]
    assert main(words) == 0
    tokenizer = load_tokenizer("made/here")
    assert len(tokenizer) == 280
    assert "{% generation %}" in tokenizer.chat_template
    assert len(tokenizer("zzzz", add_special_tokens=False)["input_ids"]) < 4
    assert capsys.readouterr().out.startswith("made/here: 280 tokens from 11 documents")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--source", "nothing.txt", "--out", "out"], "source 'nothing.txt': no such file or folder"),
        (["--source", "text.txt", "--out", "out", "--vocab_size", "9"], "vocab_size: 9 is below 260"),
        (["--source", "text.txt", "--out", "."], "is not empty; name another, or add --overwrite"),
        (["--source", "builtin:python", "--out", "out"], "source 'builtin:python' is not known"),
        (["--source", "talk.jsonl", "--out", "out", "--columns", "text"], "no column 'text' (--columns)"),
        (["--source", "text.txt", "--out", "out", "--chat_template", "x"], "chat_template: 'x' is neither"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = sorted(folder.iterdir())
    assert main(["prepare", "tokenizer", *words]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert len(captured.err.strip().splitlines()) == 1
    assert sorted(folder.iterdir()) == before


RECIPE = """
seed_everything: 1
tokenizer: builtin:bytes
sequence_length: 32
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone: {config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1,
      num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 64}}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: llm_modules.data.TextDataModule
  init_args: {sources: [{path: text.txt, document_separator: "\\\\. "}], batch_size: 2, cache_dir: cache}
trainer: {max_steps: 1, accelerator: cpu}
"""


def test_tokenizes_ahead_what_fit_would(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "recipe.yaml").write_text(RECIPE)
    assert main(["prepare", "data", "-c", "recipe.yaml", "--data.batch_size", "4"]) == 0
    assert "train: " in capsys.readouterr().out
    made = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*") if path.is_file()}
    assert made
    assert not (folder / "runs").exists()
    assert main(["prepare", "data", "-c", "recipe.yaml"]) == 0
    assert made == {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*") if path.is_file()}


def test_data_without_a_recipe_says_how(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "data"]) == 2
    assert "recipes prepare data -c NAME" in capsys.readouterr().out
    assert main(["prepare", "data", "--help"]) == 0
