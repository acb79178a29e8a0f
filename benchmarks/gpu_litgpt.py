"""litgpt's side in the comparison on a GPU: its ``finetune lora``, called as ``gpu_sides``. Imports only torch and
litgpt, which may live in an environment of its own.
"""

from __future__ import annotations

import csv
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.data import DataModule
from litgpt.finetune import lora
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import save_config
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from benchmarks.gpu_cases import ALPHA, CASES, RANK
from benchmarks.gpu_sides import arguments
from benchmarks.pretrain_litgpt import litgpt_config
from benchmarks.recorder import Recorder


class Rows(DataModule):
    """The rows of all sides; litgpt shifts them by itself."""

    def __init__(self, rows: torch.Tensor, batch: int) -> None:
        super().__init__()
        self.rows, self.batch = rows, batch
        self.prompt_style = None  # asked for at the end, for a file that is not written

    def connect(self, *_: Any, **__: Any) -> None: ...

    def train_dataloader(self) -> DataLoader:
        counts = {"raw": self.rows.shape[1], "raw_plus_prompt_template": self.rows.shape[1]}
        items = [{"input_ids": row, "labels": row, "token_counts": counts} for row in self.rows]
        return DataLoader(items, batch_size=self.batch)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader:
        return DataLoader([{"input_ids": row, "labels": row} for row in self.rows[:1]])  # type: ignore[arg-type]


def write_checkpoint(model: Path, out: Path, block: int) -> None:
    """A checkpoint folder of litgpt's without weights: these are read from ``model`` (see ``fill``)."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    config = litgpt_config(json.loads((model / "config.json").read_text()))
    config.block_size = block  # it makes rotary tables for all of it
    save_config(config, out)
    (out / "lit_model.pth").touch()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model / name, out)


def fill(network: torch.nn.Module, model: Path, quantized: bool) -> None:
    """The weights of the Hugging Face folder into litgpt's model, as its converter names them.

    Raises:
        ValueError: some have no place, or a place is left empty.
    """
    weights: dict[str, torch.Tensor] = {}
    parts: dict[Any, Any] = {}
    for file in sorted(model.glob("*.safetensors")):
        copy_weights_hf_llama(network.config, parts, weights, load_file(file))
    known = network.load_state_dict(weights, strict=False)
    # Layers in 4 bits take their weights out of the dictionary, and make of them others.
    absent = [] if quantized else [name for name in known.missing_keys if "lora_" not in name]
    if absent or known.unexpected_keys:
        raise ValueError(f"litgpt: weights do not fit: missing {absent[:3]}, unknown {known.unexpected_keys[:3]}")


def patch(recorder: Recorder, model: Path, quantized: bool) -> None:
    """Where its files come from, what is watched, and that nothing is saved, as on no side."""
    fit = lora.fit

    def watched(*args: Any, **kwargs: Any) -> Any:
        recorder.watch(kwargs["model"])
        return fit(*args, **kwargs)

    lora.fit = watched
    lora.load_checkpoint = lambda fabric, network, path, strict: fill(network, model, quantized)
    # Its own divides by the number of warm-up steps.
    lora.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    for name in ("save_lora_checkpoint", "copy_config_files", "save_hyperparameters", "save_prompt_style"):
        setattr(lora, name, lambda *_, **__: None)
    lora.merge_lora = lambda **_: None


def main() -> None:
    options = arguments()
    case = CASES[options.case]
    settings = json.loads((options.work / "settings.json").read_text())
    shape, folder = settings["models"][case.model], options.work / f"litgpt-{case.name}"
    recorder = Recorder(options.out, check=options.check, ignore=settings["pad"])
    recorder.start()
    recorder.facts["litgpt"] = version("litgpt")
    write_checkpoint(options.work / "model-8b", folder, shape["sequence"])
    patch(recorder, options.work / "model-8b", case.quantized)
    rows = torch.load(options.work / f"tokens-{case.model}.pt", weights_only=True)[: options.steps * shape["batch"]]
    out = options.work / f"litgpt-{case.name}-output"
    shutil.rmtree(out, ignore_errors=True)
    lora.setup(
        folder,
        out_dir=out,
        precision="bf16-true",
        quantize="bnb.nf4-dq" if case.quantized else None,
        devices=1,
        lora_r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=0.0,
        **{f"lora_{part}": True for part in ("query", "key", "value", "projection", "mlp")},
        data=Rows(rows, shape["batch"]),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=shape["batch"],
            micro_batch_size=shape["batch"],
            lr_warmup_steps=1,
            epochs=2,
            max_steps=options.steps,
            max_seq_length=shape["sequence"],
        ),
        eval=EvalArgs(interval=10**9, max_new_tokens=1, max_iters=1, initial_validation=False, final_validation=False),
        log=LogArgs(),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": settings["lr"], "weight_decay": 0.0}},
        logger_name="csv",
        seed=1234,
    )
    with next(out.rglob("metrics.csv")).open() as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream) if row.get("loss")]
    recorder.finish(losses)


if __name__ == "__main__":
    main()
