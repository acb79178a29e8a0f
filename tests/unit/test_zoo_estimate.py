"""What is said of a model before it exists: parameters, FLOPs, peak memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode

from llm_modules.optimizers import multiplies_bfloat16
from llm_modules.zoo import Backbone
from llm_modules.zoo.estimate import meta_model, parameter_count, si, summarize, token_flops
from llm_modules.zoo.memory import LIBRARIES, activation_bytes, optimizer_state, peak_memory

MODELS = Path(__file__).parents[2] / "configs" / "models"

PUBLISHED = {
    "llama-1b": (128_256, 1_235_814_400),
    "llama-8b": (128_256, 8_030_261_248),
    "qwen3-0.6b": (151_936, 596_049_920),
    "qwen3-4b": (151_936, 4_022_468_096),
    "qwen3-8b": (151_936, 8_190_735_360),
    "gemma2-2b": (256_000, 2_614_341_888),
    "gemma3-1b": (262_144, 999_885_952),
    "gpt2-124m": (50_257, 124_439_808),
    "smollm-135m": (49_152, 134_515_008),
    "smollm-360m": (49_152, 361_821_120),
    "smollm-1.7b": (49_152, 1_711_376_384),
    "olmo2-1b": (100_352, 1_484_916_736),
    "olmo2-7b": (100_352, 7_298_617_344),
    "mixtral-8x7b": (32_000, 46_702_792_704),
    "olmoe-1b-7b": (50_304, 6_919_161_856),
    "qwen3-30b-a3b": (151_936, 30_532_122_624),
}
"""Vocabulary and number of parameters of the models on the hub that the presets are shaped after."""


def config_of(preset: str, **changes: Any) -> Any:
    values = yaml.safe_load((MODELS / f"{preset}.yaml").read_text())["config"]
    return Backbone(config={**values, **changes}).check(vocabulary=64, sequence_length=64)


@pytest.mark.parametrize("preset", PUBLISHED)
def test_presets_have_the_published_number_of_parameters(preset: str) -> None:
    vocabulary, parameters = PUBLISHED[preset]
    assert summarize(config_of(preset, vocab_size=vocabulary), sequence_length=512).parameters == parameters


@pytest.mark.parametrize("preset", ["llama-1m", "gpt2-tiny", "gemma2-tiny", "gemma3-tiny", "qwen3-tiny", "olmo2-tiny"])
def test_flops_are_those_that_torch_counts(preset: str) -> None:
    """At the window's length, which torch's counter does not know of; forward and training, within 2 %."""
    from transformers import AutoModelForCausalLM

    config = config_of(preset)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    flops = token_flops(meta_model(config))
    ids = torch.randint(64, (2, 64))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    assert flops.forward(64) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.02)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert flops.training(64) == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.02)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("mixtral", {"num_local_experts": 8}),
        ("olmoe", {"num_experts": 16, "num_experts_per_tok": 4}),
        (
            "qwen3_moe",
            {"num_experts": 16, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
        ),
    ],
)
def test_experts_that_a_token_does_not_visit_cost_nothing(family: str, sizes: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes |= {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(family, vocab_size=64, num_key_value_heads=2, **sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    ids = torch.randint(64, (1, 48))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    assert token_flops(model).forward(48) == pytest.approx(counter.get_total_flops() / 48, rel=0.02)
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids, use_cache=False).loss.backward()
    assert token_flops(model).training(48) == pytest.approx(counter.get_total_flops() / 48, rel=0.02)


@pytest.mark.parametrize(
    ("preset", "vocabulary", "active"),
    [
        ("mixtral-8x7b", 32_000, 12_748_587_008),
        ("olmoe-1b-7b", 50_304, 1_178_861_568),
        ("qwen3-30b-a3b", 151_936, 3_041_656_832),
    ],
)
def test_active_parameters_of_a_token(preset: str, vocabulary: int, active: int) -> None:
    """By hand: attention, router, the experts visited (gate, up, down), and the head; what papers round to 12.9 B (with
    the embedding), 1.3 B (likewise) and 3.3 B."""
    config = config_of(preset, vocab_size=vocabulary)
    size, layers, kept = config.hidden_size, config.num_hidden_layers, config.num_experts_per_tok
    inner = getattr(config, "moe_intermediate_size", config.intermediate_size)
    head = getattr(config, "head_dim", None) or size // config.num_attention_heads
    attention = 2 * size * head * (config.num_attention_heads + config.num_key_value_heads)
    by_hand = layers * (attention + config.num_experts * size + kept * 3 * size * inner) + vocabulary * size
    assert by_hand == active
    flops = token_flops(meta_model(config))
    assert flops.weights + flops.head == 2 * active


def test_flops_by_hand() -> None:
    flops = token_flops(meta_model(config_of("gemma3-tiny", vocab_size=1000)))
    block = 128 * 128 + 2 * 128 * 64 + 128 * 128 + 3 * 128 * 384  # query, key and value, output, MLP
    assert flops.weights == 2 * 6 * block
    assert flops.head == 2 * 128 * 1000
    scores = 4 * 128  # 4 heads of 32, keys and values
    assert flops.forward(500) == flops.weights + flops.head + scores * (5 * 64 + 500)  # five of six see 64 positions
    assert flops.forward(500, trained_share=0.25) == flops.forward(500) - 0.75 * flops.head


def test_optimizer_state() -> None:
    from functools import partial

    from llm_modules.optimizers import MuonAdamW

    assert optimizer_state(torch.optim.AdamW) == pytest.approx(2, abs=0.01)
    assert optimizer_state(partial(torch.optim.SGD, lr=0.1)) == 0
    assert optimizer_state(partial(torch.optim.SGD, lr=0.1, momentum=0.9)) == 1
    assert optimizer_state(MuonAdamW) == pytest.approx(1, abs=0.01)


def test_activations_are_what_autograd_keeps() -> None:
    """Against the tensors that a real forward pass saves, by storage; windows and soft-caps included."""
    from llm_modules.zoo.attention import register
    from llm_modules.zoo.causal_lm import CausalLM
    from llm_modules.zoo.lean import make_lean

    register()
    from transformers import AutoModelForCausalLM

    for preset, precision in (
        ("llama-1m", "bf16-mixed"),
        ("gemma2-tiny", "bf16-mixed"),
        ("gpt2-tiny", "bf16-mixed"),
        ("mixtral-tiny", "bf16-mixed"),
        ("mixtral-tiny", "32-true"),
    ):
        config, mixed = config_of(preset), precision != "32-true"
        hf = AutoModelForCausalLM.from_config(config, attn_implementation="packed")
        make_lean(hf)
        own = {t.untyped_storage().data_ptr() for t in (*hf.parameters(), *hf.buffers())}
        kept: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, kept: Any = kept, own: Any = own) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in own:
                kept[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            CausalLM(hf).hidden_states(torch.zeros(1, 200, dtype=torch.long), torch.arange(200)[None])
        real = sum(t.untyped_storage().nbytes() for t in kept.values())
        assert activation_bytes(config, 200, precision) == pytest.approx(real, rel=0.02)


def test_summary_reads_well() -> None:
    backbone = Backbone(**yaml.safe_load((MODELS / "llama-34m.yaml").read_text()))
    text = str(backbone.summary(vocabulary=16_384, sequence_length=512, tokens=4096, precision="bf16-mixed"))
    lines = text.splitlines()
    assert lines[0] == "model       llama, 8 layers of 512, 16,384 tokens"
    assert lines[1] == "parameters  34,087,424 (8,388,608 of the vocabulary)"
    assert lines[2].startswith("FLOPs       230 M a trained token")
    assert lines[3].startswith("peak memory 1.94 GiB")
    assert all(len(line) <= 120 for line in lines)
    assert [si(n) for n in (12.3, 1234.0, 5.678e12)] == ["12.3", "1.23 k", "5.68 T"]


NATIVE_BF16 = pytest.mark.skipif(
    not multiplies_bfloat16(), reason="needs a processor with bf16 instructions: others take minutes, on another path"
)

MEASURE = """
import ctypes, json, os, sys, torch
settings = json.loads(sys.argv[1])
if settings["tight"]:  # every large tensor straight from and to the system: the bytes in use and no more
    os.environ["THP_MEM_ALLOC_ENABLE"] = "1"
    ctypes.CDLL("libc.so.6").mallopt(-3, 1 << 20)
