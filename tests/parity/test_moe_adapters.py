"""LoRA on stacked experts: loss, gradients, export and merge against plain peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone
from tests.parity import test_peft
from tests.parity.test_moe_balance import FAMILIES, family
from tests.parity.test_peft import build, our_loss, packed, peft_loss, plain_peft, trained

peft = pytest.importorskip("peft")

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "everything": {"r": 4},
    "experts": {"r": 4, "target_modules": [], "target_parameters": EXPERTS},
    "attention and experts": {"r": 4, "use_rslora": True, "target_modules": ["q_proj"], "target_parameters": EXPERTS},
}


@pytest.fixture(autouse=True)
def methods(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, arguments in ADAPTERS.items():
        monkeypatch.setitem(test_peft.METHODS, name, ("LoraConfig", arguments))


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_plain_peft(name: str, adapter: str) -> None:
    model = build(adapter, family(name))
    plain = plain_peft(model, adapter, family(name))
    ours, theirs = our_loss(model), peft_loss(plain)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    ours.backward()
    theirs.backward()
    got, expected = trained(model), trained(plain)
    assert got.keys() == expected.keys()
    assert sum(".experts." in key for key in got) == 2 * 2 * 3  # two matrices, A and B, three layers
    assert any(".gate." in key for key in got) == (adapter == "everything")
    for key, p in expected.items():
        scale = p.grad.abs().max().item()
        assert scale > 0
        torch.testing.assert_close(got[key].grad, p.grad, rtol=1e-4, atol=1e-5 * scale, msg=key)


@pytest.mark.parametrize("adapter", ["everything", "experts"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_unmerged_and_merged_say_what_was_trained(name: str, adapter: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = family(name, initializer_range=0.05)
    base = Backbone(config=config).build(tokenizer=byte_tokenizer(), sequence_length=16, seed=3)
    base.save_pretrained(tmp_path / "base")
    model = build(adapter, config, attention="eager", lean=False).eval()  # the same kernels as plain peft
    ids = packed()[0]
    with torch.no_grad():
        expected = model.hf(ids).logits
        scale = expected.abs().max()
        model.save_adapter(tmp_path / "adapter")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        plain = peft.PeftModel.from_pretrained(loaded, tmp_path / "adapter").eval()
        assert (plain(ids).logits - expected).abs().max() <= 1e-6 * scale
        model.adapter.merge()
        assert not [m for m in model.hf.modules() if "peft" in type(m).__module__]
        assert (model.hf(ids).logits - expected).abs().max() <= 1e-6 * scale
        model.hf.save_pretrained(tmp_path / "merged")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert (again(ids).logits - expected).abs().max() <= 1e-6 * scale
        assert (loaded(ids).logits - expected).abs().max() <= 1e-6 * scale  # plain peft has put its layers into it
        untouched = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        assert (untouched(ids).logits - expected).abs().max() > 1e-3 * scale


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"use_dora": True}, r"does not work with use_dora=True\. \(.*plain LoRA only"),
        (
            {"lora_dropout": 0.1},
            r"does not work with lora_dropout != 0\. \(.*plain LoRA only, without dropout",
        ),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_proj"]},
            r"^backbone\.adapter\.target_parameters: 'experts\.gate_proj' matches no parameter; there are "
            r"mlp\.experts\.down_proj, mlp\.experts\.gate_up_proj$",
        ),
    ],
)
def test_what_peft_cannot_is_one_line(arguments: dict[str, Any], message: str) -> None:
    adapter = {"class_path": "peft.LoraConfig", "init_args": arguments}
    with pytest.raises(ValueError, match=message) as refused:
        Backbone(config=family("mixtral"), adapter=adapter).check(vocabulary=260, sequence_length=16)
    assert "\n" not in str(refused.value)


def test_initializations_that_need_a_matrix_are_refused() -> None:
    adapter = {"class_path": "peft.LoraConfig", "init_args": {"init_lora_weights": "olora"}}
    message = (
        r"\(down_proj, gate\.weight, gate_up_proj: peft adapts stacked experts by plain LoRA only, without dropout"
    )
    with pytest.raises(ValueError, match=message):
        Backbone(config=family("mixtral"), adapter=adapter).build(
            tokenizer=byte_tokenizer(), sequence_length=16, seed=3
        )
