"""litgpt's side of the pre-training comparison; runs in ``benchmarks/.venv-litgpt``, so it imports only torch and
litgpt. Called as the sides of ``pretrain_sides.py``; ``TORCHDYNAMO_DISABLE=1`` makes litgpt's own compiling eager.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.utils import save_config
from safetensors.torch import load_file
from torch.utils.data import DataLoader

from benchmarks.recorder import Recorder


class Rows(DataModule):
    """The rows of all sides, each with the token that follows: litgpt shifts by itself."""

    def __init__(self, rows: torch.Tensor, batch: int) -> None:
        super().__init__()
        self.rows, self.batch = rows, batch

    def connect(self, *_: Any, **__: Any) -> None: ...

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.rows, batch_size=self.batch)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.rows[:1], batch_size=1)


def litgpt_config(hf: dict[str, Any]) -> Config:
    """litgpt's config of a Llama, from that of a Hugging Face folder."""
    rope = hf["rope_parameters"]
    scaled = {"factor": "factor", "low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"}
    scaled |= {"original_max_position_embeddings": "original_max_seq_len"}
    adjustments = {ours: rope[theirs] for theirs, ours in scaled.items()} if rope["rope_type"] == "llama3" else None
    return Config(
        name="bench",
        hf_config={},
        block_size=hf["max_position_embeddings"],
        vocab_size=hf["vocab_size"],
        padded_vocab_size=hf["vocab_size"],
        n_layer=hf["num_hidden_layers"],
        n_head=hf["num_attention_heads"],
        n_embd=hf["hidden_size"],
        n_query_groups=hf["num_key_value_heads"],
        intermediate_size=hf["intermediate_size"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=hf["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        rope_base=int(rope["rope_theta"]),
        rope_adjustments=adjustments,
    )


def convert(model: Path, out: Path) -> Config:
    """The Hugging Face folder of all sides as litgpt's checkpoint."""
    config = litgpt_config(json.loads((model / "config.json").read_text()))
    weights: dict[str, torch.Tensor] = {}
    source = load_file(model / "model.safetensors")
    source.setdefault("lm_head.weight", source["model.embed_tokens.weight"])
    copy_weights_hf_llama(config, {}, weights, source)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    torch.save(weights, out / "lit_model.pth")
    save_config(config, out)
    return config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    settings = json.loads((options.work / "settings.json").read_text())
    batch, sequence = settings["batch"], settings["sequence"]
    recorder = Recorder(options.out, check=options.check, ignore=settings["pad"])
    config = convert(options.work / "model", options.work / "litgpt-model")
    recorder.start()
    recorder.facts["litgpt"] = version("litgpt")
    tokens = torch.load(options.work / "tokens.pt", weights_only=True)
    rows = torch.stack([tokens[i * sequence : (i + 1) * sequence + 1] for i in range(options.steps * batch)])
    weights_of = pretrain.initialize_weights

    def initialize(fabric: Any, model: torch.nn.Module, **kwargs: Any) -> None:
        weights_of(fabric, model, **kwargs)
        model.transformer.wte.weight = model.lm_head.weight  # as litgpt ties them, a line later
        recorder.watch(model)

    pretrain.initialize_weights = initialize
    out = options.work / "litgpt-output"
    shutil.rmtree(out, ignore_errors=True)
    pretrain.save_checkpoint = lambda *_: None  # no side saves
    pretrain.setup(
        "bench",
        model_config=config,
        out_dir=out,
        precision=settings["precision"],
        initial_checkpoint_dir=options.work / "litgpt-model",
        data=Rows(rows, batch),
        train=TrainArgs(
            save_interval=None,
            log_interval=1,
            global_batch_size=batch,
            micro_batch_size=batch,
            max_tokens=options.steps * batch * sequence,
            max_norm=settings["clip"],
            min_lr=settings["lr"],
            lr_warmup_steps=0,
            tie_embeddings=True,
            max_seq_length=sequence,
        ),
        eval=EvalArgs(interval=10**9, max_iters=1, final_validation=False),
        log=LogArgs(),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": settings["lr"], "weight_decay": 0.0}},
        devices=1,
        logger_name="csv",
        seed=1234,
    )
    with next(out.rglob("metrics.csv")).open() as stream:
        losses = [float(row["loss"]) for row in csv.DictReader(stream) if row.get("loss")]
    recorder.finish(losses)


if __name__ == "__main__":
    main()
