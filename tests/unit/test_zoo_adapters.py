"""Adapters: what a recipe may say, what is trained and kept, what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm_modules.logprobs import next_token_targets
from llm_modules.strategies.parallel_plan import shard
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone, CausalLM, describe_difference, open_adapter, save_adapted
from llm_modules.zoo.weights import weights_digest

pytest.importorskip("peft")

TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BOTTLENECK = {"class_path": "llm_modules.zoo.bottleneck.BottleneckConfig", "init_args": {"size": 4}}


def lora(**arguments: Any) -> dict[str, Any]:
    return {"class_path": "peft.LoraConfig", "init_args": {"r": 4, **arguments}}


def build(adapter: Any, seed: int = 0, precision: str = "32-true", **fields: Any) -> CausalLM:
    backbone = Backbone(**{"config": TINY, "adapter": adapter, **fields})
    return backbone.build(tokenizer=byte_tokenizer(), sequence_length=16, seed=seed, precision=precision)


def stir(model: CausalLM) -> CausalLM:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.adapter.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def logprobs(model: CausalLM) -> torch.Tensor:
    ids = torch.arange(24).view(2, 12)
    positions = torch.arange(12).expand(2, 12)
    return model(ids, positions, next_token_targets(ids, positions)).logprobs


# --- what is trained


def test_all_linear_layers_but_the_head_by_default() -> None:
    model = build(lora())
    adapted = {n.split(".lora_A")[0].rpartition(".")[2] for n, p in model.named_parameters() if ".lora_A." in n}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert all((".lora_" in n) == p.requires_grad for n, p in model.named_parameters())


def test_a_name_alone_is_a_class() -> None:
    assert build("peft.LoraConfig").adapter.kind == "LORA"
    assert build("LoraConfig").adapter.kind == "LORA"
    assert build("BottleneckConfig").adapter.kind == "BOTTLENECK"


@pytest.mark.parametrize("adapter", [lora(), lora(use_dora=True), BOTTLENECK], ids=["lora", "dora", "bottleneck"])
def test_first_weights_depend_on_the_seed_alone(adapter: Any) -> None:
    torch.manual_seed(1)
    one = build(adapter).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with torch.device("meta"):  # as strategies call it
        other = build(adapter).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], other[name]) for name in one)
    different = build(adapter, seed=1).state_dict()
    assert not all(torch.equal(one[name], different[name]) for name in one)


@pytest.mark.parametrize("adapter", [lora(), lora(modules_to_save=["lm_head"]), BOTTLENECK])
@pytest.mark.parametrize(
    ("precision", "dtype", "base", "trained"),
    [
        ("bf16-mixed", None, torch.float32, torch.float32),
        ("bf16-mixed", "bfloat16", torch.bfloat16, torch.float32),
        ("bf16-true", None, torch.bfloat16, torch.bfloat16),
    ],
)
def test_dtypes(adapter: Any, precision: str, dtype: Any, base: torch.dtype, trained: torch.dtype) -> None:
    model = build(adapter, precision=precision, dtype=dtype)
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {trained}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {base}


@pytest.mark.parametrize("adapter", [lora(), lora(init_lora_weights="gaussian"), BOTTLENECK])
def test_an_untrained_adapter_changes_nothing(adapter: Any) -> None:
    plain = Backbone(config=TINY).build(tokenizer=byte_tokenizer(), sequence_length=16, seed=0)
    torch.testing.assert_close(logprobs(build(adapter)), logprobs(plain))


def test_lean_norms_and_mlps_stay_lean() -> None:
    hf = build(lora()).hf
    lean = [m for m in hf.modules() if "forward" in vars(m)]
    assert len(lean) == 2 * 3 + 1  # two norms and the MLP of each block, the last norm
    exact = stir(build(lora(), lean=False))
    torch.testing.assert_close(logprobs(stir(build(lora()))), logprobs(exact), rtol=1e-5, atol=1e-5)


# --- bottlenecks


def test_bottleneck_by_hand() -> None:
    model = build(BOTTLENECK)
    layer = model.hf.model.layers[0].mlp.down_proj
    torch.nn.init.ones_(layer.adapter_up.weight)
    hidden = torch.randn(3, 64)
    y = layer.base_layer(hidden)
    inner = torch.nn.functional.gelu(y @ layer.adapter_down.weight.T + layer.adapter_down.bias)
    torch.testing.assert_close(layer(hidden), y + inner.sum(-1, keepdim=True))
    assert sum(p.numel() for p in model.adapter.parameters()) == 4 * (2 * 4 * 32 + 4 + 32)  # of four projections


def test_bottleneck_leaves_and_comes_back(tmp_path: Path) -> None:
    model = stir(build(BOTTLENECK))
    save(model, BOTTLENECK, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "BOTTLENECK"
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(open_adapter(tmp_path).eval()(ids).logits, model.eval().hf(ids).logits)
    again = build(str(tmp_path))
    torch.testing.assert_close(logprobs(again), logprobs(model.train()))
    with pytest.raises(ValueError, match="BottleneckConfig cannot be merged: it is not linear"):
        model.adapter.merge()


def save(model: CausalLM, adapter: Any, folder: Path, **fields: Any) -> None:
    backbone = Backbone(**{"config": TINY, "adapter": adapter, **fields})
    save_adapted(model, backbone, folder, None, tokenizer=byte_tokenizer(), seed=0, precision="32-true")


# --- what is kept


@pytest.mark.parametrize("adapter", [lora(), lora(modules_to_save=["lm_head"]), BOTTLENECK])
def test_state_holds_what_is_trained_and_nothing_else(adapter: Any) -> None:
    model = stir(build(adapter))
    outer = torch.nn.ModuleDict({"model": model})  # as a LightningModule holds it
    state = {name: value.clone() for name, value in outer.state_dict().items()}
    trained = {f"model.{name}" for name, p in model.named_parameters() if p.requires_grad}
    assert state.keys() == trained
    other = torch.nn.ModuleDict({"model": build(adapter)})
    assert not torch.equal(logprobs(other["model"]), logprobs(model))
    other.load_state_dict(state)
    assert torch.equal(logprobs(other["model"]), logprobs(model))
    state.pop(sorted(state)[0])
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


@pytest.fixture
def mesh() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("spread", [False, True], ids=["plain", "fsdp2"])
def test_pissa_rests_on_the_base_that_it_was_begun_on(spread: bool, mesh: Any) -> None:
    """On another machine the decomposition may come out otherwise; the trained model must not change."""
    adapter = lora(init_lora_weights="pissa")
    model = stir(build(adapter))
    weights, state = model.state_dict(), model.adapter.state()
    other = build(adapter)
    with torch.no_grad():  # as if singular vectors had come out rotated and with another rounding
        for name, p in other.hf.named_parameters():
            if ".lora_A." in name:
                layer: Any = other.hf.get_submodule(name.split(".lora_A.")[0])
                change = torch.zeros_like(p)
                change[0] = 0.01
                up = layer.lora_B["default"].weight
                layer.get_base_layer().weight.sub_(layer.scaling["default"] * up @ change)
                p.add_(change)
                other.adapter._first[name] = p.clone()
    assert other.adapter._first.keys() == model.adapter._first.keys()
    other.load_state_dict(weights)
    assert (logprobs(other) - logprobs(model)).abs().max() > 1e-4
    if spread:
        shard(other, other.blocks(), mesh)
    other.adapter.load_state(state)
    torch.testing.assert_close(logprobs(other), logprobs(model), rtol=1e-5, atol=1e-5)


def test_description_names_another_adapter_and_another_base() -> None:
    one = build(lora()).description()
    assert json.loads(json.dumps(one)) == one
    assert describe_difference(one, build(lora()).description()) == ""
    assert "adapter.r 4 -> 8" in describe_difference(one, build(lora(r=8)).description())
    other = describe_difference(one, build(lora(), seed=5).description())
    assert other.startswith("the adapter's base is random weights of seed 0 (weights ")
    assert "not random weights of seed 5" in other


def test_digest_sees_one_changed_weight() -> None:
    model = Backbone(config=TINY).build(tokenizer=byte_tokenizer(), sequence_length=16, seed=0)
    before = weights_digest(model.hf)
    assert weights_digest(model.hf) == before
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight[3, 7] += 1e-3
    assert weights_digest(model.hf) != before


# --- folders


def test_a_trained_adapter_is_gone_on_with(tmp_path: Path) -> None:
    base = Backbone(config=TINY).build(tokenizer=byte_tokenizer(), sequence_length=16, seed=0)
    base.save_pretrained(tmp_path / "base")
    model = stir(build(lora(), config=None, source=str(tmp_path / "base")))
    save(model, lora(), tmp_path / "adapter", config=None, source=str(tmp_path / "base"))
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        tmp_path / "base"
    )
    assert not (tmp_path / "adapter" / "base").exists()
    again = build(str(tmp_path / "adapter"), config=None, source=str(tmp_path / "base"))
    assert torch.equal(logprobs(again), logprobs(model))
    assert [n for n, p in again.named_parameters() if p.requires_grad]
    with pytest.raises(ValueError, match=r"the adapter's base is .*base.*, not random weights of seed 5"):
        build(str(tmp_path / "adapter"), seed=5)


def test_a_base_that_is_nowhere_else_comes_along(tmp_path: Path) -> None:
    from peft import AutoPeftModelForCausalLM

    model = stir(build(lora())).eval()
    save(model, lora(), tmp_path / "out")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        expected = model.hf(ids).logits
        plain = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-6, atol=1e-6)
        (tmp_path / "out").rename(tmp_path / "moved")
        torch.testing.assert_close(open_adapter(tmp_path / "moved").eval()(ids).logits, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
def test_virtual_tokens_are_gone_on_with_where_their_folder_holds_all(name: str, tmp_path: Path) -> None:
    adapter: Any = {"class_path": f"peft.{name}", "init_args": {"num_virtual_tokens": 4}}
    if name == "PromptEncoderConfig":
        adapter["init_args"]["encoder_hidden_size"] = 16
    model = stir(build(adapter))
    save(model, adapter, tmp_path)
    if name == "PromptEncoderConfig":
        with pytest.raises(ValueError, match="holds the virtual tokens, without the network that made them"):
            build(str(tmp_path))
        return
    again = build(str(tmp_path))
    assert torch.equal(logprobs(again), logprobs(model))
    logprobs(again).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in again.adapter.parameters())


def test_several_adapters_go_into_one_base(tmp_path: Path) -> None:
    """Folders of two runs on one base, side by side in plain peft."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    models = {"one": stir(build(lora())).eval(), "other": stir(build(lora(r=8, use_rslora=True))).eval()}
    for name, model in models.items():
        save(model, lora(), tmp_path / name)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "one" / "base")
    plain = PeftModel.from_pretrained(base, tmp_path / "one", adapter_name="one").eval()
    plain.load_adapter(tmp_path / "other", adapter_name="other")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        for name, model in models.items():
            plain.set_adapter(name)
            torch.testing.assert_close(plain(input_ids=ids).logits, model.hf(ids).logits, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["PrefixTuningConfig", "PromptTuningConfig", "PromptEncoderConfig"])
