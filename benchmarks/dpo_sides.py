"""The sides of the comparison of preference tuning. Run by ``dpo_trl.py``, each in a process of its own:

``python -m benchmarks.dpo_sides SIDE --work FOLDER --out FILE --steps N [--check]``

``FOLDER`` holds ``model/`` (weights and tokenizer), ``rows.jsonl`` (in the order of training), ``pairs.jsonl`` (the
same in the order of the data set) and ``settings.json``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.recorder import Recorder
from benchmarks.sft_sides import Settings, run, train_with_trl, trl_arguments

CHECKPOINTING = ("--model.init_args.backbone.activation_checkpointing", "true")
COMPILED = ("--model.init_args.backbone.compile", "true")


def trl(work: Path, settings: Settings, recorder: Recorder, steps: int, adapter: Any = None, **variant: Any) -> None:
    """DPOTrainer as its documentation has it: conversational rows, its defaults, and what all sides share."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    recorder.start()
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    arguments = trl_arguments(work, settings, recorder, steps) | {"beta": 0.1} | variant
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    trainer = DPOTrainer(
        model=model,
        args=DPOConfig(**arguments),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
        peft_config=adapter,
    )
    train_with_trl(trainer, trainer.model, arguments, recorder)


def trl_no_checkpointing(*args: Any) -> None:
    """TRL with the default that costs it the most time turned off."""
    trl(*args, gradient_checkpointing=False)


def trl_cached(*args: Any) -> None:
    """TRL with the reference's log-probabilities computed ahead."""
    trl(*args, precompute_ref_log_probs=True)


def trl_lora(work: Path, settings: Settings, recorder: Recorder, steps: int) -> None:
    from peft import LoraConfig

    linear = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trl(work, settings, recorder, steps, adapter=linear)


def recipe(work: Path, settings: Settings, recorder: Recorder, steps: int, *overrides: str) -> None:
    """Ours; in a check run with every prompt computed for both of its answers, so that its tokens are those of TRL."""
    from benchmarks.recipe_side import fit

    apart = ("--data.init_args.share_prompts", "false") if recorder.check else ()
    where = ("--trainer.accelerator", "cpu" if settings["device"] == "cpu" else "gpu")
    saves = ("--trainer.enable_checkpointing", "false", "--leave_out", "[ExportFolder]")  # nor does the peer
    fit("dpo", work, settings, recorder, steps, work / "pairs.jsonl", *where, *saves, *apart, *overrides)


def recipe_apart(*args: Any) -> None:
    recipe(*args, "--data.init_args.share_prompts", "false")


def recipe_compiled(*args: Any) -> None:
    recipe(*args, *COMPILED)


def recipe_checkpointing(*args: Any) -> None:
    recipe(*args, *CHECKPOINTING)


def recipe_checkpointing_compiled(*args: Any) -> None:
    recipe(*args, *CHECKPOINTING, *COMPILED)


def recipe_cached(*args: Any) -> None:
    """The least memory of a training of all weights."""
    recipe(*args, *CHECKPOINTING, "--model.init_args.reference", "cached")


def recipe_lora(*args: Any) -> None:
    recipe(*args, "-c", "adapters/lora", *CHECKPOINTING)


SIDES = {
    "recipe": recipe,
    "recipe-apart": recipe_apart,
    "recipe-compiled": recipe_compiled,
    "recipe-checkpointing": recipe_checkpointing,
    "recipe-checkpointing-compiled": recipe_checkpointing_compiled,
    "recipe-cached": recipe_cached,
    "recipe-lora": recipe_lora,
    "trl": trl,
    "trl-cached": trl_cached,
    "trl-lora": trl_lora,
    "trl-no-checkpointing": trl_no_checkpointing,
}

if __name__ == "__main__":
    run(SIDES)
