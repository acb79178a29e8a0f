"""Users' mistakes: each one line that says where and what, exit status 2, nothing written, nothing lost."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from recipes.__main__ import main

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def recipe(kind: str) -> dict[str, Any]:
    """A tiny recipe on ``rows.jsonl``."""
    more = {"chat_template": "chatml"} if kind == "Conversation" else {}
    return {
        "seed_everything": 7,
        "tokenizer": "builtin:bytes",
        "sequence_length": 48,
        "model": {
            "class_path": "llm_modules.LanguageModelModule",
            "init_args": {
                "backbone": {"config": LLAMA},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": f"llm_modules.data.{kind}DataModule",
            "init_args": {"sources": [{"path": "rows.jsonl"}], "batch_size": 2, "validation_fraction": 0.1} | more,
        },
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "devices": 1,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "checkpoint": {"every_n_steps": 2},
        "leave_out": ["ExportFolder"],
    }


TEXT = [{"text": f"row number {i}, " * (1 + i % 3)} for i in range(40)]
CHAT = [
    {"messages": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"it is {i}"}]}
    for i in range(40)
]


def write_rows(rows: list[Any], path: str = "rows.jsonl") -> None:
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with two recipes and data for the first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LITRECIPES_RUN_FOLDER", raising=False)
    for name, kind in (("text", "Text"), ("chat", "Conversation")):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe(kind), sort_keys=False))
    write_rows(TEXT)
    for name in ("tokenizer", "model"):
        (tmp_path / "mine" / name).mkdir(parents=True)
    return tmp_path


class Refused:
    """Runs a command that must be refused and checks all that a refusal promises."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self.capsys = capsys

    def __call__(self, *words: str, lines: int = 1, verb: str = "fit") -> str:
        before = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        self.capsys.readouterr()
        assert main([verb, *words]) == 2
        message = self.capsys.readouterr().err
        said = [line for line in message.splitlines() if line.startswith("recipes: ")]
        assert len(said) == lines, message
        assert message.rstrip().endswith(said[-1])
        assert "Traceback" not in message
        after = {path: path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}
        assert after == before
        return "\n".join(line.removeprefix("recipes: ") for line in said)


@pytest.fixture
def refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    return Refused(folder, capsys)