def test_generation_with_virtual_tokens(name: str, tmp_path: Path) -> None:
    """Greedy answers are the most likely tokens under the model that was trained; so are those of the folder."""
    from llm_modules.generation import Generator

    adapter = {"class_path": f"peft.{name}", "init_args": {"num_virtual_tokens": 4}}
    if name == "PromptEncoderConfig":
        adapter["init_args"]["encoder_hidden_size"] = 16
    model = build(adapter)
    with torch.no_grad():
        for p in model.adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    tokenizer = byte_tokenizer()
    generator = Generator(max_new_tokens=6, logprobs=True)
    prompts: Any = ["hello", "a longer prompt"]
    answers = generator.generate(model, tokenizer, prompts)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = tokenizer(prompt)["input_ids"]
        with torch.no_grad():
            total = 0.0
            for token in answer.token_ids:
                row = torch.tensor([ids])
                logits = model.hf.lm_head(model.hidden_states(row, torch.arange(len(ids))[None])[0, -1])
                assert int(logits.argmax()) == token
                total += float(logits.log_softmax(-1)[token])
                ids = [*ids, token]
        assert answer.logprob == pytest.approx(total, abs=1e-3)
    save(model, adapter, tmp_path)
    opened = generator.generate(open_adapter(tmp_path), tokenizer, prompts)
    assert [a.token_ids for a in opened] == [a.token_ids for a in answers]


