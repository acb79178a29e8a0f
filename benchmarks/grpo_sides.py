"""The sides of the comparison of reinforcement learning. Run by ``grpo_trl.py``, each in a process of its own:

``python -m benchmarks.grpo_sides SIDE --work FOLDER --out FILE --steps N [--check]``

``FOLDER`` holds ``model/`` (weights and tokenizer), ``prompts.jsonl`` and ``settings.json``. The weights are random, so
that nearly all answers of both sides have the most tokens that they may.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.recorder import Recorder
from benchmarks.sft_sides import Settings, run, train_with_trl, trl_arguments

GROUP, TOKENS = 8, 128


def trl(work: Path, settings: Settings, recorder: Recorder, steps: int, **variant: Any) -> None:
    """GRPOTrainer as its documentation has it: conversational prompts, its defaults, and what both sides share."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    recorder.start()
    rows = [json.loads(line) for line in (work / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    dataset = datasets.Dataset.from_list(
        [
            {"prompt": [{"role": "user", "content": row["prompt"]}], "reference": row["reference"].rpartition(" ")[2]}
            for row in rows
        ]
    )

    def reward(completions: list[Any], reference: list[str], **rest: Any) -> list[float]:
        said = [completion[0]["content"] for completion in completions]
        return [float(text.rpartition("####")[2].strip() == known) for text, known in zip(said, reference, strict=True)]

    arguments = trl_arguments(work, settings, recorder, steps) | {
        "per_device_train_batch_size": settings["batch"] * GROUP,
        "num_generations": GROUP,
        "max_completion_length": TOKENS,
        "beta": 0.0,
    }
    for name in ("max_length", "train_sampling_strategy"):
        arguments.pop(name)
    arguments |= variant
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=reward,
        args=GRPOConfig(**arguments),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
    )
    single = []  # one token at a time: keys and values are kept, whatever configs say
    model.register_forward_pre_hook(
        lambda module, given, named: single.append(named["input_ids"].shape[1] == 1 if "input_ids" in named else False),
        with_kwargs=True,
    )
    train_with_trl(trainer, model, arguments, recorder)
    if sum(single) < steps * (TOKENS // 2):
        raise SystemExit(f"TRL's side generates without keys and values: {sum(single)} of {len(single)} forward passes")


def trl_no_checkpointing(*args: Any) -> None:
    """TRL with the default that costs it the most time in training turned off."""
    trl(*args, gradient_checkpointing=False)


def recipe(work: Path, settings: Settings, recorder: Recorder, steps: int, *overrides: str) -> None:
    from benchmarks.recipe_side import fit

    where = ("--trainer.accelerator", "cpu" if settings["device"] == "cpu" else "gpu")
    saves = ("--trainer.enable_checkpointing", "false", "--leave_out", "[ExportFolder]")  # nor does the peer
    fit("grpo", work, settings, recorder, steps, work / "prompts.jsonl", *where, *saves, *overrides)


def recipe_static(*args: Any) -> None:
    """Keys and values have their place from the beginning; on a GPU a CUDA graph."""
    recipe(*args, "--model.init_args.generator.cache", "static")


SIDES = {"recipe": recipe, "recipe-static": recipe_static, "trl": trl, "trl-no-checkpointing": trl_no_checkpointing}

if __name__ == "__main__":
    run(SIDES)
