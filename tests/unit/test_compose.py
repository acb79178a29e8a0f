"""Merging of configs: the rules that configs/README.md states, worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recipes.compose import compose
from recipes.errors import UserError

BASE = """\
# A recipe.
seed_everything: 1
model:
  class_path: a.Model
  init_args:
    size: 3
    optimizer:
      class_path: torch.optim.AdamW
      init_args: {lr: 1e-3, eps: 1e-8}
data:
  class_path: a.Data
  init_args:
    batch_size: 8
    sources: [{path: one.jsonl}, {path: two.jsonl}]
trainer:
  max_steps: 10
  callbacks: [first]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def merged(overlay: str = "", *overrides: tuple[str, str]) -> dict[str, Any]:
    names = ["base.yaml"]
    if overlay:
        Path("over.yaml").write_text(overlay)
        names.append("over.yaml")
    return compose(names, overrides).values


def refused(overlay: str = "", *overrides: tuple[str, str]) -> str:
    with pytest.raises(UserError) as error:
        merged(overlay, *overrides)
    return str(error.value)


def test_mappings_merge_and_lists_replace() -> None:
    values = merged("trainer: {devices: 2, callbacks: [second]}")
    assert values["trainer"] == {"max_steps": 10, "devices": 2, "callbacks": ["second"]}


def test_numbers_are_numbers() -> None:
    optimizer = merged()["model"]["init_args"]["optimizer"]["init_args"]
    assert optimizer == {"lr": 0.001, "eps": 1e-08}
    assert merged("", ("trainer.max_time", "2020-01-01"))["trainer"]["max_time"] == "2020-01-01"


@pytest.mark.parametrize("name", ["base", "base.yaml", "./base"])
def test_a_name_is_a_path_with_or_without_suffix(name: str) -> None:
    assert compose([name]).name == "base"


def test_own_configs_are_found_before_the_shipped_ones(folder: Path) -> None:
    (folder / "configs/precision").mkdir(parents=True)
    (folder / "configs/precision/bf16-mixed.yaml").write_text("trainer: {precision: own}")
    assert compose(["base", "precision/bf16-mixed"]).values["trainer"]["precision"] == "own"
    assert compose(["base", "precision/32-true"]).values["trainer"]["precision"] == "32-true"


@pytest.mark.parametrize(
    ("overlay", "callbacks"),
    [
        ("trainer: {callbacks+: [second, third]}", ["first", "second", "third"]),
        ("trainer: {callbacks+: second}", ["first", "second"]),
        ("trainer: {callbacks+: []}", ["first"]),
    ],
)
def test_plus_appends(overlay: str, callbacks: list[str]) -> None:
    assert merged(overlay)["trainer"]["callbacks"] == callbacks


def test_plus_on_nothing_is_a_list_of_its_own_and_later_ones_go_on() -> None:
    values = merged("trainer: {logger+: [one]}", ("trainer.logger+", "[two]"), ("trainer.callbacks+", "[x]"))
    assert values["trainer"]["logger"] == ["one", "two"]
    assert values["trainer"]["callbacks"] == ["first", "x"]


def test_plain_key_after_plus_replaces() -> None:
    assert merged("trainer: {logger+: [one]}", ("trainer.logger", "[two]"))["trainer"]["logger"] == ["two"]


def test_plus_on_what_is_no_list() -> None:
    message = refused("trainer: {max_steps+: [1]}")
    assert message == "over.yaml:1: `max_steps+` appends to a list, but `max_steps` (base.yaml:16) is no list"


def test_another_class_drops_the_arguments() -> None:
    overlay = "model: {init_args: {optimizer: {class_path: torch.optim.SGD, init_args: {momentum: 0.9}}}}"
    optimizer = merged(overlay)["model"]["init_args"]["optimizer"]
    assert optimizer == {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}


