"""What an engine refuses before it starts; with vLLM itself: tests/parity/test_vllm.py."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from llm_modules import PolicyModule
from llm_modules.evaluation import ExactAnswer
from llm_modules.generation import VLLM, Generator
from llm_modules.generation.vllm_weights import write_untied
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
    write_untied(model, tmp_path, 0.5, "20KB" if shards > 1 else "5GB")
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is False
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (shards > 1)
    files = sorted(tmp_path.glob("*.safetensors"))
    if index.is_file():
        assert {path.name for path in files} == set(json.loads(index.read_text())["weight_map"].values())
    written = {name: tensor for path in files for name, tensor in load_file(path).items()}
    assert written.keys() == kept.keys()
    for name, tensor in written.items():
        torch.testing.assert_close(tensor, kept[name] * 0.5)
    opened = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(opened.lm_head.weight, model.lm_head.weight * 0.5)
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
