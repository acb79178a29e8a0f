"""A packed batch in the fewest lines, for the hand-written loops: the reference of what a training loop can reach."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Packed:
    """N tokens of several documents in one row: (1, N) ids and positions, (D + 1,) offsets, (M,) what is trained."""

    input_ids: Tensor
    position_ids: Tensor
    document_offsets: Tensor
    predicting: Tensor
    targets: Tensor


def packed_batches(rows: list[dict[str, str]], tokenizer: Any, sequence: int, batch: int) -> list[Packed]:
    """Instruction/response rows, cut to ``sequence`` tokens, ``batch`` of them a packed row; responses are trained."""
    documents = []
    for row in rows:
        prompt = [{"role": "user", "content": row["instruction"]}]
        full = [*prompt, {"role": "assistant", "content": row["response"]}]
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        ids = tokenizer.apply_chat_template(full)["input_ids"][:sequence]
        if start < len(ids):
            documents.append((ids, start))
    return [_pack(documents[i : i + batch]) for i in range(0, len(documents) - batch + 1, batch)]


def _pack(documents: list[tuple[list[int], int]]) -> Packed:
    ids, positions, offsets, predicting = [], [], [0], []
    for tokens, start in documents:
        predicting += range(len(ids) + start - 1, len(ids) + len(tokens) - 1)
        ids += tokens
        positions += range(len(tokens))
        offsets.append(len(ids))
    index = torch.tensor(predicting)
    row = torch.tensor([ids])
    return Packed(row, torch.tensor([positions]), torch.tensor(offsets, dtype=torch.int32), index, row[0, index + 1])