LEARNING_RATE = "model.init_args.optimizer.init_args.lr"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        # unknown keys, at every depth, with the nearest match
        (["--modle.x", "1"], "--modle.x: unknown key `modle` (did you mean `model`?); allowed: seed_everything, "),
        (["--trainer.max_step", "1"], "--trainer.max_step: unknown key `trainer.max_step` (did you mean `max_steps`?)"),
        (["--checkpoint.every_n_step", "1"], "(did you mean `every_n_steps`?); `checkpoint` has every_n_steps, "),
        (["--model.backbon.compile", "true"], "`model.init_args.backbon` (did you mean `backbone`?)"),
        (["--model.backbone.compil", "true"], "`model.init_args.backbone.compil` (did you mean `compile`?)"),
        (["--model.optimizer.learning_rate", "1"], "`AdamW` has lr, "),
        (["--data.sources.0.pth", "x"], "`data.init_args.sources.0.pth` (did you mean `path`?); `Source` has "),
        # wrong types and values
        (
            ["--trainer.max_steps", "many"],
            "--trainer.max_steps: `trainer.max_steps` is 'many'; allowed: a whole number",
        ),
        (["--sequence_length", "1.5"], "--sequence_length: `sequence_length` is 1.5; allowed: a whole number or null"),
        (["--data.batch_size", "[2]"], "`data.init_args.batch_size` is [2]; allowed: a whole number"),
        (["--model.optimizer.lr", "fast"], f"--model.optimizer.lr: `{LEARNING_RATE}` is 'fast'; allowed: "),
        (["--model.optimizer.lr", "-1"], f"--model.optimizer.lr: `{LEARNING_RATE}`: Invalid learning rate: -1.0"),
        (["--model.backbone.init", "zero"], "is 'zero'; allowed: pretrained or random or null"),
        (
            ["--model.backbone.config", "{model_type: stablelm}"],
            "data.packing: not for 'stablelm' with attention 'packed': ",
        ),
        (["--data.packing", "tight"], "is 'tight'; allowed: documents or chunks or batch or none"),
        (["--trainer.precision", "8"], "`trainer.precision` is 8; allowed: "),
        (["--data.sources", "rows.jsonl"], "--data.sources: `data.init_args.sources` is 'rows.jsonl'; allowed: a list"),
        (
            ["--model.backbone", "3"],
            "--model.backbone: `model.init_args.backbone` is 3; allowed: a mapping of source, ",
        ),
        (["--model.backbone", "null"], "--model.backbone: `model.init_args.backbone` is None; allowed: a mapping of "),
        (["--leave_out", "[Troughput]"], "is 'Troughput'; allowed: Throughput or "),
        (["--data.batch_size", "0"], "data.batch_size: 0 is below 1"),
        (["--checkpoint.every_n_steps", "-1"], "checkpoint.every_n_steps: -1 is not allowed; 0 or more"),
        (["--seed_everything=-1"], "--seed_everything: `seed_everything` is -1; allowed: 0 to 4294967295"),
        (["--seed_everything", "x"], "`seed_everything` is 'x'; allowed: "),
        # classes
        (["--model.objective", "my_los.MyLoss"], "there is no module `my_los`; the working directory and installed"),
        (["--model.objective", "llm_modules.objectives.NextTokn"], "has no `NextTokn` (did you mean `NextToken`?)"),
        (["--model.objective", "torch.nn.Linear"], "is torch.nn.Linear, which is no LanguageObjective"),
        (["--model.optimizer", "AdmW"], "no class is named `AdmW` (did you mean `AdamW`?)"),
        (["--model", "llm_modules.Modul"], "module `llm_modules` has no `Modul`"),
        (["--model", "{class_path: 3}"], "`model.class_path` is 3; the name of a class is asked for: module.Class"),
        # what does not go together
        (["--data.seed", "3"], "`data.init_args.seed` is 3, but `seed_everything` (text.yaml:1), which model and data"),
        (
            ["--trainer.val_check_interval", "3", "--trainer.accumulate_grad_batches", "2"],
            "--trainer.val_check_interval: `trainer.val_check_interval` is 3 micro-batches, which is no multiple of "
            "`trainer.accumulate_grad_batches`, 2; write 4",
        ),
        (["--trainer.default_root_dir", "x"], "`trainer.default_root_dir` has no effect; runs are written below"),
        (["--sequence_length", "65"], "max_position_embeddings"),
        (["--model.backbone.config.vocab_size", "100"], "100"),
        (["--model.backbone.config.model_type", "lama"], "lama"),
        (["--model.backbone.source", "no/such/folder"], "no/such/folder"),
        (["--tokenizer", "no-such-folder"], "no-such-folder"),
        (["--tokenizer", "mine/toknizer"], "no folder 'mine/toknizer' (did you mean 'tokenizer'?); mine is a folder"),
        (["--tokenizer", "runs/letters"], "tokenizer: no folder 'runs/letters'; allowed: a folder"),
        (["--model.backbone", "{source: mine/modl}"], "backbone.source: no folder 'mine/modl' (did you mean 'model'?)"),
        (["--trainer.accelerator", "gpu"], "gpu"),
        # files
        (["--data.sources.0.path", "nothing.jsonl"], "nothing.jsonl"),
        (["--data.sources.0.path", "*.csv"], "*.csv"),
        (["-c", "nothing.yaml"], "nothing.yaml: no such config; looked in "),
        (["--ckpt_path", "nothing.ckpt"], "--ckpt_path nothing.ckpt: no such file; `last` continues the newest run"),
        (
            ["--data.sources", "[{pth: rows.jsonl}]"],
            "`data.init_args.sources.0.pth` (did you mean `path`?); `Source` has",
        ),
        (["--ckpt_path", "best"], "--ckpt_path best: runs/text has no unfinished run"),
        (["--ckpt_path", "last"], "runs/text has no unfinished run"),
        (["--run", "4"], "--run 4: runs/text has no run 4; there are: none"),
    ],
)
def test_config(words: list[str], message: str, refused: Refused) -> None:
    assert message in refused("-c", "text", *words)


