"""What a model says of the answers in a micro-batch."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llm_modules.logprobs import next_token_targets
from llm_modules.rollouts import PolicyBatch


def answer_logprobs(model: Any, batch: PolicyBatch) -> Tensor:
    """(M,) log-probabilities of the answers' M tokens, in their order."""
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
