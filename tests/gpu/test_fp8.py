"""fp8 on a GPU that has it (Hopper or later): trains close to bf16, and what leaves is an ordinary model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from recipes.__main__ import main

pytest.importorskip("torchao")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9),
        reason="needs a GPU with fp8 (compute capability 8.9 or more)",
    ),
]

RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 256
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2,
               num_attention_heads: 4, num_key_value_heads: 2, max_position_embeddings: 512}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-3}}
data:
  class_path: llm_modules.data.TextDataModule
  init_args: {sources: [{path: rows.jsonl}], batch_size: 4, packing: documents, validation_fraction: 0.1}
trainer: {max_steps: 40, accelerator: gpu, devices: 1, log_every_n_steps: 1, enable_progress_bar: false}
checkpoint: {every_n_steps: 20}
"""


def losses(run: Path) -> list[float]:
    with (run / "metrics.csv").open(newline="") as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row["train/loss"]]


def test_the_overlay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.chdir(tmp_path)
    rows = [json.dumps({"text": f"row number {i} of many, " * (1 + i % 30)}) for i in range(400)]
    Path("rows.jsonl").write_text("\n".join(rows) + "\n")
    Path("tiny.yaml").write_text(RECIPE)
    for number, overlay in enumerate(("precision/bf16-mixed", "precision/fp8")):
        assert main(["fit", "-c", "tiny", "-c", overlay]) == 0
        assert Path(f"runs/tiny/{number}/export").is_dir()
    bf16, fp8 = losses(Path("runs/tiny/0")), losses(Path("runs/tiny/1"))
    assert fp8 != bf16
    assert fp8[-1] < 0.5 * fp8[0]
    assert abs(fp8[-1] - bf16[-1]) < 0.05 * bf16[0]
    model = AutoModelForCausalLM.from_pretrained("runs/tiny/1/export", dtype=torch.float32)
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert not [name for name, module in model.named_modules() if "Float8" in type(module).__name__]


def test_what_the_emulation_promises_holds() -> None:
    """The hardware's products are those of the emulation, which the tests on CPUs rely on, but for how they are summed
    (and, in half precision, rounded): far nearer than fp8 is to bf16."""
    from llm_modules.tokenizer import byte_tokenizer
    from llm_modules.zoo import Backbone

    config = {
        "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    generator = torch.Generator().manual_seed(5)
    states = torch.randn(37, 256, generator=generator).cuda()  # 37 tokens: padded inside, where they are summed over
    upstream = torch.randn(37, 512, generator=generator).cuda()
    found: dict[object, list[torch.Tensor]] = {}
    for kind in (True, "emulated", False):
        backbone = Backbone(config=config, fp8=kind)
        model = backbone.build(tokenizer=byte_tokenizer(), sequence_length=64, seed=3).cuda()
        layer, inputs = model.hf.model.layers[0].mlp.up_proj, states.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = layer(inputs)
        out.backward(upstream.to(out.dtype))
        found[kind] = [out.detach().float(), inputs.grad.float(), layer.weight.grad.float()]
    for actual, expected, exact in zip(*found.values(), strict=True):
        assert (actual - expected).norm() < 5e-3 * expected.norm()
        assert (actual - exact).norm() > 2e-2 * exact.norm()