def test_all_problems_are_said_at_once(refused: Refused) -> None:
    words = ("--trainer.max_step", "1", "--model.backbone.compil", "1", "--data.batch_size", "x")
    message = refused("-c", "text", *words, lines=3)
    assert "max_step" in message
    assert "compil" in message
    assert "batch_size" in message


def test_a_key_in_a_file_is_named_with_its_line(refused: Refused) -> None:
    Path("over.yaml").write_text("# An overlay.\ntrainer:\n  max_steps: 1\n  devics: 2\n")
    assert refused("-c", "text", "-c", "over").startswith("over.yaml:4: unknown key `trainer.devics` (did you mean")


def test_a_missing_argument(refused: Refused) -> None:
    Path("over.yaml").write_text("data: {class_path: llm_modules.data.TokenDataModule, init_args: {batch_size: 2}}\n")
    assert "`data.init_args.sources` is missing; `TokenDataModule` needs it" in refused("-c", "text", "-c", "over")


def test_no_model(refused: Refused) -> None:
    assert "`model`" in refused("-c", "precision/32-true")


class TestRows:
    """What may be wrong with the data."""

    def test_an_empty_file(self, refused: Refused) -> None:
        Path("rows.jsonl").write_text("")
        assert "rows.jsonl" in refused("-c", "text")

    def test_a_line_that_is_no_json(self, refused: Refused) -> None:
        lines = [json.dumps(row) for row in TEXT]
        lines[6] = '{"text": "cut off'
        Path("rows.jsonl").write_text("\n".join(lines))
        assert "rows.jsonl:7" in refused("-c", "text")

    def test_a_missing_column_names_what_is_there(self, refused: Refused) -> None:
        write_rows([{"body": "x", "title": "y"}] * 9)
        message = refused("-c", "text")
        for word in ("text", "body", "title"):
            assert word in message

    def test_a_mapped_column_that_is_missing(self, refused: Refused) -> None:
        message = refused("-c", "text", "--data.sources.0.columns", "{text: content}")
        assert "content" in message

    def test_wrong_encoding(self, refused: Refused) -> None:
        Path("rows.jsonl").write_bytes('{"text": "gr\xfc\xdfe"}\n'.encode("latin-1") * 9)
        message = refused("-c", "text")
        assert "rows.jsonl" in message
        assert "UTF-8" in message or "utf-8" in message

    def test_a_conversation_that_starts_with_the_assistant(self, refused: Refused) -> None:
        write_rows([*CHAT[:3], {"messages": [{"role": "assistant", "content": "hello"}]}])
        message = refused("-c", "chat")
        assert "rows.jsonl:4" in message
        assert "assistant" in message

    def test_an_unknown_role(self, refused: Refused) -> None:
        write_rows([*CHAT[:3], {"messages": [{"role": "usr", "content": "x"}, {"role": "assistant", "content": "y"}]}])
        message = refused("-c", "chat")
        assert "rows.jsonl:4" in message
        assert "usr" in message

    def test_no_trained_token(self, refused: Refused) -> None:
        write_rows([{"messages": [{"role": "user", "content": f"only asked {i}"}]} for i in range(9)])
        message = refused("-c", "chat")
        assert "trained" in message or "assistant" in message

    def test_rows_that_are_too_long_are_an_error_if_so_asked(self, refused: Refused) -> None:
        long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 500}]}
        write_rows([*CHAT, long])
        message = refused("-c", "chat", "--data.too_long", "error")
        assert "sequence_length" in message or "48" in message

    def test_or_counted(self, capsys: pytest.CaptureFixture[str]) -> None:
        long = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a" * 500}]}
        write_rows([*CHAT, long, long])
        for policy in ("truncate", "drop"):
            assert main(["fit", "-c", "chat", "--sequence_length", "64", "--data.too_long", policy, "--dry-run"]) == 0
            report = capsys.readouterr().err
            assert any(line.rstrip().endswith(": 2") for line in report.splitlines()), report

    def test_token_ids_outside_of_the_vocabulary(self, refused: Refused) -> None:
        assert "vocab" in refused("-c", "text", "--model.backbone.config.vocab_size", "200")


