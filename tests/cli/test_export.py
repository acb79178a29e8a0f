"""`recipes export`: from a run's checkpoints to a folder that transformers opens alone."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.__main__ import main

RECIPE = """
# A tiny chat model.
seed_everything: 7
tokenizer: builtin:bytes
sequence_length: 96
runs_dir: RUNS
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: MODEL, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 256, tie_word_embeddings: TIED}
    optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 1.0e-2}}
data:
  class_path: llm_modules.data.ConversationDataModule
  init_args:
    sources: [{path: ROWS}]
    chat_template: chatml
    batch_size: 2
    validation_fraction: 0.2
    cache_dir: CACHE
trainer:
  accelerator: cpu
  max_steps: 6
  log_every_n_steps: 1
  val_check_interval: 2
  enable_progress_bar: false
checkpoint: {every_n_steps: 1, keep_last: 3}
"""


def train(folder: Path, model="llama", tied="true") -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": "word " * (n % 5 + 1)}]}
        for n in range(40)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    values = {"RUNS": folder / "runs", "ROWS": folder / "rows.jsonl", "CACHE": folder / "cache"}
    text = RECIPE
    for name, value in {**values, "MODEL": model, "TIED": tied}.items():
        text = text.replace(name, str(value))
    (folder / "tiny.yaml").write_text(text)
    assert main(["fit", "-c", str(folder / "tiny.yaml")]) == 0
    return folder / "runs" / "tiny" / "0"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"))


def checkpoint_logits(path, ids):
    """Logits of a checkpoint's weights in a model built from the recipe's own config."""
    from llm_modules.tokenizer import byte_tokenizer
    from llm_modules.zoo import Backbone

    checkpoint = torch.load(path, weights_only=True)
    config = checkpoint["litrecipes"]["config"]
    names = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "max_position_embeddings", "tie_word_embeddings")
    backbone = Backbone(config={name: config[name] for name in names})
    model = backbone.build(tokenizer=byte_tokenizer(), sequence_length=96, seed=0)
    model.load_state_dict({n.removeprefix("model."): v for n, v in checkpoint["state_dict"].items()}, strict=False)
    with torch.no_grad():
        return model.eval().hf(ids).logits


IDS = torch.tensor([[258, *range(40, 60), 259, 1, 2]])


def newest(run):
    return sorted((run / "checkpoints").glob("step-*.ckpt"))[-1]


def test_the_folder_has_the_same_logits_in_transformers_alone(run, tmp_path, capsys):
    out = tmp_path / "model"
    assert main(["export", str(newest(run)), str(out)]) == 0
    assert "parameters of" in capsys.readouterr().out
    # In a process that knows nothing of this project.
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        f"m = M.from_pretrained({str(out)!r}).eval(); t = T.from_pretrained({str(out)!r})\n"
        "ids = t.apply_chat_template([{'role': 'user', 'content': 'hi'}], add_generation_prompt=True)['input_ids']\n"
        f"torch.save((m(torch.tensor({IDS.tolist()})).logits.detach(), ids, m.generation_config.eos_token_id,"
        f" m.config._attn_implementation), {str(tmp_path / 'x.pt')!r})\n"
        "assert not [name for name in sys.modules if name.startswith(('llm_modules', 'recipes', 'callbacks'))]"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    logits, ids, ends, attention = torch.load(tmp_path / "x.pt")
    torch.testing.assert_close(logits, checkpoint_logits(newest(run), IDS), atol=1e-6, rtol=1e-5)
    assert ids[0] == 258  # <|im_start|>: the chat template came along
    assert ends == [256, 259]  # <|endoftext|> and <|im_end|>
    assert attention != "packed"


def test_what_is_in_the_folder(run, tmp_path):
    out = tmp_path / "model"
    assert main(["export", str(run), str(out), "--which", "last"]) == 0
    files = {path.name for path in out.iterdir()}
    wanted = "config.json generation_config.json model.safetensors tokenizer.json tokenizer_config.json README.md"
    assert files == {*wanted.split(), "chat_template.jinja"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert "packed" not in (out / "config.json").read_text()
    assert all(value.dtype == torch.float32 for value in load_file(out / "model.safetensors").values())
    card = (out / "README.md").read_text()
    checkpoint = torch.load(newest(run), weights_only=True)
    tokens = f"{checkpoint['litrecipes']['tokens_seen']:,}"
    for text in (
        "tiny",
        "Optimizer steps: 6",
        f"Tokens seen: {tokens}",
        "rows.jsonl",
        "val/loss",
        "seed_everything: 7",
    ):
        assert text in card, text


def test_a_run_gives_its_best_checkpoint_then_its_last(run, tmp_path):
    best = (run / "checkpoints" / "best.ckpt").resolve()
    assert main(["export", str(run), str(tmp_path / "best")]) == 0
    assert f"Optimizer steps: {int(best.stem.removeprefix('step-'))}" in (tmp_path / "best" / "README.md").read_text()
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    (copy / "checkpoints" / "best.ckpt").unlink()
    assert main(["export", str(copy), str(tmp_path / "last")]) == 0
    assert "Optimizer steps: 6" in (tmp_path / "last" / "README.md").read_text()
    (copy / "config.yaml").unlink()  # the checkpoint suffices
    assert main(["export", str(copy), str(tmp_path / "alone")]) == 0
    same = [load_file(tmp_path / name / "model.safetensors") for name in ("last", "alone")]
    assert all(torch.equal(value, same[1][name]) for name, value in same[0].items())


def test_average_of_the_last_checkpoints(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "mean"), "--average", "3"]) == 0
    assert "the mean of 3 checkpoints" in capsys.readouterr().out
    got = load_file(tmp_path / "mean" / "model.safetensors")
    steps = sorted((run / "checkpoints").glob("step-*.ckpt"))[-3:]
    states = [torch.load(path, weights_only=True)["state_dict"] for path in steps]
    assert not torch.equal(states[0]["model.hf.model.norm.weight"], states[2]["model.hf.model.norm.weight"])
    for name, value in got.items():
        expected = sum(state[f"model.hf.{name}"].double() for state in states) / 3
        torch.testing.assert_close(value, expected.float())
    card = (tmp_path / "mean" / "README.md").read_text()
    assert "Weights: mean of 3 checkpoints" in card
    assert "## Metrics" not in card  # the mean was not measured
    assert main(["export", str(run), str(tmp_path / "x"), "--average", "9"]) == 2
    assert "--checkpoint.keep_last 9" in capsys.readouterr().err


def test_another_dtype(run, tmp_path):
    assert main(["export", str(run), str(tmp_path / "half"), "--dtype", "bfloat16"]) == 0
    weights = load_file(tmp_path / "half" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.bfloat16


@pytest.mark.parametrize(("model", "tied"), [("qwen3", "false"), ("gemma2", "true")])
def test_other_families_and_heads(tmp_path, model, tied):
    run = train(tmp_path, model, tied)
    assert main(["export", str(newest(run)), str(tmp_path / "out")]) == 0
    loaded, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    loaded.set_attn_implementation("eager")
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(IDS).logits, checkpoint_logits(newest(run), IDS), atol=1e-5, rtol=1e-5)
    assert main(["generate", "-m", str(tmp_path / "out"), "--prompt", "hi", "--max_new_tokens", "5"]) == 0


def assert_refused(words, message, capsys, out):
    before = sorted(out.parent.rglob("*"))
    capsys.readouterr()
    assert main(["export", *map(str, words)]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1, error
    assert message in error
    assert sorted(out.parent.rglob("*")) == before


def test_nothing_is_written_over(run, tmp_path, capsys):
    out = tmp_path / "place" / "model"
    out.mkdir(parents=True)
    assert main(["export", str(run), str(out)]) == 0  # empty
    first = (out / "README.md").read_text()
    assert_refused([run, out], "is there and not empty; name another folder, or --overwrite", capsys, out)
    (out / "mine.txt").write_text("mine")
    assert main(["export", str(run), str(out), "--overwrite", "--which", "last"]) == 0
    assert (out / "README.md").read_text() != first or not (out / "mine.txt").exists()
    assert [path.name for path in out.parent.iterdir()] == ["model"]
    (out / "config.json").unlink()
    assert_refused([run, out, "--overwrite"], "is no model folder", capsys, out)
    assert_refused([run, out / "README.md"], "a file; name a folder", capsys, out)


def test_a_full_disk_leaves_what_was_there(run, tmp_path, capsys, monkeypatch):
    out = tmp_path / "place" / "model"
    assert main(["export", str(run), str(out)]) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    import errno

    from transformers import PreTrainedTokenizerBase

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", full)
    assert_refused([run, out, "--overwrite"], "No space left on device; nothing was changed", capsys, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_bad_checkpoints_are_one_line(run, tmp_path, capsys):
    out = tmp_path / "place" / "model"
    out.parent.mkdir()
    good = newest(run)
    whole = torch.load(good, weights_only=True)
    files = {name: tmp_path / f"{name}.ckpt" for name in ("cut", "evil", "other", "keys", "newer", "foreign", "shape")}
    files["cut"].write_bytes(good.read_bytes()[:5000])
    torch.save({**whole, "extra": Malicious(tmp_path / "executed")}, files["evil"])
    torch.save({name: value for name, value in whole.items() if name != "litrecipes"}, files["other"])
    state = dict(whole["state_dict"])
    renamed = {name.replace("q_proj", "query"): value for name, value in state.items()}
    torch.save({**whole, "state_dict": renamed}, files["keys"])
    torch.save({**whole, "litrecipes": {**whole["litrecipes"], "format": 99}}, files["newer"])
    torch.save({**whole, "state_dict": {"encoder.weight": torch.zeros(2)}}, files["foreign"])
    shaped = {name: value[..., :3] if "q_proj" in name else value for name, value in state.items()}
    torch.save({**whole, "state_dict": shaped}, files["shape"])
    with (tmp_path / "plain.ckpt").open("wb") as file:
        pickle.dump(Malicious(tmp_path / "executed"), file)
    for words, message in (
        ([files["cut"], out], "truncated, damaged or no checkpoint"),
        ([files["evil"], out], "nothing of it was executed"),
        ([tmp_path / "plain.ckpt", out], "plain.ckpt"),
        ([files["other"], out], "not a checkpoint of LitRecipes"),
        ([files["keys"], out], "weights of another layout: missing model.layers.0.self_attn.q_proj.weight"),
        ([files["newer"], out], "made by a newer LitRecipes (format 99)"),
        ([files["foreign"], out], "holds no weights named model.hf.*"),
        ([files["shape"], out], "the weights do not fit the model"),
        ([tmp_path / "nothing", out], "no such checkpoint or run"),
        ([good.parent / "step-00000007.ckpt", out], "no such checkpoint (did you mean"),
        ([tmp_path, out], "no checkpoint in it"),
        ([good, out, "--which", "last"], "--which last: goes with a run's folder"),
        ([run, out, "--average", "0"], "--average 0: at least 1"),
        ([run, out, "--tokenizer", tmp_path / "gone"], "no folder"),
    ):
        assert_refused(words, message, capsys, out)
    assert not (tmp_path / "executed").exists()


def test_the_tokenizer_may_have_moved(run, tmp_path, capsys):
    whole = torch.load(newest(run), weights_only=True)
    moved = {**whole, "litrecipes": {**whole["litrecipes"], "tokenizer": str(tmp_path / "old")}}
    torch.save(moved, tmp_path / "moved.ckpt")
    out = tmp_path / "place" / "model"
    out.parent.mkdir()
    assert_refused([tmp_path / "moved.ckpt", out], "say where it is now with --tokenizer", capsys, out)
    assert main(["export", str(run), str(tmp_path / "model")]) == 0
    assert main(["export", str(tmp_path / "moved.ckpt"), str(out), "--tokenizer", str(tmp_path / "model")]) == 0
    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (out, tmp_path / "model")]
    assert templates[0] == templates[1]


def test_predict_writes_the_answers_to_the_held_out_prompts(run, tmp_path):
    """`recipes predict` says what `recipes generate` says of the exported checkpoint."""
    copy = tmp_path / "runs" / "tiny" / "0"
    shutil.copytree(run, copy, symlinks=True)
    recipe = run.parents[2] / "tiny.yaml"
    words = ["--ckpt_path", str(newest(run)), "--runs_dir", str(tmp_path / "runs")]
    assert main(["predict", "-c", str(recipe), *words, "--model.generator.max_new_tokens", "6"]) == 0
    (path,) = (tmp_path / "runs" / "tiny").glob("*/predictions.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) > 3
    assert [row["row"] for row in rows] == sorted(row["row"] for row in rows)
    assert all(row["prompt"][0]["content"].startswith("say") and row["reference"].startswith("word") for row in rows)
    assert main(["export", str(newest(run)), str(tmp_path / "model")]) == 0
    shutil.copy(path, tmp_path / "in.jsonl")
    files = ["--file", str(tmp_path / "in.jsonl"), "--out", str(tmp_path / "out.jsonl"), "--max_new_tokens", "6"]
    assert main(["generate", "-m", str(tmp_path / "model"), *files]) == 0
    answers = [json.loads(line)["completion"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert answers == [row["completion"] for row in rows]