from llm_modules.logprobs import next_token_targets
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone
def used(key):
    return int(next(line for line in open("/proc/self/status") if line.startswith(key)).split()[1]) * 1024
mixed = settings["precision"] == "bf16-mixed"
with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
    torch.nn.Linear(256, 256)(torch.randn(300, 256)).sum().backward()
before = used("VmRSS")
backbone = Backbone(
    config=settings["config"], activation_checkpointing=settings["checkpointing"], lean=not settings["tight"]
)
model = backbone.build(tokenizer=byte_tokenizer(), sequence_length=256, seed=0, precision=settings["precision"]).train()
optimizer = torch.optim.AdamW(model.parameters())
tokens = settings["tokens"]
ids = torch.randint(0, 256, (1, tokens))
positions = torch.arange(256).repeat(tokens // 256)[None]
offsets = torch.arange(0, tokens + 1, 256, dtype=torch.int32)
for step in range(2 if settings["tight"] else 4):  # until the heap has its holes
    with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
        scores = model(ids, positions, next_token_targets(ids, positions), offsets, 256, uniform=True)
        loss = -scores.logprobs.mean()
    loss.backward()
    if step % settings["accumulate"] == 0:
        optimizer.step()
        optimizer.zero_grad()  # as LLMModule does
print(json.dumps(used("VmHWM") - before))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("preset", "precision", "checkpointing", "tight", "accumulate"),
    [
        ("llama-34m", "32-true", False, True, 1),
        ("llama-34m", "32-true", False, False, 1),
        ("llama-34m", "32-true", True, False, 2),
        pytest.param("llama-34m", "bf16-mixed", False, False, 1, marks=NATIVE_BF16),
        pytest.param("llama-34m", "bf16-mixed", False, False, 2, marks=NATIVE_BF16),
        pytest.param("llama-34m", "bf16-mixed", True, False, 1, marks=NATIVE_BF16),
        pytest.param("llama-34m", "bf16-true", False, False, 1, marks=NATIVE_BF16),
        ("mixtral-tiny", "32-true", False, True, 1),
    ],
)
def test_peak_memory_is_the_measured_peak(
    preset: str, precision: str, checkpointing: bool, tight: bool, accumulate: int
) -> None:
    """34 M parameters (mixture of experts: 22 M), 1,024 tokens, a few steps in a process of their own, within 20 %."""
    values = yaml.safe_load((MODELS / f"{preset}.yaml").read_text())["config"]
    if preset == "mixtral-tiny":
        values |= {"hidden_size": 256, "intermediate_size": 512}
    values["vocab_size"] = 16_384
    config = Backbone(config=values).check(vocabulary=260, sequence_length=256)
    estimate = peak_memory(
        config,
        parameters=parameter_count(meta_model(config)),
        tokens=1024,
        precision=precision,
        activation_checkpointing=checkpointing,
        accumulate=accumulate,
        lean=not tight,
        device="cuda" if tight else "cpu",  # which has no holes in its heap
    )
    settings = {
        "config": values,
        "precision": precision,
        "checkpointing": checkpointing,
        "tokens": 1024,
        "accumulate": accumulate,
    }
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", MEASURE, json.dumps({**settings, "tight": tight})]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    code = LIBRARIES if tight else 0  # which the estimate for a GPU leaves out
    assert estimate.total + code == pytest.approx(json.loads(done.stdout), rel=0.2)