def test_a_tokenizer_without_chat_template(refused: Refused, folder: Path) -> None:
    from llm_modules.tokenizer import load_tokenizer

    write_rows(CHAT)
    tokenizer = load_tokenizer("builtin:bytes")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(str(folder / "bare"))
    message = refused("-c", "chat", "--tokenizer", "bare", "--data.chat_template", "null")
    assert "chat_template" in message


class TestCheckpoints:
    """A run of two steps, and then what can happen to its checkpoint."""

    @pytest.fixture
    def checkpoint(self) -> Path:
        assert main(["fit", "-c", "text"]) == 0
        Path("runs/text/0/finished").unlink()
        return Path("runs/text/0/checkpoints/step-00000002.ckpt")

    def test_of_another_model(self, checkpoint: Path, refused: Refused) -> None:
        words = ("--model.backbone.config.intermediate_size", "40", "--ckpt_path", str(checkpoint))
        message = refused("-c", "text", *words)
        assert "intermediate_size" in message
        assert "32" in message
        assert "40" in message

    def test_truncated(self, checkpoint: Path, refused: Refused) -> None:
        checkpoint.write_bytes(checkpoint.read_bytes()[:-2000])
        message = refused("-c", "text", "--ckpt_path", str(checkpoint))
        assert "step-00000002.ckpt" in message

    def test_a_pickle_that_executes_code(self, checkpoint: Path, refused: Refused, folder: Path) -> None:
        class Malicious:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (folder / "executed",)

        whole = torch.load(checkpoint, weights_only=True)
        torch.save({**whole, "extra": Malicious()}, "bad.ckpt")
        message = refused("-c", "text", "--ckpt_path", "bad.ckpt")
        assert "bad.ckpt" in message
        Path("worse.ckpt").write_bytes(pickle.dumps(Malicious()))
        assert "worse.ckpt" in refused("-c", "text", "--ckpt_path", "worse.ckpt")
        assert not (folder / "executed").exists()

    def test_not_of_ours(self, refused: Refused) -> None:
        torch.save({"state_dict": {}}, "other.ckpt")
        assert "not a checkpoint" in refused("-c", "text", "--ckpt_path", "other.ckpt")

    def test_a_full_disk_while_saving(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        (folder / "full_disk_of_a_test.py").write_text(
            "import resource\n"
            "from lightning.pytorch import Callback\n\n\n"
            "class FullDisk(Callback):\n"
            "    def on_train_batch_start(self, trainer, module, batch, batch_idx):\n"
            "        if trainer.global_step == 3:\n"
            "            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)\n"
            "            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))\n"
        )
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        words = ("--trainer.callbacks", "[full_disk_of_a_test.FullDisk]", "--trainer.logger", "false")
        try:
            assert main(["fit", "-c", "text", "--trainer.max_steps", "6", *words]) == 2
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("recipes: ")
        assert "step-00000004.ckpt" in message
        left = sorted(path.name for path in Path("runs/text/0/checkpoints").iterdir())
        assert left == ["last.ckpt", "step-00000002.ckpt"]
        assert main(["fit", "-c", "text", "--trainer.max_steps", "6", "--ckpt_path", "last"]) == 0
        assert Path("runs/text/0/checkpoints/step-00000006.ckpt").exists()


def test_what_is_left_by_hand_is_not_touched(refused: Refused, folder: Path) -> None:
    """A refused command removes the folder that it made, and no other."""
    (folder / "runs/text/0").mkdir(parents=True)
    (folder / "runs/text/0/notes.txt").write_text("mine")
    refused("-c", "text", "--trainer.limit_train_batches", "0.00001")
    assert (folder / "runs/text/0/notes.txt").read_text() == "mine"
    assert sorted(path.name for path in (folder / "runs/text").iterdir()) == ["0"]
    shutil.rmtree(folder / "runs")
