"""The sides of the pre-training comparison, as ``sft_sides.py``; ``FOLDER`` holds ``model/``, ``tokens.pt`` (int64, the
books as one stream, in the order of training) and ``settings.json``. litgpt has a file of its own: it needs other
versions of what is imported here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from benchmarks.recorder import Recorder
from benchmarks.sft_sides import Settings, run


def token_rows(work: Path, settings: Settings, steps: int) -> torch.Tensor:
    """(steps * batch, sequence) int64: the rows of a run, in order."""
    tokens = torch.load(work / "tokens.pt", weights_only=True)
    count = steps * settings["batch"]
    return tokens[: count * settings["sequence"]].view(count, settings["sequence"])


def trainer(work: Path, settings: Settings, recorder: Recorder, steps: int, **variant: Any) -> None:
    """transformers' Trainer on rows of full length, with its own defaults and the settings all sides share."""
    import datasets
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    recorder.start()
    rows = token_rows(work, settings, steps)
    dataset = datasets.Dataset.from_dict({"input_ids": rows.numpy(), "labels": rows.numpy()})
    model = AutoModelForCausalLM.from_pretrained(work / "model")
    recorder.watch(model)
    arguments = TrainingArguments(
        output_dir=str(work / "trainer-output"),
        per_device_train_batch_size=settings["batch"],
        learning_rate=settings["lr"],
        lr_scheduler_type="constant",
        max_grad_norm=settings["clip"],
        weight_decay=0.0,
        bf16=settings["precision"] == "bf16-mixed",
        max_steps=steps,
        train_sampling_strategy="sequential",
        use_cpu=True,
        logging_steps=1 if recorder.check else min(10, steps),
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=1234,
        **variant,
    )
    peer = Trainer(model=model, args=arguments, train_dataset=dataset)
    recorder.facts["optimizer"] = peer.args.optim
    peer.train()
    recorder.finish([entry["loss"] for entry in peer.state.log_history if "loss" in entry])


def trainer_compiled(*args: Any) -> None:
    trainer(*args, torch_compile=True)


def plain(work: Path, settings: Settings, recorder: Recorder, steps: int, compiled: bool = False) -> None:
    """The least that has to be done: a hand-written loop, our attention and head."""
    from transformers import AutoModelForCausalLM

    from llm_modules.logprobs import linear_logprobs
    from llm_modules.zoo import attention

    recorder.start()
    attention.register()
    rows = token_rows(work, settings, steps)
    model = AutoModelForCausalLM.from_pretrained(work / "model", attn_implementation=attention.NAME)
    recorder.watch(model)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=0.0, fused=True)
    model.train()
    losses = []
    for ids in rows.split(settings["batch"]):
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings["precision"] == "bf16-mixed")
        with autocast, attention.training_layout():
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            logprobs, _, _ = linear_logprobs(hidden, model.lm_head.weight, ids[:, 1:].flatten(), uniform=True)
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
    """Ours: ``recipes fit`` on the text; it shuffles its rows, the others follow its order."""
    from benchmarks.recipe_side import fit

    fit("pretrain", work, settings, recorder, steps, work / "books.txt", *overrides)


def recipe_compiled(*args: Any) -> None:
    recipe(*args, "--model.init_args.backbone.compile", "true")


SIDES = {
    "recipe": recipe,
    "recipe-compiled": recipe_compiled,
    "trainer": trainer,
    "trainer-compiled": trainer_compiled,
    "plain": plain,
    "plain-compiled": plain_compiled,
}

if __name__ == "__main__":
    run(SIDES)
