"""What models say of the answers in a micro-batch.

Shape legend: M answer tokens, C critics.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from llm_modules.logprobs import next_token_targets
from llm_modules.rollouts import PolicyBatch


def answer_logprobs(model: Any, batch: PolicyBatch) -> Tensor:
    """(M,) of the answers' tokens, in their order."""
    scores = model(
        batch.input_ids,
        batch.position_ids,
        next_token_targets(batch.labels, batch.position_ids),
        batch.document_offsets,
        batch.max_document,
        lengths=batch.lengths,
        shared_keys=batch.shared_keys,
        key_offsets=batch.key_offsets,
    )
    logprobs: Tensor = scores.logprobs
    return logprobs


def answer_values(critics: Iterable[Any], batch: PolicyBatch) -> Tensor:
    """(M, C) what the critics expect before each of these tokens."""
    places = (next_token_targets(batch.labels, batch.position_ids).flatten() >= 0).nonzero().squeeze(-1)
    layout = (batch.document_offsets, batch.max_document)
    keys = {"shared_keys": batch.shared_keys, "key_offsets": batch.key_offsets}
    found = [critic(batch.input_ids, batch.position_ids, places, *layout, **keys) for critic in critics]
    return torch.stack(found, dim=1)
