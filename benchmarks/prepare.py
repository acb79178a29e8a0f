"""Writes the folder that all sides of a comparison start from: ``python -m benchmarks.prepare sft|pretrain FOLDER``.

The order of training is that of our DataModule, which shuffles; it is written down for the peers, who are told to keep
the order of their file. The check of the harness proves that each step then sees the same tokens.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import inputs
from llm_modules.data import ConversationDataModule, TextDataModule

SEED = 1234


def sft(work: Path) -> None:
    rows = inputs.dolly_rows()
    tokenizer = _common(work, [text for row in rows for text in row.values()])
    documents: dict[tuple[int, ...], dict[str, str]] = {}
    for row in rows:
        prompt = [{"role": "user", "content": row["instruction"]}]
        full = [*prompt, {"role": "assistant", "content": row["response"]}]
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        ids = tokenizer.apply_chat_template(full)["input_ids"][: inputs.SEQUENCE]
        if start < len(ids):  # a prompt that fills the row leaves nothing to train; TRL drops it, so nobody has it
            documents[tuple(ids)] = row
    _write_rows(work / "dolly.jsonl", list(documents.values()))
    module = ConversationDataModule(**_arguments(work, work / "dolly.jsonl", "batch"))
    module.prepare_data()
    module.setup()
    ordered = []
    for batch in module.train_dataloader():
        lengths = batch.document_offsets.diff().tolist()
        ordered += [documents[tuple(ids.tolist())] for ids in batch.input_ids[0].split(lengths)]
    _write_rows(work / "rows.jsonl", ordered)
    tokens = sum(len(ids) for ids in documents)
    print(f"{len(ordered)} rows, {tokens / len(documents):.0f} tokens each")


def pretrain(work: Path) -> None:
    text = inputs.book_text()
    _common(work, text.split("\n\n"))
    (work / "books.txt").write_text(text[:2_000_000], encoding="utf-8")
    module = TextDataModule(**_arguments(work, work / "books.txt", "chunks"))
    module.prepare_data()
    module.setup()
    rows = torch.cat([batch.input_ids for batch in module.train_dataloader()])
    torch.save(rows.flatten(), work / "tokens.pt")
    print(f"{len(rows)} rows of {rows.shape[1]} tokens")


def _common(work: Path, texts: list[str]) -> Any:
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model" / "model.safetensors").exists():
        inputs.write_model(work / "model", texts)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    settings = {
        "sequence": inputs.SEQUENCE, "batch": inputs.BATCH, "lr": 2e-4, "clip": 1.0, "precision": "bf16-mixed",
        "pad": tokenizer.pad_token_id,
    }  # fmt: skip
    (work / "settings.json").write_text(json.dumps(settings))
    return tokenizer


def _arguments(work: Path, source: Path, packing: str) -> dict[str, Any]:
    return {
        "sources": [{"path": str(source)}], "tokenizer": str(work / "model"), "sequence_length": inputs.SEQUENCE,
        "batch_size": inputs.BATCH, "seed": SEED, "validation_fraction": 0.0, "packing": packing,
        "cache_dir": str(work / "cache"),
    }  # fmt: skip


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    {"sft": sft, "pretrain": pretrain}[sys.argv[1]](Path(sys.argv[2]))
