"""Writes the folder that all sides of a comparison start from: ``python -m benchmarks.prepare NAME FOLDER``.

With ``--for cuda`` all but the weights of a comparison on a GPU, for a machine that has no data: there
``python -m benchmarks.prepare weights FOLDER`` writes these.

The order of training is that of our DataModule, which shuffles; it is written down for the peers, who are told to keep
the order of their file. The check of the harness proves that each step then sees the same tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks import harness, inputs
from llm_modules.data import ConversationDataModule, PreferenceDataModule, TextDataModule

SEED = 1234
PAIRS = PROMPTS = 640
"""Of the data, that are given to all sides: none takes more in its steps."""


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


def dpo(work: Path, device: str) -> None:
    """The first pairs of which both conversations fit, so that nobody cuts any off."""
    pairs = inputs.preference_pairs()
    talks = [[*pair["prompt"], *pair[side]] for pair in pairs for side in ("chosen", "rejected")]
    texts = [message["content"] for talk in talks for message in talk]
    batch = inputs.BATCH * (4 if device == "cuda" else 1)
    tokenizer = _common(work, texts, **_sized(device), lr=5e-6, batch=batch)
    ids = [tokenizer.apply_chat_template(talk)["input_ids"] for talk in talks]
    fitting = {
        (tuple(ids[2 * i]), tuple(ids[2 * i + 1])): pair
        for i, pair in enumerate(pairs)
        if max(len(ids[2 * i]), len(ids[2 * i + 1])) <= inputs.SEQUENCE
    }
    fitting = dict(list(fitting.items())[:PAIRS])
    _write_rows(work / "pairs.jsonl", list(fitting.values()))
    module = PreferenceDataModule(**_arguments(work, work / "pairs.jsonl", "batch"), share_prompts=False)
    module.prepare_data()
    module.setup()
    ordered = []
    for batch in module.train_dataloader():
        documents = [tuple(part.tolist()) for part in batch.input_ids[0].split(batch.document_offsets.diff().tolist())]
        ordered += [fitting[both] for both in zip(documents[::2], documents[1::2], strict=True)]
    _write_rows(work / "rows.jsonl", ordered)
    tokens = sum(len(one) + len(other) for one, other in fitting)
    print(f"{len(ordered)} pairs, {tokens / len(fitting):.0f} tokens each")


def grpo(work: Path, device: str) -> None:
    """Questions of gsm8k."""
    rows = inputs.maths_questions()
    _common(work, [text for row in rows for text in row.values()], **_sized(device), batch=8)
    _write_rows(work / "prompts.jsonl", rows[:PROMPTS])
    print(f"{len(rows)} prompts")


def _sized(device: str) -> dict[str, Any]:
    """Settings of what a device can do in minutes."""
    narrow = device == "cuda" or harness.machine()["bf16_instructions"]
    shape = inputs.LARGE_SHAPE if device == "cuda" else inputs.SHAPE if narrow else inputs.SMALL_SHAPE
    return {"device": device, "shape": shape, "precision": "bf16-mixed" if narrow else "32-true"}


def weights(work: Path) -> None:
    settings = json.loads((work / "settings.json").read_text())
    if not (work / "model" / "model.safetensors").exists():
        inputs.write_weights(work / "model", settings["shape"])


def _common(work: Path, texts: list[str], **changes: Any) -> Any:
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "model" / "tokenizer.json").exists():
        inputs.write_tokenizer(work / "model", texts)
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    settings = {
        "sequence": inputs.SEQUENCE, "batch": inputs.BATCH, "lr": 2e-4, "clip": 1.0, "precision": "bf16-mixed",
        "pad": tokenizer.pad_token_id, "device": "cpu", "shape": inputs.SHAPE,
    } | changes  # fmt: skip
    known = work / "settings.json"
    if known.exists() and json.loads(known.read_text()).get("shape") != settings["shape"]:
        raise SystemExit(f"benchmarks: {work} holds a model of another shape; remove it, or name another --work")
    known.write_text(json.dumps(settings))
    return tokenizer


def _arguments(work: Path, source: Path, packing: str) -> dict[str, Any]:
    return {
        "sources": [{"path": str(source)}], "tokenizer": str(work / "model"), "sequence_length": inputs.SEQUENCE,
        "batch_size": inputs.BATCH, "seed": SEED, "validation_fraction": 0.0, "packing": packing,
        "cache_dir": str(work / "cache"),
    }  # fmt: skip


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=["sft", "pretrain", "dpo", "grpo", "weights"])
    parser.add_argument("work", type=Path)
    parser.add_argument("--for", dest="device", choices=["cpu", "cuda"], help="default: the device that is here")
    options = parser.parse_args()
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_any: dict[str, Callable[[Path], None]] = {"sft": sft, "pretrain": pretrain, "weights": weights}
    if options.name in on_any:
        on_any[options.name](options.work)
    else:
        {"dpo": dpo, "grpo": grpo}[options.name](options.work, device)
    if options.device is None:
        weights(options.work)


if __name__ == "__main__":
    main()
