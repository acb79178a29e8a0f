"""Backbone: what it builds, what it refuses, and what leaves as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from llm_modules.logprobs import next_token_targets
from llm_modules.tokenizer import byte_tokenizer
from llm_modules.zoo import Backbone, CausalLM, describe_difference

MODELS = Path(__file__).parents[2] / "configs" / "models"
TINY: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def build(backbone: Backbone, seed: int = 0, precision: str = "32-true", tokenizer: Any = None) -> CausalLM:
    return backbone.build(tokenizer=tokenizer or byte_tokenizer(), sequence_length=16, seed=seed, precision=precision)


def scores(model: CausalLM, **options: Any) -> Any:
    ids = torch.arange(24).view(2, 12)
    positions = torch.arange(12).expand(2, 12)
    return model(ids, positions, next_token_targets(ids, positions), **options)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    build(Backbone(config=TINY)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


# --- building


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    one = build(Backbone(config=TINY)).state_dict()
    torch.manual_seed(2)
    before = torch.get_rng_state()
    with torch.device("meta"):  # as strategies call it
        other = build(Backbone(config=TINY)).state_dict()
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not torch.equal(one["hf.lm_head.weight"], build(Backbone(config=TINY), seed=1).hf.lm_head.weight)


def test_default_dtype_of_a_strategy_does_not_round_the_weights() -> None:
    one = build(Backbone(config=TINY)).state_dict()
    torch.set_default_dtype(torch.bfloat16)
    try:
        other = build(Backbone(config=TINY)).state_dict()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("precision", "dtype", "expected"),
    [
        ("bf16-mixed", None, torch.float32),
        ("32-true", None, torch.float32),
        ("bf16-true", None, torch.bfloat16),
        ("bf16-mixed", "bfloat16", torch.bfloat16),
        ("32-true", "bfloat16", torch.bfloat16),
    ],
)
def test_dtype(precision: str, dtype: Any, expected: torch.dtype, folder: Path) -> None:
    for backbone in (Backbone(config=TINY, dtype=dtype), Backbone(source=str(folder), dtype=dtype)):
        model = build(backbone, precision=precision)
        assert {p.dtype for p in model.parameters()} == {expected}
        assert model.hf.model.rotary_emb.inv_freq.dtype == torch.float32


def test_pretrained_weights_of_half_precision_are_trained_in_full(folder: Path) -> None:
    half = build(Backbone(source=str(folder), dtype="bfloat16"))
    half.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    model = build(Backbone(source=str(folder)), precision="bf16-mixed")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_rotary_frequencies_stay_exact_when_a_precision_casts_the_model() -> None:
    model = build(Backbone(config=TINY))
    before = model.hf.model.rotary_emb.inv_freq.clone()
    torch.nn.Sequential(model).to(torch.bfloat16)  # as Lightning's half precision does, from outside
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.equal(model.hf.model.rotary_emb.inv_freq, before)


def test_vocabulary_of_a_preset_is_the_tokenizers_rounded_up() -> None:
    assert build(Backbone(config=TINY)).hf.config.vocab_size == 320  # 260 tokens
    assert build(Backbone(config={**TINY, "vocab_size": 261})).hf.config.vocab_size == 261


def test_special_tokens() -> None:
    tokenizer = byte_tokenizer()
    hf = build(Backbone(config=TINY), tokenizer=tokenizer).hf
    for config in (hf.config, hf.generation_config):
        assert (config.eos_token_id, config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    tokenizer.pad_token = tokenizer.eos_token
    hf = build(Backbone(config=TINY), tokenizer=tokenizer).hf
    assert hf.generation_config.pad_token_id == tokenizer.eos_token_id
    assert hf.get_input_embeddings().padding_idx is None  # or the end of text would never be learnt


def test_end_of_text_that_pads_is_learnt(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": 256, "eos_token_id": 256}))
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = build(Backbone(source=str(folder)), tokenizer=tokenizer)
    ids = torch.tensor([[5, tokenizer.eos_token_id, 7, 8]])
    model(ids, torch.arange(4)[None], next_token_targets(ids, torch.arange(4)[None])).logprobs.sum().backward()
    assert model.hf.get_input_embeddings().weight.grad[tokenizer.eos_token_id].abs().sum() > 0


def test_generation_keeps_a_models_other_ends(folder: Path) -> None:
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [259, 100_000]}))
    hf = build(Backbone(source=str(folder))).hf
    assert hf.generation_config.eos_token_id == [256, 259]


@pytest.mark.parametrize("tied", [True, False])
def test_new_tokens_start_at_the_mean(tmp_path: Path, tied: bool, caplog: pytest.LogCaptureFixture) -> None:
    values = {**TINY, "vocab_size": 264, "tie_word_embeddings": tied}
    before = build(Backbone(config=values))
    before.save_pretrained(tmp_path)
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(10)])  # 270
    after = build(Backbone(source=str(tmp_path)), tokenizer=tokenizer)
    assert "264 embedding rows for 270 tokens grew to 320" in caplog.text
    assert after.hf.config.vocab_size == 320
    rows = [(m.hf.get_input_embeddings().weight, m.hf.get_output_embeddings().weight) for m in (before, after)]
    for old, new in zip(*rows, strict=True):
        assert torch.equal(new[:264], old)
        torch.testing.assert_close(new[264:], old.mean(0).expand(56, -1))
    assert (rows[1][0] is rows[1][1]) == tied


def test_a_random_model_of_a_source_has_room_for_the_tokenizer(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([f"<new{i}>" for i in range(100)])  # 360
    weight = build(Backbone(source=str(folder), init="random"), tokenizer=tokenizer).hf.lm_head.weight
    assert weight.shape[0] == 384
    assert weight[330:].std() > 0.01


def test_overrides_of_a_source(folder: Path) -> None:
    model = build(Backbone(source=str(folder), config={"max_position_embeddings": 4096}))
    assert model.hf.config.max_position_embeddings == 4096


@pytest.mark.parametrize("head", ["plain", "chunked"])
@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "phi"])
def test_heads_agree(head: Any, kind: str) -> None:
    values = {**TINY, "model_type": kind}
    values |= {"gemma2": {"final_logit_softcapping": 0.5}, "granite": {"logits_scaling": 0.1}}.get(kind, {})
    exact = build(Backbone(config=values, head="plain"))
    model = build(Backbone(config=values, head=head, head_chunk=5))
    for options in ({}, {"uniform": True}, {"statistics": True}):
        expected, got = scores(exact, **options), scores(model, **options)
        weights = torch.linspace(1, 2, len(got.logprobs)) if "uniform" not in options else torch.ones(len(got.logprobs))
        for one, other in ((exact, expected), (model, got)):
            one.zero_grad()
            total = (other.logprobs * weights).sum()
            if options == {"statistics": True}:
                total = total + other.log_normalizer.square().sum() + other.mean_logprob.sum()
            total.backward()
        torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=1e-5, atol=1e-6)
        for p, q in zip(model.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5 * q.grad.abs().max().item() + 1e-8)


def test_only_trained_positions_are_scored() -> None:
    model = build(Backbone(config=TINY))
    ids = torch.arange(12)[None]
    targets = torch.full((1, 12), -100)
    targets[0, 3], targets[0, 9] = 7, 8
    got = model(ids, torch.arange(12)[None], targets)
    assert got.index.tolist() == [3, 9]
    logprobs = model.hf(ids).logits[0].log_softmax(-1)
    torch.testing.assert_close(got.logprobs, logprobs[[3, 9], [7, 8]])


def test_a_batch_without_targets_has_a_zero_gradient() -> None:
    model = build(Backbone(config=TINY))
    got = model(torch.arange(12)[None], torch.arange(12)[None], torch.full((1, 12), -100), uniform=True)
    got.logprobs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_activation_checkpointing_changes_nothing_but_memory(kind: str) -> None:
    values = {**TINY, "model_type": kind}
    if kind == "gpt2":
        values = {"model_type": kind, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        values |= {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    gradients, kept = [], []
    for checkpointing in (False, True):
        model = build(Backbone(config=values, activation_checkpointing=checkpointing)).train()
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: s.append(t.numel()) or t, lambda t: t):
            total = scores(model).logprobs.sum()
        total.backward()
        gradients.append([p.grad for p in model.parameters()])
        kept.append(sum(saved))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert kept[1] < kept[0] / 2


# --- leaving


@pytest.mark.parametrize("preset", ["llama-1m", "gpt2-tiny", "gemma2-tiny", "gemma3-tiny", "qwen3-tiny", "olmo2-tiny"])
def test_an_exported_folder_is_an_ordinary_one(preset: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = build(Backbone(**yaml.safe_load((MODELS / f"{preset}.yaml").read_text())))
    model.save_pretrained(tmp_path)
    assert "packed" not in (tmp_path / "config.json").read_text()
    assert (tmp_path / "model.safetensors").is_file()
    assert json.loads((tmp_path / "generation_config.json").read_text())["eos_token_id"] == 256
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config._attn_implementation != "packed"
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.hf.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_description_names_what_differs() -> None:
    one = build(Backbone(config=TINY)).description()
    same = build(Backbone(config=TINY, activation_checkpointing=True), seed=5, precision="bf16-true").description()
    assert describe_difference(one, same) == ""
    wider = build(Backbone(config={**TINY, "hidden_size": 64, "head_dim": 8})).description()
    assert "hidden_size 32 -> 64" in describe_difference(one, wider)
    other = build(Backbone(config={**TINY, "model_type": "qwen3"})).description()
    assert describe_difference(one, other).startswith("model_type llama -> qwen3")
    assert json.loads(json.dumps(one)) == one


def test_description_is_that_of_the_reloaded_folder(folder: Path) -> None:
    """A checkpoint of a run from a preset goes on from its exported folder, and the other way round."""
    one = build(Backbone(config=TINY)).description()
    assert describe_difference(one, build(Backbone(source=str(folder))).description()) == ""


# --- presets


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_preset_is_read(path: Path) -> None:
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) <= 120
    config = Backbone(**yaml.safe_load(path.read_text())).check(vocabulary=260, sequence_length=512)
    assert config.vocab_size == 320


# --- mistakes


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither source nor config"),
        ({"config": {"hidden_size": 32}}, "no model_type"),
        ({"config": {"model_type": "lama"}}, "no causal language model 'lama' in transformers; did you mean 'llama'"),
        ({"config": {**TINY, "hiden_size": 3}}, "unknown key 'hiden_size' of 'llama'; did you mean 'hidden_size'"),
        ({"config": {**TINY, "hidden_size": "wide"}}, "'hidden_size' expected int"),
        ({"config": {**TINY, "hidden_size": 33}}, "hidden size .33. is not a multiple"),
        ({"config": {**TINY, "vocab_size": 100}}, "vocab_size: 100, but the tokenizer has 260 tokens"),
        (
            {"config": {**TINY, "max_position_embeddings": 8}},
            "sequence_length: 16 tokens, but the model has 8 positions",
        ),
        ({"config": {**TINY, "attention_dropout": 0.1}}, "attention_dropout: 0.1, but .* has no dropout"),
        ({"config": TINY, "attention": "packd"}, "attention: unknown value 'packd'; did you mean 'packed'"),
        ({"config": TINY, "head": "chunk"}, "head: unknown value 'chunk'; allowed: chunked, plain, liger"),
        ({"config": TINY, "head_chunk": 0}, "head_chunk: 0"),
        ({"config": TINY, "dtype": "bf16"}, "dtype: unknown value 'bf16'"),
        ({"config": TINY, "init": "pretrained"}, "there is no source"),
        ({"source": "./nowhere"}, "no folder './nowhere'"),
        ({"source": "nobody/nothing"}, "cannot open 'nobody/nothing'"),
    ],
)
def test_mistakes_are_one_line_before_any_weight(
    fields: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_modules.zoo.weights.random_model", None)
    monkeypatch.setattr("llm_modules.zoo.weights.pretrained_model", None)
    with pytest.raises(ValueError, match=message) as caught:
        build(Backbone(**fields))
    assert len(str(caught.value).splitlines()) == 1


def test_several_mistakes_are_told_at_once() -> None:
    values = {**TINY, "vocab_size": 100, "max_position_embeddings": 8}
    with pytest.raises(ValueError, match=r"8 positions.*100, but the tokenizer has 260 tokens"):
        build(Backbone(config=values))


def test_gpt2_calls_its_positions_otherwise() -> None:
    values = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 8, "attn_pdrop": 0.0}
    with pytest.raises(ValueError, match=r"raise backbone.config.n_positions"):
        build(Backbone(config=values))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_liger_without_cuda_is_refused() -> None:
    with pytest.raises(ValueError, match="liger needs a CUDA device"):
        build(Backbone(config=TINY, head="liger"))


def test_dtype_that_contradicts_the_precision() -> None:
    with pytest.raises(ValueError, match=r"float32, but trainer.precision bf16-true means bfloat16"):
        build(Backbone(config=TINY, dtype="float32"), precision="bf16-true")


def test_folder_without_safetensors(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"no \*.safetensors in .*only pytorch_model.bin, which could execute code"):
        build(Backbone(source=str(folder)))
    build(Backbone(source=str(folder), init="random"))


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config.json"):
        build(Backbone(source=str(tmp_path)))


def test_folder_with_broken_weights(folder: Path) -> None:
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="cannot load weights") as caught:
        build(Backbone(source=str(folder)))
    assert len(str(caught.value).splitlines()) == 1


def test_folder_that_lacks_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights: model.layers.1.mlp.up_proj.weight"):
        build(Backbone(source=str(folder)))


def test_code_of_a_source_is_not_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ValueError, match="trust_remote_code: true"):
        build(Backbone(source=str(folder)))
    assert not (tmp_path / "ran").exists()