@pytest.mark.parametrize("key", ["model.optimizer.momentum", "model.init_args.optimizer.init_args.momentum"])
def test_flags_for_a_class_may_come_before_the_one_that_names_it(key: str) -> None:
    flags = [(key, "0.9"), ("model.optimizer.class_path", "Adam"), ("model.optimizer.class_path", "torch.optim.SGD")]
    optimizer = merged("", *flags)["model"]["init_args"]["optimizer"]
    assert optimizer == {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9}}
    whole = ("model.optimizer", "{class_path: torch.optim.Adam, init_args: {lr: 1.0}}")
    optimizer = merged("", *flags, whole)["model"]["init_args"]["optimizer"]
    assert optimizer == {"class_path": "torch.optim.Adam", "init_args": {"lr": 1.0}}


@pytest.mark.parametrize("name", ["torch.optim.AdamW", "AdamW"])
def test_the_same_class_keeps_them(name: str) -> None:
    values = merged("", ("model.optimizer", name))
    assert values["model"]["init_args"]["optimizer"]["init_args"]["lr"] == 0.001


def test_a_class_of_the_same_name_elsewhere_is_another() -> None:
    values = merged("", ("model.optimizer", "bitsandbytes.optim.AdamW"))
    assert values["model"]["init_args"]["optimizer"] == {"class_path": "bitsandbytes.optim.AdamW"}


def test_a_class_in_the_place_of_a_word_and_back() -> None:
    Path("one.yaml").write_text("trainer: {strategy: auto}")
    Path("two.yaml").write_text("trainer: {strategy: {class_path: x.Strategy, init_args: {a: 1}}}")
    Path("three.yaml").write_text("trainer: {strategy: ddp}")
    assert compose(["base", "one", "two"]).values["trainer"]["strategy"]["class_path"] == "x.Strategy"
    assert compose(["base", "one", "two", "three"]).values["trainer"]["strategy"] == "ddp"


@pytest.mark.parametrize("key", ["data.batch_size", "data.init_args.batch_size"])
def test_init_args_may_be_left_out_of_a_flag(key: str) -> None:
    assert merged("", (key, "4"))["data"]["init_args"]["batch_size"] == 4


def test_init_args_may_be_left_out_of_an_overlay() -> None:
    values = merged("model: {size: 5, optimizer: {lr: 2.0}}")["model"]
    assert values["class_path"] == "a.Model"
    assert values["init_args"]["size"] == 5
    assert values["init_args"]["optimizer"]["init_args"] == {"lr": 2.0, "eps": 1e-08}


def test_arguments_for_a_class_that_is_only_named() -> None:
    values = merged("", ("model.objective", "my_loss.MyLoss"), ("model.objective.factor", "2"))
    assert values["model"]["init_args"]["objective"] == {"class_path": "my_loss.MyLoss", "init_args": {"factor": 2}}


def test_flags_come_last_and_in_order() -> None:
    assert merged("trainer: {max_steps: 20}", ("trainer.max_steps", "30"), ("trainer.max_steps", "40")) == {
        **merged(),
        "trainer": {"max_steps": 40, "callbacks": ["first"]},
    }


def test_a_flag_reaches_into_a_list() -> None:
    sources = merged("", ("data.sources.1.path", "new.jsonl"))["data"]["init_args"]["sources"]
    assert sources == [{"path": "one.jsonl"}, {"path": "new.jsonl"}]
    assert "`5` is not one of its items (0 to 1)" in refused("", ("data.sources.5.path", "x"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("3", 3), ("-1", -1), ("1e-3", 0.001), ("true", True), ("null", None), ("a b", "a b"), ("", ""), ("[1]", [1])],
)
def test_flags_are_read_as_yaml(text: str, value: object) -> None:
    assert merged("", ("trainer.x", text))["trainer"]["x"] == value