# --- what is said before there are weights


def test_summary_counts_what_is_trained() -> None:
    arguments = {"vocabulary": 260, "sequence_length": 16, "tokens": 64}
    whole = Backbone(config=TINY).summary(**arguments)
    backbone = Backbone(config=TINY, adapter=lora())
    summary = backbone.summary(**arguments)
    model = build(lora())
    assert summary.trained == sum(p.numel() for p in model.adapter.parameters())
    assert summary.parameters == whole.parameters + summary.trained
    assert summary.memory.gradients == 4 * summary.trained
    assert summary.memory.optimizer == 8 * summary.trained
    assert f"trained     {summary.trained:,} (" in str(summary)
    assert summary.flops.training(16) == pytest.approx(model.flops_per_token(16))
    assert summary.flops.training(16) < 0.75 * whole.flops.training(16)


def test_summary_of_a_quantized_base() -> None:
    pytest.importorskip("bitsandbytes")
    arguments = {"vocabulary": 260, "sequence_length": 16, "tokens": 64, "precision": "bf16-mixed"}
    sizes = {}
    for kind in (None, "int8", "nf4", "nf4-double"):
        backbone = Backbone(config=TINY, adapter=lora(), quantization=kind, dtype="bfloat16")  # type: ignore[arg-type]
        sizes[kind] = backbone.summary(**arguments).memory.weights
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert sizes[None] - sizes["int8"] == linear - 4 * 2 * (32 + 16 + 16 + 32 + 64 + 64 + 32)
    assert sizes["nf4-double"] < sizes["nf4"] < sizes["int8"]


