"""What a recipe is overridden with for a few steps of a check: it writes nothing and measures nothing of its own."""

from __future__ import annotations

import json
from typing import Any


def bare(steps: int) -> list[tuple[str, str]]:
    """Overrides for so many optimizer steps without callbacks, loggers, checkpoints and validation."""
    from recipes.cli import DEFAULT_CALLBACKS

    return as_overrides(
        {
            "trainer.max_steps": steps,
            "trainer.max_epochs": None,
            "trainer.max_time": None,
            "trainer.callbacks": [],
            "trainer.logger": False,
            "trainer.enable_checkpointing": False,
            "trainer.enable_progress_bar": False,
            "trainer.limit_val_batches": 0,
            "trainer.num_sanity_val_steps": 0,
            "trainer.fast_dev_run": False,
            "leave_out": list(DEFAULT_CALLBACKS),
        }
    )


def as_overrides(values: dict[str, Any]) -> list[tuple[str, str]]:
    """Dotted keys with their values as YAML text, as the command line gives them."""
    return [(key, json.dumps(value)) for key, value in values.items()]