@pytest.mark.parametrize("preset", ["llama-1m", "gemma3-tiny"])
def test_reinforcement_learning_takes_critics_copies_and_a_cache(
    preset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each part against the bytes of the tensors that are there: of models, of the optimizer, of the answers' cache."""
    from llm_modules import PolicyModule
    from llm_modules.evaluation import Format, ModelReward
    from llm_modules.generation import Generator, steps
    from llm_modules.generation.rollout import GroupSampler
    from llm_modules.objectives import SafePPO
    from recipes.preview import whole_summary

    backbone = Backbone(**yaml.safe_load((MODELS / f"{preset}.yaml").read_text()))
    module = PolicyModule(
        backbone,
        [ModelReward(str(tmp_path))],
        SafePPO(kl=0.1),
        [Format("x", name="x")],
        group_size=3,
        generator=Generator(strategy="sample", max_new_tokens=20, batch_size=8),
        sequence_length=128,
    )
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    data = SimpleNamespace(batch_size=4, longest_prompt=70)
    known = {"vocabulary": len(module.tokenizer), "sequence_length": 128, "tokens": 300, "precision": "32-true"}
    memory = whole_summary(module, data, known, {"optimizer": torch.optim.AdamW}).memory
    assert memory is not None
    module.configure_model()
    assert memory.weights == sum(p.nbytes for p in module.parameters())
    assert memory.frozen == sum(p.nbytes for p in module._copy[0].parameters()) + 1000
    optimizer = torch.optim.AdamW(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    state = sum(tensor.nbytes for kept in optimizer.state.values() for tensor in kept.values())
    assert memory.optimizer == pytest.approx(state, rel=1e-3)
    largest = 0
    forward = steps._logits

    def watched(hf: Any, ids: Any, mask: Any, positions: Any, cache: Any) -> Any:
        nonlocal largest
        logits = forward(hf, ids, mask, positions, cache)
        tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        largest = max(largest, sum(tensor.untyped_storage().nbytes() for tensor in tensors))
        return logits

    monkeypatch.setattr(steps, "_logits", watched)
    for cache in ("dynamic",) if preset.startswith("gemma") else ("dynamic", "static"):  # which has sliding windows
        with GroupSampler(replace(module.generator, cache=cache), module.model, module.tokenizer) as sampler:
            sampler.end_ids = [10**6]  # no answer ends
            sampler.sample([[65] * 70] * 4, [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(4)])
        assert memory.cache == largest
    lines = dict(memory.lines())["peak memory"]
    assert "frozen models 0." in lines
    assert "keys and values of answers 0." in lines
