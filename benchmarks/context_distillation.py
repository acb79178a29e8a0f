"""Context distillation closes the gap to the prompted teacher on prompts that were held out: KL before and after.

``python -m benchmarks.context_distillation --work FOLDER [--seeds 0 1 2] [--ways kl samples lora]``

For each seed: a small model learns questions about Python's standard library, each twice: with a preprompt (a system
message) in front the answer is in capitals, without it as it is. So it reacts to the preprompt, which a model of this
size would not by itself. It answers other questions under the preprompt; on those answers it is then taught to do so
without: by the whole distribution of its frozen copy that reads the preprompt (`kl`), of its base under an adapter
(`lora`), or by fine-tuning on the answers (`samples`). Measured is KL(teacher with the preprompt || student without) a
token, of answers that the teacher gave to held-out questions (about other modules).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import mean
from typing import Any

PREPROMPT = "SHOUT: answer in capital letters."
LLAMA = {
    "model_type": "llama", "hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3,
    "num_attention_heads": 3, "num_key_value_heads": 3, "max_position_embeddings": 512, "tie_word_embeddings": True,
}  # fmt: skip
LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}}
LENGTH, LONGEST = 256, 60
TEACHER_ROWS, PROMPTS, HELD_OUT = 1200, 480, 96
TEACHER_STEPS, STEPS, BATCH = 200, 60, 16
WAYS = ("kl", "samples", "lora")


def questions(split: str, count: int) -> list[tuple[str, str]]:
    """Short questions with short answers, in an order that does not depend on the module that they are about."""
    from llm_modules.data.python_docs import conversations

    found = []
    for row in conversations(split):
        talk = [message for message in row["messages"] if message["role"] != "system"]
        if len(talk) == 2 and max(len(message["content"]) for message in talk) <= LONGEST:
            found.append((talk[0]["content"], talk[1]["content"]))
    step = max(1, len(found) // count)
    return found[::step][:count]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def data_of(kind: str, rows: Path, held_out: Path, seed: int, cache: Path) -> Any:
    from llm_modules.data import ConversationDataModule, PrepromptDataModule

    common: dict[str, Any] = {
        "sources": [{"path": str(rows)}],
        "validation_sources": [{"path": str(held_out)}],
        "tokenizer": "builtin:bytes",
        "chat_template": "chatml",
        "sequence_length": LENGTH,
        "batch_size": BATCH,
        "packing": "batch",
        "seed": seed,
        "cache_dir": str(cache),
    }
    if kind == "conversations":
        return ConversationDataModule(**common)
    return PrepromptDataModule(preprompt=PREPROMPT, **common)


def trainer_of(steps: int, seed: int) -> Any:
    from lightning.pytorch import Trainer, seed_everything

    seed_everything(seed, verbose=False)
    return Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        gradient_clip_val=1.0,
        use_distributed_sampler=False,
        limit_val_batches=1.0,
        val_check_interval=steps,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )


def settings(seed: int, rate: float) -> dict[str, Any]:
    import torch

    from llm_modules.schedules import WarmupCosine

    return {
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        "schedule": lambda optimizer: WarmupCosine(optimizer, warmup=0.1, final=0.1),
        "sequence_length": LENGTH,
        "seed": seed,
    }


def make_teacher(work: Path, seed: int) -> Path:
    """A model that shouts under the preprompt; its folder."""
    from llm_modules import LanguageModelModule
    from llm_modules.zoo import Backbone

    asked = questions("train", TEACHER_ROWS + PROMPTS)
    rows = []
    for question, answer in [pair for number, pair in enumerate(asked) if number % 7 < 5][:TEACHER_ROWS]:
        said, shouted = ({"role": "assistant", "content": text} for text in (answer, answer.upper()))
        user = {"role": "user", "content": question}
        rows += [{"messages": [user, said]}, {"messages": [{"role": "system", "content": PREPROMPT}, user, shouted]}]
    file = write(work / "teacher.jsonl", rows)
    module = LanguageModelModule(Backbone(config=LLAMA), **settings(seed, 3e-3))
    data = data_of("conversations", file, write(work / "first.jsonl", rows[:32]), seed, work / "cache")
    trainer_of(TEACHER_STEPS, seed).fit(module, datamodule=data)
    module.export(work / "teacher")
    return work / "teacher"


def make_answers(work: Path, teacher: Path, seed: int) -> tuple[Path, Path]:
    """What the teacher answers under the preprompt, to questions to be trained on and to held-out ones."""
    from recipes.__main__ import main

    asked = questions("train", TEACHER_ROWS + PROMPTS)
    prompts = [question for number, (question, _) in enumerate(asked) if number % 7 >= 5][:PROMPTS]
    files = []
    for name, listed in (("answers", prompts), ("held_out", [q for q, _ in questions("validation", HELD_OUT)])):
        source, out = (
            write(work / f"{name}_prompts.jsonl", [{"prompt": text} for text in listed]),
            work / f"{name}.jsonl",
        )
        words = ["generate", "-m", str(teacher), "--file", str(source), "--out", str(out), "--preprompt", PREPROMPT]
        words += ["--strategy", "sample", "--seed", str(seed), "--max_new_tokens", "80", "--batch_size", "96"]
        assert main([*words, "--overwrite"]) == 0
        files.append(out)
    return files[0], files[1]


def measure(student: Path, teacher: Path, answers: Path, held_out: Path, seed: int) -> float:
    """KL(teacher with the preprompt || student without) a token, of the answers to held-out questions."""
    from llm_modules import DistillationModule
    from llm_modules.zoo import Backbone

    module = DistillationModule(Backbone(source=str(student)), Backbone(source=str(teacher)), **settings(seed, 0.0))
    data = data_of("preprompt", answers, held_out, seed, student.parent / "cache")
    return float(trainer_of(1, seed).validate(module, datamodule=data, verbose=False)[0]["val/kl"])


def distil(way: str, work: Path, answers: Path, held_out: Path, seed: int) -> float:
    """The KL of ``measure`` after the teacher was taught to do without its preprompt."""
    from llm_modules import DistillationModule, LanguageModelModule
    from llm_modules.zoo import Backbone

    teacher = work / "teacher"
    adapter, rate = (LORA, 1e-2) if way == "lora" else (None, 1e-3)
    kind: Any = LanguageModelModule if way == "samples" else DistillationModule
    module = kind(Backbone(source=str(teacher), adapter=adapter), **settings(seed, rate))
    data = data_of("conversations" if way == "samples" else "preprompt", answers, held_out, seed, work / "cache")
    trainer = trainer_of(STEPS, seed)
    trainer.fit(module, datamodule=data)
    if way != "samples":
        return float(trainer.callback_metrics["val/kl"])
    module.export(work / "student")
    return measure(work / "student", teacher, answers, held_out, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, help="folder for models and answers")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    args = parser.parse_args()
    closed: dict[str, list[float]] = {way: [] for way in args.ways}
    for seed in args.seeds:
        work = args.work / f"seed-{seed}"
        work.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        teacher = make_teacher(work, seed)
        answers, held_out = make_answers(work, teacher, seed)
        before = measure(teacher, teacher, answers, held_out, seed)
        print(
            f"seed {seed}: KL {before:.3f} before; teacher and answers {time.perf_counter() - began:.0f} s", flush=True
        )
        for way in args.ways:
            began = time.perf_counter()
            after = distil(way, work, answers, held_out, seed)
            closed[way].append(1 - after / before)
            took = time.perf_counter() - began
            print(
                f"seed {seed}, {way:<8} KL {before:.3f} -> {after:.3f} nats a token, {closed[way][-1]:.1%} of the gap "
                f"closed, {took:.0f} s",
                flush=True,
            )
    for way, shares in closed.items():
        print(f"{way:<8} closed {mean(shares):.1%} on average, at least {min(shares):.1%}")


if __name__ == "__main__":
    main()
