"""Data that take long to prepare on one node."""

from __future__ import annotations

import os
import time
from typing import Any

from llm_modules.data import TextDataModule


class SlowText(TextDataModule):
    """Prepares its data for ``seconds`` in the process whose rank is ``rank``.

    Args:
        seconds: of sleep.
        rank: as the launcher told it.
    """

    def __init__(self, *, seconds: float, rank: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.seconds = seconds
        self.rank = rank

    def prepare_data(self) -> None:
        if int(os.environ["RANK"]) == self.rank:
            time.sleep(self.seconds)
            self.seconds = 0.0
        super().prepare_data()
