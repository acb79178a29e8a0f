"""The shipped data configs on the real sets: they load, nothing in them is fatal, and their masks are right."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import yaml

from llm_modules.data.conversation_encoding import ConversationEncoder
from llm_modules.data.sources import DATA_VARIABLE, Source
from llm_modules.data.templates import TEMPLATES
from llm_modules.tokenizer import byte_tokenizer

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")

needs_data = [
    pytest.mark.data,
    pytest.mark.skipif(
        not os.environ.get(DATA_VARIABLE), reason=f"needs real data sets: set {DATA_VARIABLE} to their folder"
    ),
]


def parsed(name: str, **settings):
    from jsonargparse import ArgumentParser
    from lightning.pytorch import LightningDataModule

    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    assert list(config) == ["data"]
    config["data"]["init_args"] |= {"tokenizer": "builtin:bytes", "sequence_length": 1024} | settings
    parser = ArgumentParser()
    parser.add_subclass_arguments(LightningDataModule, "data")
    return parser.instantiate(parser.parse_object(config)).data


@pytest.mark.parametrize("name", NAMES)
def test_every_config_parses_and_says_what_it_is(name, tmp_path):
    first, second, third = (CONFIGS / f"{name}.yaml").read_text().splitlines()[:3]
    assert re.match(r"# [A-Z\d].{20,}\.$", first)
    assert second.startswith("# Use: ")
    assert f"-c data/{name}`" in second
    assert third.startswith("# Needs: ")
    assert (DATA_VARIABLE in third) == ("data:" in str(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())))
    parsed(name, cache_dir=str(tmp_path))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_data) for name in NAMES])
def test_every_set_loads_and_nothing_is_fatal(name, cache):
    datamodule = parsed(name, cache_dir=cache)
    for source in [*datamodule.sources, *(datamodule.validation_sources or [])]:
        source.limit = 20 if source.path == "builtin:python-docs" else 200
    datamodule.prepare_data()
    datamodule.setup("fit")
    report = datamodule.audit(color=False)
    assert report.fatal == []
    assert report.trained > 1000
    assert report.documents["validation"] > 0
    assert report.endless == 0
    batch = next(iter(datamodule.train_dataloader()))
    assert batch.window["tokens"] > 0
    hashes = datamodule.corpus.hashes
    train, held_out = (set(hashes[datamodule.corpus.documents[part]]) for part in ("train", "validation"))
    assert not train & held_out


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=needs_data)
        for path in (
            "dolly/train.jsonl",
            "oasst1_val/chat.jsonl",
            "sgd_dialogues/chat.jsonl",
            "toolcall_chat/chat.jsonl",
        )
    ],
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_masks_on_real_conversations_equal_those_of_generation_tags(path, name):
    """transformers' own masks of the tagged template, against rendering with the same template without tags."""
    rows = list(Source(f"data:{path}", limit=60).rows())
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<|eot_id|>", "<end_of_turn>"], special_tokens=True)
    tokenizer.chat_template = TEMPLATES[name]
    if path.startswith("toolcall_chat") and "tools" not in TEMPLATES[name]:
        with pytest.raises(ValueError, match=r"chat\.jsonl:\d+: has tools, and the chat template leaves them out"):
            ConversationEncoder(tokenizer)(rows)
        for row in rows:
            row.columns["tools"] = "[]"
    tagged = ConversationEncoder(tokenizer)(rows)
    tokenizer.chat_template = GENERATION.sub("", TEMPLATES[name])
    plain = ConversationEncoder(tokenizer)(rows)
    assert plain.tokens.tolist() == tagged.tokens.tolist()
    assert plain.trained.tolist() == tagged.trained.tolist()
    assert plain.counts == tagged.counts
    assert plain.trained.any()
    assert not plain.trained.all()
