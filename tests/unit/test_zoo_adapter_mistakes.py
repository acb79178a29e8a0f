"""What is said of an adapter that cannot be, in one line, before there is a weight where that is possible."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_zoo_adapters import BOTTLENECK, TINY, build, logprobs, lora, save, stir

from llm_modules.zoo.adapters import Adapter


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        ({"init_args": {"r": 4}}, "no class_path; name a config class, such as peft.LoraConfig, or a folder"),
        ({"class_path": "peft.LoraConfg"}, "'peft.LoraConfg' is no config of peft; did you mean 'LoraConfig'?"),
        ({"class_path": "LoRAConfig"}, "'LoRAConfig' is no config of peft; did you mean 'LoraConfig'?"),
        ({"class_path": "torch.nn.Linear"}, "'torch.nn.Linear' is no config of an adapter"),
        ({"class_path": "pefd.LoraConfig"}, "there is no module 'pefd'"),
        ({"class_path": "peft.LoraConfig", "args": {}}, "unknown key 'args'; allowed: class_path, init_args"),
        (lora(lora_alpa=3), "LoraConfig has no argument 'lora_alpa'; did you mean 'lora_alpha'?"),
        (lora(r=0), "r"),
        (lora(r="many"), "backbone.adapter: LoraConfig"),
        (lora(init_lora_weights="pisa"), "pisa"),
        (lora(init_lora_weights="eva"), "needs a pass over the data"),
        (
            lora(target_modules=["q_prj"]),
            "target_modules: 'q_prj' matches no module (did you mean 'q_proj'?); there are down_proj, embed_tokens, ",
        ),
        (lora(target_modules=["q_proj", "query"]), "target_modules: 'query' matches no module"),
        (lora(target_modules=".*quer"), "target_modules: '.*quer' matches no module; there are "),
        (lora(target_modules="(q_proj"), "is no regular expression"),
        (lora(modules_to_save=["head"]), "modules_to_save: 'head' matches no module"),
        (lora(target_modules=["norm"]), "backbone.adapter: LoraConfig: Target module"),
        ({**BOTTLENECK, "init_args": {"size": 0}}, "size: 0 is not allowed; 1 or more"),
        ({**BOTTLENECK, "init_args": {"activation": "swish"}}, "activation: 'swish' is not allowed; gelu, relu"),
        ({**BOTTLENECK, "init_args": {"target_modules": ["q_prj"]}}, "'q_prj'"),
        (
            {"class_path": "peft.PromptTuningConfig", "init_args": {"num_virtual_tokens": 60}},
            "60 virtual tokens before",
        ),
        ({"class_path": "peft.CPTConfig", "init_args": {}}, "CPTConfig"),
        ({"class_path": "peft.XLoraConfig", "init_args": {}}, "XLoraConfig"),
        (
            {"class_path": "peft.AdaLoraConfig", "init_args": {"init_r": 4, "target_r": 4}},
            "init_r 4 must be above target_r 4",
        ),
        ("./nowhere", "no folder './nowhere'; allowed: a class_path of a config (peft.LoraConfig)"),
    ],
)
def test_mistakes_are_one_line_before_any_weight(adapter: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llm_modules.zoo.weights.random_model", None)
    with pytest.raises(ValueError, match="backbone") as caught:
        build(adapter)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_prefixes_need_packed_attention() -> None:
    with pytest.raises(ValueError, match=r"backbone\.attention: 'sdpa' has no prefixes; prefix tuning needs 'packed'"):
        build({"class_path": "peft.PrefixTuningConfig", "init_args": {}}, attention="sdpa")


@pytest.mark.parametrize("adapter", [{"class_path": "peft.LNTuningConfig"}, lora(modules_to_save=["lm_head"])])
def test_whole_modules_in_full_precision_need_autocast_on_a_half_precision_base(adapter: Any) -> None:
    with pytest.raises(ValueError, match=r"backbone\.dtype: bfloat16, but whole modules are trained, in float32"):
        build(adapter, dtype="bfloat16")
    model = stir(build(adapter, dtype="bfloat16", precision="bf16-mixed"))
    with torch.autocast("cpu", torch.bfloat16):
        logprobs(model).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.adapter.parameters())


def test_a_folder_without_an_adapter(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no adapter_config.json in .*; it is no adapter in safetensors"):
        build(str(tmp_path))


def test_a_folder_of_another_shape(tmp_path: Path) -> None:
    save(build(lora()), lora(), tmp_path)
    (tmp_path / "base.json").unlink()
    with pytest.raises(ValueError, match="does not fit this base") as caught:
        build(str(tmp_path), config={**TINY, "hidden_size": 64})
    assert len(str(caught.value).splitlines()) == 1


def test_a_method_that_no_test_proves_is_tried_first() -> None:
    """RoAd is none of the proved ones: the copy says that it may; what does otherwise than peft is told."""
    model = build({"class_path": "peft.RoadConfig", "init_args": {"group_size": 8}})
    assert model.adapter.kind == "ROAD"


def test_a_method_that_does_more_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Louder(Adapter):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            if self.peft_model is not None:
                forward = self.peft_model.forward
                self.peft_model.forward = lambda *a, **k: _louder(forward(*a, **k))

    def _louder(output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    monkeypatch.setattr("llm_modules.zoo.adapters.Adapter", Louder)
    with pytest.raises(ValueError, match="ROAD cannot be trained here: it does more than put layers into the model"):
        build({"class_path": "peft.RoadConfig", "init_args": {"group_size": 8}})
