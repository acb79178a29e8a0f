"""Floor 3: what a module does with a batch whose prompts are shared, where its model cannot compute that."""

from __future__ import annotations

import sys

from llm_modules.base import LLMModule
from llm_modules.batch import PreferenceBatch


def computable(batch: PreferenceBatch, module: LLMModule) -> PreferenceBatch:
    """The batch, with each prompt once for each of its answers where the model cannot share it; said once."""
    assert module.model is not None
    if batch.shared_keys is None or (problem := module.model.sharing_problem) is None:
        return batch
    if not module.model.said_apart:
        module.model.said_apart = True
        if module.trainer.is_global_zero:
            print(f"data.share_prompts: each prompt is computed for both of its answers: {problem}", file=sys.stderr)
    return batch.apart()
