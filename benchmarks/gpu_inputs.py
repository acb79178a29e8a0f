"""What the sides of the comparison on a GPU start from; nothing is fetched.

``python -m benchmarks.gpu_inputs texts|weights --work FOLDER [--tiny] [--device cpu]``

``texts`` writes ``settings.json``, ``text.txt`` and, of each model, ``tokens-MODEL.pt`` (the rows of a run in the order
in which our DataModule deals them, which the peers keep); ``weights`` writes ``model-8b/``: random weights in bf16 with
a tokenizer of bytes, as a Hugging Face folder. It is made on the device and written once; every side reads it.
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SEED = 1234
VOCABULARY = 128_256
"""Llama 3's. The rows are bytes, which are 260 of them: what the head costs depends on its size alone."""

SHARD = 2 * 2**30
"""Bytes of a file of weights."""


@dataclass(frozen=True)
class Model:
    """A model of ``configs/models`` with a vocabulary, and the rows of its micro-batch.

    Attributes:
        preset: its name there.
        vocabulary: tokens.
        sequence: tokens in a row; every row is full.
        batch: rows in a micro-batch, which is an optimizer step.
    """

    preset: str
    vocabulary: int
    sequence: int
    batch: int


MODELS = {
    "1b": Model("llama-1b", VOCABULARY, 2048, 4),
    "8b": Model("llama-8b", VOCABULARY, 2048, 1),
    "8b-batch": Model("llama-8b", VOCABULARY, 2048, 8),
    "small": Model("smollm-135m", 49_152, 1024, 4),
}

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 512}  # fmt: skip
"""Put over every model by ``--tiny``, to see that everything runs."""


def model_config(model: Model, tiny: bool) -> dict[str, Any]:
    """The transformers config, as ``backbone.config`` takes it."""
    import yaml

    path = Path(__file__).parents[1] / "configs" / "models" / f"{model.preset}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))["config"] | {"vocab_size": model.vocabulary}
    return config | TINY if tiny else config


def make_settings(tiny: bool, device: str) -> dict[str, Any]:
    """What all sides are told."""
    from llm_modules.tokenizer import byte_tokenizer

    models = {
        name: {
            "config": model_config(model, tiny),
            "sequence": 64 if tiny else model.sequence,
            "batch": min(2, model.batch) if tiny else model.batch,
        }
        for name, model in MODELS.items()
    }
    return {"device": device, "tiny": tiny, "lr": 2e-4, "pad": byte_tokenizer().pad_token_id, "models": models}


def some_text(size: int) -> str:
    """``size`` characters of words of a made-up language, the same ones each time."""
    source = random.Random(SEED)
    words = ["".join(source.choices("abcdefghijklmnopqrstuvwxyz", k=source.randint(2, 9))) for _ in range(2000)]
    text = " ".join(source.choices(words, k=size // 4 + 1))
    return text[:size]


def write_texts(work: Path, tiny: bool, device: str) -> None:
    """Settings, text and the rows of every model."""
    import torch

    from llm_modules.data import TextDataModule

    settings = make_settings(tiny, device)
    work.mkdir(parents=True, exist_ok=True)
    (work / "settings.json").write_text(json.dumps(settings))
    (work / "text.txt").write_text(some_text(40_000 if tiny else 500_000), encoding="utf-8")
    for name, model in settings["models"].items():
        module = TextDataModule(
            sources=[{"path": str(work / "text.txt")}],  # type: ignore[list-item]
            tokenizer="builtin:bytes",
            sequence_length=model["sequence"],
            batch_size=model["batch"],
            seed=SEED,
            validation_fraction=0.0,
            packing="chunks",
            cache_dir=str(work / "cache"),
        )
        module.prepare_data()
        module.setup()
        rows = torch.cat([batch.input_ids for batch in module.train_dataloader()])
        torch.save(rows, work / f"tokens-{name}.pt")
        print(f"{name}: {len(rows)} rows of {rows.shape[1]} tokens")


def write_weights(work: Path) -> None:
    """``model-8b/``: normal weights of the config's spread, from a seed, in files of ``SHARD`` bytes; a tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    from llm_modules.tokenizer import byte_tokenizer

    settings = json.loads((work / "settings.json").read_text())
    folder = work / "model-8b"
    folder.mkdir(parents=True, exist_ok=True)
    config = LlamaConfig(**settings["models"]["8b"]["config"], architectures=["LlamaForCausalLM"], dtype="bfloat16")
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    generator = torch.Generator(settings["device"]).manual_seed(SEED)
    index: dict[str, str] = {}
    part: dict[str, torch.Tensor] = {}
    for name, shape in shapes.items():
        weight = torch.ones(shape, dtype=torch.bfloat16, device=settings["device"])
        if len(shape) > 1:
            weight.normal_(0.0, config.initializer_range, generator=generator)
        part[name] = weight.cpu()
        file = f"model-{len(set(index.values())):05d}.safetensors"
        if sum(t.nbytes for t in part.values()) >= SHARD or name == list(shapes)[-1]:
            save_file(part, folder / file, metadata={"format": "pt"})
            index |= dict.fromkeys(part, file)
            part = {}
    total = sum(2 * shape.numel() for shape in shapes.values())
    whole = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(whole))
    byte_tokenizer().save_pretrained(folder)
    config.save_pretrained(folder)
    print(f"{total / 2**30:.1f} GiB in {len(set(index.values()))} files")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["texts", "weights"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    if options.what == "texts":
        write_texts(options.work, options.tiny, options.device)
    else:
        write_weights(options.work)


if __name__ == "__main__":
    main()
