"""Folders of adapters through the command: several in one base, which take turns; broken ones; of another base."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llm_modules.tokenizer import byte_tokenizer
from recipes.__main__ import main

peft = pytest.importorskip("peft")

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
}
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"


def write_adapter(base: Path, folder: Path, seed: int, config: Any) -> None:
    """As plain peft writes it, with weights as after much training; and the whole model, merged by plain peft."""
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    write_tokenizer(folder)
    if config.peft_type == "LORA":
        merged = folder.with_name(f"{folder.name}-merged")
        model.merge_and_unload().save_pretrained(merged)
        write_tokenizer(merged)


def write_tokenizer(folder: Path, template: str = TEMPLATE) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and adapters in it: a and b of LoRA, c of IA3."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=260, eos_token_id=256, **SIZES))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
        model.lm_head.weight[94:] = 0  # it says printable ASCII, without end
    model.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    for seed, name in enumerate("ab"):
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
        write_adapter(folder / "base", folder / name, seed, lora)
    write_adapter(folder / "base", folder / "c", 3, peft.IA3Config(task_type="CAUSAL_LM"))
    return folder


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LITRECIPES_RUN_FOLDER", raising=False)
    for path in made.iterdir():
        Path(path.name).symlink_to(path)


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["generate", *words, "--prompt", "say it", "--max_new_tokens", "12"]) == 0
    return capsys.readouterr().out


def test_each_adapter_says_what_it_says_alone(capsys: pytest.CaptureFixture[str]) -> None:
    alone = {name: answer(capsys, "-m", f"{name}-merged") for name in "ab"}
    assert alone["a"] != alone["b"]
    both = ["--adapter", "one=a", "--adapter", "two=b"]
    assert answer(capsys, "-m", "base", *both) == alone["a"]
    assert answer(capsys, "-m", "base", *both, "--use", "two") == alone["b"]
    assert answer(capsys, "-m", "a", "--adapter", "two=b") == alone["b"]
    assert answer(capsys, "-m", "a", "--adapter", "two=b", "--use", "default") == alone["a"]


def test_they_take_turns_in_a_conversation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    alone = {name: answer(capsys, "-m", f"{name}-merged").rstrip("\n") for name in "ab"}
    lines = [
        "say it",
        "/reset",
        "/adapter two",
        "say it",
        "/adapter three",
        "/reset",
        "/adapter one",
        "say it",
        "/quit",
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(lines) + "\n"))
    words = ["--adapter", "one=a", "--adapter", "two=b", "--max_new_tokens", "12"]
    assert main(["generate", "-m", "base", *words]) == 0
    said = capsys.readouterr().out
    places = [said.index(alone["a"]), said.index("(adapter: two)"), said.index(alone["b"])]
    assert [*places, said.index("(there are: one, two)"), said.rindex(alone["a"])] == sorted(
        [*places, said.index("(there are: one, two)"), said.rindex(alone["a"])]
    )
    assert said.index(alone["a"]) < said.rindex(alone["a"])


def test_answers_to_a_file_go_on_with_the_same_adapter_only(capsys: pytest.CaptureFixture[str]) -> None:
    Path("in.jsonl").write_text('{"prompt": "say it"}\n')
    words = ["generate", "-m", "base", "--file", "in.jsonl", "--out", "out.jsonl", "--max_new_tokens", "4"]
    both = ["--adapter", "one=a", "--adapter", "two=b"]
    assert main([*words, *both]) == 0
    assert main([*words, "--adapter", "one=a"]) == 0  # what else is in the base makes no difference
    assert main([*words, *both, "--use", "two"]) == 2
    assert "made by other settings or another model" in capsys.readouterr().err


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before = sorted(Path.cwd().rglob("*"))
    capsys.readouterr()
    assert main([*words]) == 2
    error = capsys.readouterr().err
    said = [line for line in error.splitlines() if line.startswith("recipes: ")]
    assert len(said) == 1, error
    assert "Traceback" not in error
    assert sorted(Path.cwd().rglob("*")) == before
    return said[0]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--adapter", "a"], "--adapter a: NAME=FOLDER is wanted"),
        (["--adapter", "x=a", "--adapter", "x=b"], "there is an adapter x already"),
        (["--adapter", "x=nowhere/at/all"], "--adapter x=nowhere/at/all: no such folder"),
        (["--adapter", "x=base"], "--adapter x=base: a whole model, no adapter"),
        (["--adapter", "x=a", "--use", "y"], "--use y: no such adapter; there are: x"),
        (["--use", "y"], "--use y: no such adapter; there are: none"),
        (
            ["--adapter", "x=a", "--adapter", "z=c"],
            "adapters of several kinds cannot be in one base: x is LORA, z is IA3",
        ),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert message in refused(capsys, "generate", "-m", "base", *words, "--prompt", "x")


def test_adapters_of_other_conversations_do_not_take_turns(capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree("b", "other")
    write_tokenizer(Path("other"), TEMPLATE.replace("\n", " "))
    words = ["generate", "-m", "base", "--adapter", "x=a", "--adapter", "y=other", "--prompt", "x"]
    assert "adapter y has another tokenizer or chat template than the one that answers" in refused(capsys, *words)


# --- folders that are broken, or of another base


RECIPE: dict[str, Any] = {
    "seed_everything": 7,
    "tokenizer": "builtin:bytes",
    "sequence_length": 32,
    "model": {
        "class_path": "llm_modules.LanguageModelModule",
        "init_args": {
            "backbone": {"source": "base"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
        },
    },
    "data": {
        "class_path": "llm_modules.data.TextDataModule",
        "init_args": {"sources": [{"path": "rows.jsonl"}], "batch_size": 2, "validation_fraction": 0.2},
    },
    "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
}


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])


def lacks_a_weight(path: Path) -> None:
    state = load_file(path)
    save_file(dict(list(state.items())[1:]), path, metadata={"format": "pt"})


@pytest.fixture
def tiny() -> list[str]:
    Path("rows.jsonl").write_text("".join(json.dumps({"text": f"row {n} " * 9}) + "\n" for n in range(30)))
    Path("tiny.yaml").write_text(yaml.safe_dump(RECIPE))
    return ["fit", "-c", "tiny", "--model.backbone.adapter"]


@pytest.mark.parametrize(
    ("file", "damage", "messages"),
    [
        ("adapter_model.safetensors", cut, ["adapter_model.safetensors in 'broken' is broken: "]),
        ("adapter_config.json", cut, ["adapter_config.json in 'broken': "]),
        (
            "adapter_model.safetensors",
            Path.unlink,
            ["no adapter_model.safetensors in 'broken'", "broken: no weights in this folder"],
        ),
        ("base.json", cut, ["base.json in 'broken' is broken: "]),
    ],
    ids=["weights", "config", "no-weights", "base"],
)
def test_a_broken_folder_is_one_line(
    file: str, damage: Any, messages: list[str], tiny: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("a", "broken")
    Path("broken/base.json").write_text(json.dumps({"source": "base", "digest": "0", "quantization": None}))
    damage(Path("broken") / file)
    assert messages[0] in refused(capsys, *tiny, "broken")
    words = ["generate", "-m", "base", "--adapter", "x=broken", "--prompt", "x"]
    assert messages[-1] in refused(capsys, *words)


def test_an_adapter_on_another_base_does_not_speak(tiny: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Of the same shape, so that nothing but the weights tells it; and of another one."""
    assert main([*tiny, "peft.LoraConfig"]) == 0
    run = next(Path("runs/tiny").iterdir())
    shutil.copytree("base", "changed")
    state = load_file("changed/model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] + 0.1
    save_file(state, "changed/model.safetensors", metadata={"format": "pt"})
    words = ["generate", "--prompt", "x", "--max_new_tokens", "2"]
    assert main([*words, "-m", str(run)]) == 0
    error = refused(capsys, *words, "-m", "changed", "--adapter", f"x={run}")
    assert "the adapter's base is '" in error
    assert ", not 'changed' (weights " in error
    lacks_a_weight(run / "export/adapter_model.safetensors")
    assert "is of another layout than its base" in refused(capsys, *words, "-m", "base", "--adapter", f"x={run}")
    wide = LlamaForCausalLM(LlamaConfig(vocab_size=260, **SIZES | {"hidden_size": 48, "num_attention_heads": 6}))
    wide.save_pretrained("wide")
    write_tokenizer(Path("wide"))
    assert "a: does not fit this base: " in refused(capsys, *words, "-m", "wide", "--adapter", "x=a")
    tiny[-1:] = ["--model.backbone", "{source: wide, adapter: a}"]
    assert main(tiny) == 2
    assert "backbone.adapter: 'a' does not fit this base: " in capsys.readouterr().err
