"""What can be computed in slices of rows, and the one line that refuses what cannot. (Numbers: tests/distributed.)"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from llm_modules.strategies import ShardedStrategy
from llm_modules.zoo.attention import packed_attention, register
from llm_modules.zoo.context_parallel import check_context_parallel
from llm_modules.zoo.probe import try_sharing, try_slices
from llm_modules.zoo.routing import Routing
from tests.parity.test_zoo_families import COMMON, FAMILIES, config_of

register()


def model(
    family: str = "llama", attention: str = "packed", virtual: Any = None, routing: Any = None, **changes: Any
) -> Any:
    """As much of a ``CausalLM`` as is looked at before its rows are split."""
    config = AutoConfig.for_model(family, **COMMON, **changes)
    config._attn_implementation = attention
    return SimpleNamespace(hf=SimpleNamespace(config=config), virtual=virtual, routing=routing)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_family_that_is_vouched_for_only_attention_sees_other_positions(family: str) -> None:
    assert try_slices(config_of(family)) is None
    assert try_sharing(config_of(family)) is None


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("stablelm", {}),  # does not pass on what attention needs to know
        ("lfm2", {"layer_types": ["conv", "full_attention"]}),
        ("recurrent_gemma", {}),
    ],
)
def test_families_that_look_further_are_refused(family: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^strategy.context_parallel: 2 is not for .* by more than attention; set it"):
        check_context_parallel(model(family, **changes), 2)


@pytest.mark.parametrize(
    ("family", "changes"),
    [("stablelm", {}), ("lfm2", {"layer_types": ["conv", "full_attention"]}), ("recurrent_gemma", {})],
)
def test_families_that_look_further_share_no_prompt(family: str, changes: dict[str, Any]) -> None:
    config = AutoConfig.for_model(family, **COMMON, **changes)
    assert try_sharing(config) is not None


ROPE = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("refused", "size", "tensor", "message"),
    [
        (model(), 3, 1, "context_parallel 3 does not divide the model's 4 attention heads"),
        (model(), 4, 2, "context_parallel 4 x tensor_parallel 2 does not divide the model's 4 attention heads"),
        (model(attention="sdpa"), 2, 1, "backbone.attention 'sdpa' sees only .*; set backbone.attention to 'packed'"),
        (model(routing=Routing(0.02, 2)), 2, 1, "the load-balancing loss of 'llama' is not taken over slices; set its"),
        (model(virtual=object()), 2, 1, "virtual tokens before each document; use another adapter"),
        (model(rope_parameters=ROPE), 2, 1, r"rotary embeddings of this 'llama' \(dynamic\) depend on the longest"),
    ],
)
def test_what_cannot_be_split_is_refused_in_one_line(refused: Any, size: int, tensor: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^strategy.*{message}") as caught:
        check_context_parallel(refused, size, tensor)
    assert "\n" not in str(caught.value)


def test_what_can_be_split_is_not_refused() -> None:
    check_context_parallel(model(), 4)
    check_context_parallel(model("glm4", head_dim=8), 2)
    check_context_parallel(model(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}), 2, 2)


def test_a_mask_over_slices_is_refused() -> None:
    states = torch.zeros(1, 2, 3, 4)
    module: Any = SimpleNamespace(is_causal=True)
    with pytest.raises(ValueError, match="split rows take no mask"):
        packed_attention(module, states, states, states, torch.ones(1, 1, 3, 3).bool(), context_parallel=object())


@pytest.mark.parametrize("name", ["tensor_parallel", "context_parallel"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^strategy.{name}: 0 is not allowed; 1 or more$"):
        ShardedStrategy(**{name: 0})


@pytest.mark.parametrize(
    ("devices", "sizes", "message"),
    [
        (3, {"context_parallel": 2}, r"^strategy.context_parallel: 2 does not divide the number of devices 3; set"),
        (2, {"context_parallel": 2, "tensor_parallel": 2}, r"^strategy: tensor_parallel 2 x context_parallel 2 = 4"),
    ],
)
def test_devices_that_do_not_divide_are_refused(devices: int, sizes: dict[str, int], message: str) -> None:
    strategy = ShardedStrategy(**sizes)
    strategy.parallel_devices = [torch.device("cpu")] * devices
    with pytest.raises(ValueError, match=message):
        strategy.setup_environment()
