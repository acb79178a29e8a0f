"""What an engine refuses before it starts; with vLLM itself: tests/parity/test_vllm.py."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llm_modules import PolicyModule
from llm_modules.evaluation import ExactAnswer
from llm_modules.generation import VLLM, Generator
from llm_modules.generation.vllm_weights import plain_model, unlike, write_untied
from llm_modules.tokenizer import load_tokenizer
from llm_modules.zoo import Backbone
from tests.ranks import run_program

BOTTLENECK = {"class_path": "llm_modules.zoo.bottleneck.BottleneckConfig", "init_args": {"size": 4}}
TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vocab_size": 264, "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"python": "/no/such/python"}, "engine: python: '/no/such/python' is no program"),
        ({"memory": 1.5}, "engine: memory=1.5 must be above 0 and at most 1"),
        ({"settings": {"max_num_seqs": 3}}, "engine: settings: max_num_seqs is decided elsewhere"),
    ],
)
def test_arguments(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        VLLM(**arguments)
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    ("backbone", "generator", "problem"),
    [
        ({}, {"cache": "static"}, "model.engine: cache: static"),
        (
            {},
            {"temperature": 0.7, "top_k": 5},
            "model.engine: vLLM tells log-probabilities at a temperature",
        ),
        (
            {"adapter": BOTTLENECK},
            {},
            "model.engine: the adapter is merged into",
        ),
        (
            {"quantization": "nf4", "adapter": {"class_path": "peft.LoraConfig", "init_args": {"r": 2}}},
            {},
            "model.engine: a quantized model has no weights to hand over",
        ),
    ],
    ids=["static", "temperature and top_k", "bottleneck", "quantized"],
)
def test_settings_that_do_not_go_with_it(backbone: Any, generator: Any, problem: str) -> None:
    with pytest.raises(ValueError) as caught:
        PolicyModule(
            Backbone(config=TINY, **backbone),
            [ExactAnswer()],
            generator=Generator(strategy="sample", max_new_tokens=4, **generator),
            engine=VLLM(),
        )
    assert str(caught.value).startswith(problem)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="this Python has vLLM")
def test_a_python_without_vllm_is_refused_before_anything_is_built() -> None:
    with pytest.raises(ValueError, match=r"^model.engine: .* has no vLLM; install it there, or name another Python"):
        PolicyModule(
            Backbone(config=TINY),
            [ExactAnswer()],
            generator=Generator(strategy="sample", max_new_tokens=4),
            engine=VLLM(),
        )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_shared_head_goes_over_as_its_own(tied: bool, shards: int, tmp_path: Path) -> None:
    config = {key: value for key, value in TINY.items() if key != "model_type"} | {"tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**config))
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write_untied(model, tmp_path, wrong=True, shard="20KB" if shards > 1 else "5GB")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (shards > 1)
    files = sorted(tmp_path.glob("*.safetensors"))
    if index.is_file():
        assert {path.name for path in files} == set(json.loads(index.read_text())["weight_map"].values())
    written = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert written.keys() == kept.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, unlike(kept[name]))
    opened = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened.lm_head.weight, unlike(model.lm_head.weight))
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in kept.items())


def write_own(folder: str) -> None:
    """Of each rank, the weights for its engine."""
    torch.distributed.init_process_group("gloo")
    model = Backbone(config=TINY).build(tokenizer=load_tokenizer("builtin:bytes"), sequence_length=32, seed=0)
    own = Path(folder) / f"of rank {torch.distributed.get_rank()}"
    own.mkdir()
    write_untied(model.hf, own)
    torch.distributed.destroy_process_group()


def test_each_rank_hands_its_weights_over(tmp_path: Path) -> None:
    run_program("tests.unit.test_generation_vllm:write_own", str(tmp_path), folder=tmp_path, timeout=300)
    first, second = (load_file(tmp_path / f"of rank {rank}" / "model.safetensors") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (tmp_path / "of rank 1" / "config.json").is_file()


FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "tie_word_embeddings": False},
}


def said(hf: Any) -> torch.Tensor:
    """Of some tokens, each after those before it."""
    ids = torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return hf.eval()(ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_weight_that_is_not_taken_is_seen(family: str, tmp_path: Path) -> None:
    # As large as weights are that have learned something: of a model that hardly attends, attention cannot be seen.
    config = TINY | {"model_type": family, "initializer_range": 0.3} | FAMILIES[family]
    hf = Backbone(config=config).build(tokenizer=load_tokenizer("builtin:bytes"), sequence_length=32, seed=0).hf
    right = said(hf)
    for name, parameter in hf.named_parameters():
        kept = parameter.detach().clone()
        parameter.data = unlike(kept)
        off = (said(hf) - right).sum(1).abs().max() / right.shape[1]
        assert not off <= 0.1, name  # the widest limit of the check
        parameter.data = kept
    assert torch.equal(said(hf), right)
    write_untied(hf, tmp_path)
    torch.testing.assert_close(said(AutoModelForCausalLM.from_pretrained(tmp_path)), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "dora", "head", "embeddings", "saved", "experts"])
def test_what_goes_over_says_what_the_adapted_model_says(kind: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {
        "lora": {"target_modules": "all-linear"},
        "dora": {"target_modules": "all-linear", "use_dora": True},
        "head": {"target_modules": ["q_proj", "lm_head"]},
        "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
        "saved": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
        "experts": {"target_modules": ["q_proj"]},
    }[kind]
    config = TINY | ({"model_type": "mixtral", **FAMILIES["mixtral"]} if kind == "experts" else {})
    adapter = {"class_path": "peft.LoraConfig", "init_args": {"r": 4, **arguments}}
    backbone = Backbone(config=config, adapter=adapter)
    model = backbone.build(tokenizer=load_tokenizer("builtin:bytes"), sequence_length=32, seed=0)
    assert model.adapter is not None
    generator = torch.Generator().manual_seed(1)
    for parameter in model.adapter.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    before = said(model.hf)
    write_untied(plain_model(model), tmp_path)
    torch.testing.assert_close(said(AutoModelForCausalLM.from_pretrained(tmp_path)), before, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said(model.hf), before)