class TestFiles:
    @pytest.fixture(autouse=True)
    def parts(self, folder: Path) -> None:
        (folder / "parts/deep").mkdir(parents=True)
        (folder / "parts/small.yaml").write_text("config: {layers: 2, width: 8}\nhead: chunked\n")
        (folder / "parts/large.yaml").write_text("config: {layers: 4}\n")
        (folder / "parts/deep/nested.yaml").write_text("inner: ../small.yaml\n")

    def test_a_file_stands_for_its_content_relative_to_who_names_it(self, folder: Path) -> None:
        (folder / "parts/recipe.yaml").write_text("model: {class_path: a.M, init_args: {backbone: small.yaml}}")
        values = compose(["parts/recipe"]).values["model"]["init_args"]["backbone"]
        assert values == {"config": {"layers": 2, "width": 8}, "head": "chunked"}

    def test_files_name_files(self) -> None:
        values = merged("model: {backbone: parts/deep/nested.yaml}")["model"]["init_args"]["backbone"]
        assert values == {"inner": {"config": {"layers": 2, "width": 8}, "head": "chunked"}}

    def test_a_file_can_be_overridden_on_top(self) -> None:
        overlay = "model: {backbone: parts/small.yaml}"
        values = merged(overlay, ("model.backbone.config.layers", "3"))["model"]["init_args"]["backbone"]
        assert values == {"config": {"layers": 3, "width": 8}, "head": "chunked"}

    def test_plus_changes_a_file_where_it_is_named(self) -> None:
        overlay = "model: {backbone+: {config: {layers: 3}}, backbone: parts/small.yaml}"
        values = merged(overlay)["model"]["init_args"]["backbone"]
        assert values == {"config": {"layers": 3, "width": 8}, "head": "chunked"}

    def test_a_file_replaces_it_does_not_merge(self) -> None:
        overlay = "model: {backbone: parts/small.yaml}"
        values = merged(overlay, ("model.backbone", "parts/large.yaml"))["model"]["init_args"]["backbone"]
        assert values == {"config": {"layers": 4}}

    def test_shipped_parts_are_found_by_name(self) -> None:
        values = merged("", ("model.backbone", "models/llama-1m.yaml"))["model"]["init_args"]["backbone"]
        assert values["config"]["model_type"] == "llama"

    def test_paths_stay_paths(self) -> None:
        values = merged("data: {sources: [{path: rows.yaml}], template_file: x.yaml}")["data"]["init_args"]
        assert values["sources"] == [{"path": "rows.yaml"}]
        assert values["template_file"] == "x.yaml"

    def test_a_missing_file(self) -> None:
        message = refused("model:\n  backbone: parts/smal.yaml")
        assert message.startswith("over.yaml:2: parts/smal.yaml: no such config")

    def test_a_circle(self, folder: Path) -> None:
        (folder / "parts/a.yaml").write_text("next: b.yaml")
        (folder / "parts/b.yaml").write_text("next: a.yaml")
        assert "refers to itself" in refused("model: {backbone: parts/a.yaml}")


class TestLinks:
    def test_what_is_shared_reaches_both(self) -> None:
        values = merged("tokenizer: builtin:bytes\nsequence_length: 64")
        for part in ("model", "data"):
            arguments = values[part]["init_args"]
            assert (arguments["seed"], arguments["tokenizer"], arguments["sequence_length"]) == (1, "builtin:bytes", 64)

    def test_a_contradiction_names_both_places(self) -> None:
        message = refused("sequence_length: 64\ndata: {sequence_length: 128}")
        assert message == (
            "over.yaml:2: `data.init_args.sequence_length` is 128, but `sequence_length` (over.yaml:1), which model "
            "and data share, is 64; set `sequence_length` alone"
        )

    def test_an_agreement_is_none(self) -> None:
        assert merged("sequence_length: 64\ndata: {sequence_length: 64}")["data"]["init_args"]["sequence_length"] == 64

    def test_without_a_shared_value_each_may_have_its_own(self) -> None:
        values = merged("data: {tokenizer: x}\nmodel: {tokenizer: y}")
        assert values["data"]["init_args"]["tokenizer"] == "x"
        assert values["model"]["init_args"]["tokenizer"] == "y"


