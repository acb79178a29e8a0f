"""Every shipped recipe: its header, its merge, and two steps of it on a tiny model and tiny data."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.__main__ import main
from recipes.compose import compose
from recipes.config_names import STAGES, all_recipes, config_name, read_header, shipped_configs
from recipes.yaml_tree import read_yaml

ROOT = shipped_configs()
RECIPES = [path for stage in STAGES for path in sorted((ROOT / stage).rglob("*.yaml"))]
TRAINED = [path for path in RECIPES if path.relative_to(ROOT).parts[0] != "generate"]
PARTS = [path for path in sorted(ROOT.rglob("*.yaml")) if path not in RECIPES]
FOLDERS = {*STAGES, "engines", "evaluation", "models", "data", "strategies", "precision", "loggers", "adapters"}
TINY = {
    "config": {
        "model_type": "llama",
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
    }
}
TEXT = [{"text": f"row number {i}, " * (20 + i % 30)} for i in range(300)]
CHAT = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i} " * 9}]}
    for i in range(300)
]
PAIRS = [
    {"prompt": f"say {i}", "chosen": f"it is {i} " * 4, "rejected": "no", "chosen_safe": True, "rejected_safe": False}
    for i in range(300)
]
PROMPTS = [{"prompt": f"say {i}", "reference": str(i)} for i in range(300)]
KINDS = {
    "TextDataModule": TEXT,
    "ConversationDataModule": CHAT,
    "PreferenceDataModule": PAIRS,
    "PromptDataModule": PROMPTS,
    "PrepromptDataModule": CHAT,
    "LabelledDataModule": PAIRS,
}


def names(paths: list[Path]) -> list[Any]:
    return [pytest.param(path, id=config_name(path)) for path in paths]


def test_there_are_no_other_folders() -> None:
    assert {path.parent.relative_to(ROOT).parts[0] for path in [*RECIPES, *PARTS]} <= FOLDERS
    assert RECIPES


@pytest.mark.parametrize("path", names([*RECIPES, *PARTS]))
def test_it_begins_with_what_it_is(path: Path) -> None:
    header = read_header(path)
    assert header[""].endswith((".", ")")), "a first line that says what it does"
    if path in PARTS:
        return
    for word in ("command", "needs", "expect"):
        assert header.get(word), f"`# {word.capitalize()}:` is missing"
    assert config_name(path) in header["command"]


@pytest.mark.parametrize("path", names([*RECIPES, *PARTS]))
def test_it_is_yaml_with_known_keys(path: Path) -> None:
    if path in TRAINED:
        assert {"model", "data", "trainer"} <= compose([str(path)]).values.keys()
    else:
        assert isinstance(read_yaml(path).value, dict)


def test_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert {config_name(path) for path in RECIPES} <= {recipe.name for recipe in all_recipes()}


def tiny_data(path: Path) -> dict[str, Any]:
    """The recipe's data module with rows of ours, in the shape that it reads."""
    data = compose([str(path)]).values["data"]
    rows = KINDS[data["class_path"].rpartition(".")[2]]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments: dict[str, Any] = {"sources": [{"path": "rows.jsonl"}], "validation_sources": None, "test_sources": None}
    if rows is not TEXT and data["init_args"].get("chat_template") is None:
        arguments["chat_template"] = "chatml"  # the recipe's tokenizer, which is not here, brings one
    if rows is PROMPTS:
        arguments["longest_prompt"] = 100
    alone = not data["class_path"].endswith("LabelledDataModule")  # KTO compares the answers of a step
    return {"init_args": {**arguments, "batch_size": 1 if alone else 2}}


def save_reward_model(folder: str) -> None:
    from llm_modules import RewardModule
    from llm_modules.zoo import Backbone

    module = RewardModule(Backbone(**TINY))
    module.configure_model()
    module.tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    module.export(folder)


@pytest.mark.slow
@pytest.mark.parametrize("path", names(TRAINED))
def test_two_steps(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    overlay = {
        "tokenizer": "builtin:bytes",
        "sequence_length": 128,
        "data": tiny_data(path),
        "trainer": {
            "max_steps": 2,
            "max_epochs": None,
            "accumulate_grad_batches": 1,
            "val_check_interval": 2,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "accelerator": "cpu",
            "devices": 1,
            "enable_progress_bar": False,
        },
        "leave_out": ["ExportFolder"],
    }
    model = compose([str(path)]).values["model"]
    if model["class_path"].endswith("PolicyModule"):
        overlay["model"] = {"init_args": {"generator": {"max_new_tokens": 4}}}
        for kind in [*model["init_args"]["rewards"], *model["init_args"].get("costs", [])]:
            if kind["class_path"].endswith("ModelReward"):
                save_reward_model(kind["init_args"]["model"])
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(overlay))
    (tmp_path / "backbone.yaml").write_text(yaml.safe_dump(TINY))
    words = ["-c", str(path), "-c", "tiny.yaml", "--model.backbone", "backbone.yaml"]
    if "teacher" in compose([str(path)]).values["model"]["init_args"]:
        words += ["--model.teacher", "backbone.yaml"]
    assert main(["fit", *words]) == 0
    run = tmp_path / "runs" / config_name(path) / "0"
    assert len((run / "metrics.csv").read_text().splitlines()) == 3
    assert list((run / "checkpoints").glob("step-00000002.ckpt"))


@pytest.mark.slow
@pytest.mark.data
@pytest.mark.parametrize("path", names(sorted((ROOT / "data").glob("*.yaml"))))
def test_data_are_read(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first rows of each shipped data set, under a tiny model."""
    folder = Path(os.environ["LITRECIPES_DATA"]).absolute()
    monkeypatch.setenv("LITRECIPES_DATA", str(folder))
    monkeypatch.chdir(tmp_path)
    model = {"class_path": "llm_modules.LanguageModelModule", "init_args": {"backbone": TINY}}
    base = {"tokenizer": "builtin:bytes", "sequence_length": 4096, "model": model, "trainer": {"accelerator": "cpu"}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    arguments = compose([str(path)]).values["data"]["init_args"]
    limits = [
        word
        for part in ("sources", "validation_sources", "test_sources")
        for i in range(len(arguments.get(part) or []))
        for word in (f"--data.{part}.{i}.limit", "60")
    ]
    assert main(["fit", "-c", "base.yaml", "-c", str(path), *limits, "--data.batch_size", "1", "--dry-run"]) == 0
    assert "tokens: " in capsys.readouterr().err
