"""The sides of the fine-tuning comparison. Run by ``sft_trl.py``, each in a process of its own:

``python -m benchmarks.sft_sides SIDE --work FOLDER --out FILE --steps N [--check]``

``FOLDER`` holds ``model/`` (weights and tokenizer), ``rows.jsonl`` (in the order of training) and ``settings.json``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.recorder import Recorder

Settings = dict[str, Any]


def trl_arguments(work: Path, settings: Settings, recorder: Recorder, steps: int) -> dict[str, Any]:
    """What all of TRL's trainers are told."""
    return {
        "output_dir": str(work / "trl-output"),
        "max_length": settings["sequence"],
        "per_device_train_batch_size": settings["batch"],
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": settings["clip"],
        "weight_decay": 0.0,
        "bf16": settings["precision"] == "bf16-mixed",
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "use_cpu": settings["device"] == "cpu",
        "logging_steps": 1 if recorder.check else min(10, steps),
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1234,
    }


def train_with_trl(trainer: Any, model: Any, arguments: dict[str, Any], recorder: Recorder) -> None:
    recorder.watch(model)
    recorder.facts["arguments"] = {k: str(v) for k, v in arguments.items() if k != "output_dir"}
    recorder.facts["optimizer"] = trainer.args.optim
    recorder.facts["gradient_checkpointing"] = trainer.args.gradient_checkpointing
    trainer.train()
    recorder.finish([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def trl(work: Path, settings: Settings, recorder: Recorder, steps: int, **variant: Any) -> None:
    """SFTTrainer as its documentation has it: prompt/completion rows, its defaults, and what all sides share."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    recorder.start()
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    dataset = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["instruction"]}],
                "completion": [{"role": "assistant", "content": row["response"]}],
            }
            for row in rows
        ]
    )
    arguments = trl_arguments(work, settings, recorder, steps) | variant
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(**arguments),
        train_dataset=dataset,
        processing_class=AutoTokenizer.from_pretrained(work / "model"),
    )
    train_with_trl(trainer, model, arguments, recorder)


def trl_no_checkpointing(*args: Any) -> None:
    """TRL with the default that costs it the most time turned off."""
    trl(*args, gradient_checkpointing=False)


def trl_compiled(*args: Any) -> None:
    trl(*args, gradient_checkpointing=False, torch_compile=True)


def trl_packing(*args: Any) -> None:
    """TRL's own packing: other rows to a step (whole rows of ``max_length`` tokens), so only tokens/s compare."""
    trl(*args, packing=True)


def plain(work: Path, settings: Settings, recorder: Recorder, steps: int, compiled: bool = False) -> None:
    """The least that has to be done: a hand-written loop over packed rows, losses of trained tokens only."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.plain_loop import packed_batches
    from llm_modules.logprobs import linear_logprobs
    from llm_modules.zoo import attention

    recorder.start()
    tokenizer = AutoTokenizer.from_pretrained(work / "model")
    rows = [json.loads(line) for line in (work / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    batches = packed_batches(rows, tokenizer, settings["sequence"], settings["batch"])
    attention.register()
    model = AutoModelForCausalLM.from_pretrained(work / "model", attn_implementation=attention.NAME)
    recorder.watch(model)
    if compiled:
        for layer in model.model.layers:
            layer.compile(dynamic=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=0.0, fused=True)
    model.train()
    losses = []
    for batch in batches[:steps]:
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bf16-mixed")
        with autocast, attention.training_layout():
            hidden = model.model(
                input_ids=batch.input_ids,
                position_ids=batch.position_ids,
                use_cache=False,
                cu_seq_lens_q=batch.document_offsets,
            ).last_hidden_state
            logprobs, _, _ = linear_logprobs(
                hidden[0, batch.predicting], model.lm_head.weight, batch.targets, uniform=True
            )
            loss = -logprobs.mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    recorder.finish(losses)


def plain_compiled(*args: Any) -> None:
    plain(*args, compiled=True)


def recipe(work: Path, settings: Settings, recorder: Recorder, steps: int, *overrides: str) -> None:
    """Ours: ``recipes fit`` on the rows as they are in the data set; it shuffles, the others follow its order."""
    from benchmarks.recipe_side import fit

    fit("sft", work, settings, recorder, steps, work / "dolly.jsonl", *overrides)


def recipe_compiled(*args: Any) -> None:
    recipe(*args, "--model.init_args.backbone.compile", "true")


SIDES = {
    "recipe": recipe,
    "recipe-compiled": recipe_compiled,
    "trl": trl,
    "trl-no-checkpointing": trl_no_checkpointing,
    "trl-compiled": trl_compiled,
    "trl-packing": trl_packing,
    "plain": plain,
    "plain-compiled": plain_compiled,
}


def run(sides: dict[str, Callable[..., None]]) -> None:
    """The command line of a module of sides."""
    parser = argparse.ArgumentParser()
    parser.add_argument("side", choices=sides)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    settings = json.loads((options.work / "settings.json").read_text())
    recorder = Recorder(options.out, check=options.check, ignore=settings["pad"])
    sides[options.side](options.work, settings, recorder, options.steps)


if __name__ == "__main__":
    run(SIDES)