class TestInterpolation:
    def test_of_keys_long_and_short(self) -> None:
        values = merged("", ("trainer.a", "${data.init_args.batch_size}"), ("trainer.b", "n${model.optimizer.lr}"))
        assert (values["trainer"]["a"], values["trainer"]["b"]) == (8, "n0.001")

    def test_of_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STEPS", "7")
        monkeypatch.delenv("NOT_THERE", raising=False)
        values = merged("", ("trainer.a", "${oc.env:STEPS}"), ("trainer.b", "${oc.env:NOT_THERE,default}"))
        assert (values["trainer"]["a"], values["trainer"]["b"]) == ("7", "default")

    def test_shared_values_are_filled_in_too(self) -> None:
        values = merged("sequence_length: ${data.batch_size}")
        assert values["model"]["init_args"]["sequence_length"] == 8

    @pytest.mark.parametrize("text", ["${nowhere.at.all}", "${oc.env:LITRECIPES_NOT_SET}"])
    def test_of_what_is_not_there(self, text: str) -> None:
        message = refused(f"trainer:\n  a: {text}")
        assert message.startswith(f"over.yaml:2: `trainer.a` is '{text}': ")
        assert "\n" not in message


class TestOrigins:
    def test_every_value_knows_its_place(self) -> None:
        Path("over.yaml").write_text("\ntrainer:\n  devices: 2\nmodel: {backbone: models/llama-1m.yaml}\n")
        composed = compose(["base", "over"], [("data.batch_size", "4")])
        assert str(composed.origin(("trainer", "max_steps"))) == "base.yaml:16"
        assert str(composed.origin(("trainer", "devices"))) == "over.yaml:3"
        assert str(composed.origin(("data", "init_args", "batch_size"))) == "--data.batch_size"
        assert str(composed.origin(("data", "init_args", "sources", 1, "path"))) == "base.yaml:14"
        layers = composed.origin(("model", "init_args", "backbone", "config", "hidden_size"))
        assert layers.file is not None
        assert layers.file.name == "llama-1m.yaml"

    def test_of_what_is_not_there_the_nearest(self) -> None:
        assert str(compose(["base"]).origin(("trainer", "nothing", "below"))) == "base.yaml:15"


@pytest.mark.parametrize(
    ("overlay", "start"),
    [
        ("trainer:\n  devices: 1\n  devices: 2", "over.yaml:3: `devices` is set a second time (first on line 2)"),
        ("trainer: {a: [1, 2}", "over.yaml:1: not valid YAML: "),
        ("trainer:\n\tdevices: 1", "over.yaml:2: not valid YAML: "),
        ("- 1", "over.yaml:1: a config is a mapping of keys, not a list"),
        ("# nothing", "over.yaml:1: the file is empty"),
        (
            "trainer: !!python/object:os.system {}",
            "over.yaml:1: not valid YAML: the tag tag:yaml.org,2002:python/object:os.system",
        ),
        ("a: &a [*a]", "over.yaml:1: not valid YAML: "),
        ("trainr: {}", "over.yaml:1: unknown key `trainr` (did you mean `trainer`?); allowed: seed_everything, "),
        ("? [1]\n: 2", "over.yaml:1: a key must be a word"),
    ],
)
def test_bad_files_are_refused_in_one_line(overlay: str, start: str) -> None:
    message = refused(overlay)
    assert message.startswith(start)
    assert "\n" not in message


def test_bad_bytes() -> None:
    Path("over.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(UserError, match=r"over\.yaml: not UTF-8 text \(byte 3\)"):
        compose(["base", "over"])


def test_an_unknown_name_has_a_nearest() -> None:
    with pytest.raises(
        UserError, match=r"precision/bf16-mixd: no such config \(did you mean `precision/bf16-mixed`\?\)"
    ):
        compose(["precision/bf16-mixd"])


def test_anchors_and_merge_keys_work() -> None:
    values = merged("trainer: {plugins: &a {x: 1, y: 2}, profiler: {<<: *a, y: 3}}")
    assert values["trainer"]["profiler"] == {"x": 1, "y": 3}


def test_a_runs_own_config_keeps_its_name(folder: Path) -> None:
    run = folder / "runs/sft/mine/0"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(BASE)
    (run / "environment.json").write_text('{"recipe": "sft/mine"}')
    assert compose([str(run / "config.yaml")]).name == "sft/mine"
