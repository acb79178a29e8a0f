"""Our side and TRL's in the comparison on a GPU: ``python -m benchmarks.gpu_sides CASE --work FOLDER --out FILE ...``

Every side trains the same full rows, every token of them, without clipping, with AdamW at a constant rate, and logs
each step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_cases import ALPHA, CASES, RANK, TARGETS, Case
from benchmarks.recorder import Recorder

Settings = dict[str, Any]

_COLUMNS = ("throughput/mfu", "throughput/flops_per_second", "throughput/tokens_per_second", "memory/peak_gib")
"""Of metrics.csv, kept with what the recorder sees."""


def recipe(case: Case, work: Path, settings: Settings, recorder: Recorder, steps: int) -> None:
    """``recipes fit`` with the words of the case."""
    from benchmarks import recipe_side

    rows = recipe_side.run(work, recorder, recipe_words(case, work, settings, steps))
    for name in _COLUMNS:
        # A row that is logged a step apart from what it measures tells nothing before the warm-up is over.
        values = [float(row[name]) for row in rows[case.warmup :] if row.get(name)]
        if values:
            recorder.facts[name] = statistics.median(values)
    recorder.finish([float(row["train/loss"]) for row in rows])


def recipe_words(case: Case, work: Path, settings: Settings, steps: int) -> list[str]:
    """What follows ``recipes fit``."""
    model, on_cpu = settings["models"][case.model], settings["device"] == "cpu"
    words = ["-c", str(Path(__file__).parent / "gpu.yaml"), *case.words]
    if model["config"]["vocab_size"] and case.model.startswith("8b"):
        words += ["--model.init_args.backbone.source", str(work / "model-8b")]
    else:
        words += ["--model.init_args.backbone.config", json.dumps(model["config"])]
    words += [
        *("--sequence_length", str(model["sequence"])),
        *("--model.init_args.optimizer.init_args.lr", str(settings["lr"])),
        *("--data.init_args.sources", f"[{{path: {work / 'text.txt'}}}]"),
        *("--data.init_args.batch_size", str(model["batch"])),
        *("--data.init_args.cache_dir", str(work / "cache")),
        *("--trainer.max_steps", str(steps)),
        *("--trainer.accelerator", "cpu" if on_cpu else "gpu"),
    ]
    if on_cpu:  # a peak that nobody has, so that the column is there
        words += ["--trainer.callbacks+", "[{class_path: callbacks.Throughput, init_args: {peak_flops: 1.0e12}}]"]
    if on_cpu and "precision/fp8" in case.words:
        words += ["--model.init_args.backbone.fp8", "emulated"]
    return words


def trl(case: Case, work: Path, settings: Settings, recorder: Recorder, steps: int) -> None:
    """SFTTrainer with a LoraConfig of peft, as its documentation has it, on rows that are tokens already."""
    import datasets
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    recorder.start()
    model = settings["models"][case.model]
    rows = torch.load(work / f"tokens-{case.model}.pt", weights_only=True)[: steps * model["batch"]]
    arguments: dict[str, Any] = {
        "output_dir": str(work / f"trl-{case.name}"),
        "max_length": model["sequence"],
        "per_device_train_batch_size": model["batch"],
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "bf16": True,
        "gradient_checkpointing": case.checkpointed,
        "max_steps": steps,
        "train_sampling_strategy": "sequential",
        "use_cpu": settings["device"] == "cpu",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 1234,
    }
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(work / "model-8b", **_loading(case, settings)),
        args=SFTConfig(**arguments),
        train_dataset=datasets.Dataset.from_dict({"input_ids": rows.tolist()}),
        processing_class=AutoTokenizer.from_pretrained(work / "model-8b"),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=list(TARGETS), task_type="CAUSAL_LM"
        ),
    )
    recorder.watch(trainer.model)
    recorder.facts["optimizer"] = trainer.args.optim
    recorder.facts["loss_type"] = getattr(trainer.args, "loss_type", None)
    trainer.train()
    recorder.finish([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def _loading(case: Case, settings: Settings) -> dict[str, Any]:
    """How transformers is to open the weights: straight onto the device, in 4 bits or bf16."""
    device = "cpu" if settings["device"] == "cpu" else 0
    chosen: dict[str, Any] = {"dtype": torch.bfloat16, "device_map": {"": device}}
    if case.quantized:
        from transformers import BitsAndBytesConfig

        chosen["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    return chosen


SIDES = {"recipe": recipe, "trl": trl}


def arguments() -> argparse.Namespace:
    """The command line that the harness gives to a side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--check", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    case = CASES[options.case]
    settings = json.loads((options.work / "settings.json").read_text())
    recorder = Recorder(options.out, check=options.check, ignore=settings["pad"])
    SIDES[case.kind](case, options.work, settings, recorder, options.steps)


if __name__ == "__main__":
    main()