# --- AdaLoRA


def test_adalora_prunes_to_its_budget() -> None:
    adapter = {"class_path": "peft.AdaLoraConfig", "init_args": {"init_r": 4, "target_r": 2, "tfinal": 2}}
    model = build(adapter)
    model.adapter.begin(8)
    optimizer = torch.optim.AdamW(model.adapter.parameters(), lr=1e-2)
    for step in range(8):
        (-logprobs(model).sum() + model.adapter.penalty()).backward()
        optimizer.step()
        model.adapter.after_step(step)
        optimizer.zero_grad()
    left = [int((p != 0).sum()) for n, p in model.hf.named_parameters() if ".lora_E." in n]
    assert sum(left) == 2 * len(left)
    with pytest.raises(ValueError, match="tinit 0 and tfinal 2 leave none of the run's 2 steps for pruning"):
        model.adapter.begin(2)


# --- half precision


@pytest.mark.parametrize("name", ["LoraConfig", "VeraConfig", "AdaLoraConfig"])
def test_all_in_half_precision(name: str) -> None:
    model = build(f"peft.{name}", precision="bf16-true")
    torch.nn.Sequential(model).to(torch.bfloat16)  # as Lightning's half precision does, from outside
    logprobs(model).sum().backward()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert sum(float(p.grad.abs().sum()) for p in model.adapter.parameters()) > 0
    assert model.hf.model.rotary_emb.inv_freq.dtype == torch.float32


def test_experts_are_adapted_where_peft_can() -> None:
    family = {**TINY, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
    adapter = lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    model = stir(build(adapter, config=family))
    assert all(".experts." in n for n, p in model.named_parameters() if p.requires_grad)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        plain = Backbone(config=family).build(tokenizer=byte_tokenizer(), sequence_length=16, seed=0).eval()
        expected = model.eval().hf(ids).logits
        assert (plain.hf(ids).logits - expected).abs().max() > 1e-3
        model.adapter.merge()
        torch.testing.assert_close(model.hf(ids).logits, expected, rtol=1e-6, atol=1e-6)
