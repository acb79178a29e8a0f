"""`recipes generate` through its command line: one prompt, a file of prompts, a conversation on a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_modules.generation import Generator
from llm_modules.tokenizer import byte_tokenizer
from recipes.__main__ import main

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def save_model(folder, positions=256, template=CHATML):
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=positions,
            eos_token_id=256,
        )
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(12)
        model.lm_head.weight[94:] = 0  # it says printable ASCII, without end
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def opened(folder):
    from recipes.open_model import find_model, open_model

    return open_model(find_model(folder), "auto", "cpu")


def user(text):
    return [{"role": "user", "content": text}]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_one_prompt_goes_to_standard_output(folder, opened, capsys):
    assert main(["generate", "-m", folder, "--prompt", "hi", "--max_new_tokens", "12"]) == 0
    (expected,) = Generator(max_new_tokens=12).generate(*opened, [user("hi")])
    captured = capsys.readouterr()
    assert captured.out == expected.text + "\n"
    assert "stopped after max_new_tokens=12" in captured.err
    assert main(["generate", "-m", folder, "--prompt", "hi", "--max_new_tokens", "12", "--raw"]) == 0
    (raw,) = Generator(max_new_tokens=12).generate(*opened, ["hi"])
    assert capsys.readouterr().out == raw.text + "\n"
    assert raw.text != expected.text
    assert main(["generate", "-m", folder, "--prompt", "hi", "--system", "be kind", "--max_new_tokens", "12"]) == 0
    system = {"role": "system", "content": "be kind"}
    (kind,) = Generator(max_new_tokens=12).generate(*opened, [[system, *user("hi")]])
    assert capsys.readouterr().out == kind.text + "\n"


def test_settings_of_a_file_and_flags_over_them(folder, opened, capsys):
    flags = ["--max_new_tokens", "12", "--seed", "7", "--stop", "a", "--stop", "\n"]
    assert main(["generate", "-m", folder, "-c", "generate/sample", "--prompt", "hi", *flags]) == 0
    settings = {"temperature": 0.8, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.05}
    generator = Generator(strategy="sample", max_new_tokens=12, seed=7, stop=["a", "\n"], **settings)
    (expected,) = generator.generate(*opened, [user("hi")])
    assert capsys.readouterr().out == expected.text + "\n"


@pytest.mark.parametrize("name", ["greedy", "sample", "beam"])
def test_shipped_settings_run(folder, name, capsys):
    assert main(["generate", "-m", folder, "-c", f"generate/{name}", "--prompt", "x", "--max_new_tokens", "4"]) == 0
    assert capsys.readouterr().out


def test_a_run_folder_stands_for_its_export(tmp_path, capsys):
    save_model(tmp_path / "run" / "export")
    assert main(["generate", "-m", str(tmp_path / "run"), "--prompt", "x", "--max_new_tokens", "2"]) == 0


ROWS = [
    {"prompt": "alpha"},
    {"prompt": "a much longer prompt than the others are"},
    {"messages": [*user("hello"), {"role": "assistant", "content": "good day"}]},
    {"prompt": user("as messages")},
    {"prompt": "b"},
    {"prompt": "alpha"},
    {"prompt": "日本語"},
]


def test_a_file_of_prompts(folder, opened, tmp_path, capsys):
    write_rows(tmp_path / "in.jsonl", ROWS)
    out = tmp_path / "new" / "out.jsonl"
    command = ["generate", "-m", folder, "--file", str(tmp_path / "in.jsonl"), "--out", str(out)]
    assert main([*command, "--max_new_tokens", "8", "--batch_size", "2"]) == 0
    rows = read_rows(out)
    assert [row["row"] for row in rows] == list(range(len(ROWS)))
    prompts = [user("hello") if "messages" in row else row["prompt"] for row in ROWS]
    assert [row["prompt"] for row in rows] == prompts
    prompts = [user(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    expected = Generator(max_new_tokens=8).generate(*opened, prompts)
    assert [row["completion"] for row in rows] == [c.text for c in expected]
    assert [row["completion_tokens"] for row in rows] == [len(c.token_ids) for c in expected]
    assert rows[2]["reference"] == "good day"
    assert "reference" not in rows[0]
    assert list(out.parent.iterdir()) == [out]
    assert "7/7 rows" in capsys.readouterr().err


def test_a_stopped_job_goes_on_to_the_same_file(folder, tmp_path, monkeypatch, capsys):
    """Cut after any batch and at any byte of the last row: the result is that of an undisturbed job."""
    write_rows(tmp_path / "in.jsonl", ROWS)

    def command(out):
        settings = ["-c", "generate/sample", "--max_new_tokens", "8", "--batch_size", "2"]
        return ["generate", "-m", folder, "--file", str(tmp_path / "in.jsonl"), "--out", str(out), *settings]

    whole = tmp_path / "whole.jsonl"
    assert main(command(whole)) == 0
    out = tmp_path / "out.jsonl"
    sync = os.fsync
    for batches in (1, 2, 3):
        for torn in (0, 1, 40, 250, 100_000):
            calls = []

            def killed(handle, calls=calls, batches=batches):
                sync(handle)
                calls.append(1)
                if len(calls) == batches:
                    raise MemoryError("killed")

            monkeypatch.setattr(os, "fsync", killed)
            assert main(command(out)) == 1
            monkeypatch.setattr(os, "fsync", sync)
            os.truncate(out, max(0, out.stat().st_size - torn))
            assert main(command(out)) == 0
            assert out.read_bytes() == whole.read_bytes()
            out.unlink()
    capsys.readouterr()
    before = whole.stat().st_mtime_ns
    assert main(command(whole)) == 0  # nothing is left to do, so no model is opened
    assert "7 rows" in capsys.readouterr().err
    assert whole.stat().st_mtime_ns >= before


def test_more_rows_are_added_and_the_batch_size_may_change(folder, tmp_path):
    def run(out, rows, *flags):
        write_rows(tmp_path / "in.jsonl", rows)
        command = ["generate", "-m", folder, "--file", str(tmp_path / "in.jsonl"), "--out", str(out)]
        assert main([*command, "--max_new_tokens", "8", *flags]) == 0

    run(tmp_path / "grown.jsonl", ROWS[:3])
    run(tmp_path / "grown.jsonl", ROWS, "--batch_size", "3")
    run(tmp_path / "whole.jsonl", ROWS)
    assert read_rows(tmp_path / "grown.jsonl") == read_rows(tmp_path / "whole.jsonl")


def test_references_are_those_that_the_input_has_at_the_end(folder, tmp_path):
    """A job that was killed goes on with its answers, whatever was corrected in the meantime."""

    def run(out, references):
        talks = [[*user(f"q{i}"), {"role": "assistant", "content": text}] for i, text in enumerate(references)]
        write_rows(tmp_path / "in.jsonl", [{"messages": talk if talk[-1]["content"] else talk[:1]} for talk in talks])
        command = ["generate", "-m", folder, "--file", str(tmp_path / "in.jsonl"), "--out", str(out)]
        assert main([*command, "--max_new_tokens", "3", "--logprobs"]) == 0

    out = tmp_path / "out.jsonl"
    run(out, ["wrong", "b", "", "d"])
    assert [row.get("reference") for row in read_rows(out)] == ["wrong", "b", None, "d"]
    lines = out.read_bytes().splitlines(keepends=True)
    run(tmp_path / "whole.jsonl", ["right", "", "c", "d"])
    for kept in (1, 2, 4):
        out.write_bytes(b"".join(lines[:kept]))
        run(out, ["right", "", "c", "d"])
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


def test_rows_hold_the_system_message_under_which_they_were_answered(folder, opened, tmp_path):
    own = {"role": "system", "content": "be terse"}
    system = {"role": "system", "content": "be kind"}
    rows = [{"prompt": "alpha"}, {"prompt": user("beta")}, {"prompt": [own, *user("gamma")]}]
    write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    command = ["generate", "-m", folder, "--file", str(tmp_path / "in.jsonl"), "--out", str(out)]
    command += ["--max_new_tokens", "8", "--system", "be kind"]
    assert main(command) == 0
    found = read_rows(out)
    prompts = [[system, *user("alpha")], [system, *user("beta")], [own, *user("gamma")]]
    assert [row["prompt"] for row in found] == prompts
    assert [row["completion"] for row in found] == [
        c.text for c in Generator(max_new_tokens=8).generate(*opened, prompts)
    ]
    whole = out.read_bytes()
    out.write_bytes(whole.splitlines(keepends=True)[1])
    assert main(command) == 0
    assert out.read_bytes() == whole


def test_a_row_may_have_its_own_system_message(folder, opened, tmp_path, capsys):
    rows = [{"prompt": "alpha", "system": "be terse"}, {"messages": user("beta"), "system": "be terse"}]
    write_rows(tmp_path / "in.jsonl", [*rows, {"prompt": "gamma"}])
    out = tmp_path / "out.jsonl"
    command = ["generate", "-m", folder, "--file", str(tmp_path / "in.jsonl"), "--out", str(out)]
    command += ["--max_new_tokens", "8"]
    assert main([*command, "--system", "be kind"]) == 0
    found, terse = read_rows(out), {"role": "system", "content": "be terse"}
    prompts = [[terse, *user("alpha")], [terse, *user("beta")], [{"role": "system", "content": "be kind"}]]
    prompts[2] += user("gamma")
    assert [row["prompt"] for row in found] == prompts
    expected = Generator(max_new_tokens=8).generate(*opened, prompts)
    assert [row["completion"] for row in found] == [c.text for c in expected]
    capsys.readouterr()
    out.unlink()
    assert main([*command, "--raw"]) == 2
    assert "in.jsonl: messages, a system message too, need a chat template (and no --raw)" in capsys.readouterr().err
    assert not out.exists()


def test_answers_of_another_job_are_not_touched(folder, tmp_path, capsys):
    write_rows(tmp_path / "in.jsonl", ROWS)
    out = tmp_path / "out.jsonl"
    command = ["generate", "-m", folder, "--file", str(tmp_path / "in.jsonl"), "--out", str(out)]
    command += ["--max_new_tokens", "3"]
    assert main(command) == 0
    before = out.read_bytes()
    other = save_model(tmp_path / "other", positions=128)
    write_rows(tmp_path / "changed.jsonl", [{"prompt": "gamma"}, *ROWS[1:]])
    changed = [word.replace("in.jsonl", "changed.jsonl") for word in command]
    for words, message in (
        ([*command, "--repetition_penalty", "1.5"], "out.jsonl:1: made by other settings or another model"),
        ([*command, "--raw"], "made by other settings"),
        ([other if word == folder else word for word in command], "made by other settings or another model"),
        (changed, "out.jsonl:1: answers another prompt than row 0 of"),
    ):
        capsys.readouterr()
        assert main(words) == 2
        assert_one_line(capsys.readouterr().err, message)
        assert out.read_bytes() == before
    assert main([*changed, "--overwrite"]) == 0
    assert read_rows(out)[0]["prompt"] == "gamma"
    out.write_text('{"text": "mine"}\n')
    assert main(command) == 2
    assert out.read_text() == '{"text": "mine"}\n'


def assert_one_line(text, message):
    lines = text.splitlines()
    assert len(lines) == 1, text
    assert message in lines[0]
    assert "Traceback" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', "in.jsonl:2: no JSON"),
        ('{"prompt": "a"}\n[1]\n', "in.jsonl:2: a row must be a JSON object"),
        (
            '{"question": "a"}\n',
            "in.jsonl:1: no column prompt or messages; there are: question; name one with --column",
        ),
        ('{"prompt": 3}\n', "in.jsonl:1: column prompt must hold text"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}\n', "the conversation starts with the assistant"),
        ('{"prompt": "\\ud800"}\n', "in.jsonl:1: half a surrogate pair"),
        ("", "the file is empty"),
        ("\n\n", "the file is empty"),
    ],
)
def test_bad_rows_are_one_line_and_nothing_is_written(folder, tmp_path, capsys, content, message):
    (tmp_path / "in.jsonl").write_text(content, encoding="utf-8")
    out = tmp_path / "out.jsonl"
    assert main(["generate", "-m", folder, "--file", str(tmp_path / "in.jsonl"), "--out", str(out)]) == 2
    assert_one_line(capsys.readouterr().err, message)
    assert not out.exists()


def test_a_prompt_that_is_too_long_is_said_before_anything_is_written(folder, tmp_path, capsys):
    write_rows(tmp_path / "in.jsonl", [{"prompt": "a"}, {"prompt": "b" * 300}])
    out = tmp_path / "out.jsonl"
    command = ["generate", "-m", folder, "--file", str(tmp_path / "in.jsonl"), "--out", str(out)]
    command += ["--max_new_tokens", "8"]
    assert main(command) == 2
    assert_one_line(
        capsys.readouterr().err, "prompt 1: 319 tokens and max_new_tokens=8 exceed the model's 256 positions"
    )
    assert not out.exists()
    assert main([*command, "--too_long", "truncate"]) == 0
    assert [row["truncated"] for row in read_rows(out)] == [0, 71]


def test_wrong_commands_are_one_line(folder, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    no_tokenizer = save_model(tmp_path / "no_tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        os.remove(os.path.join(no_tokenizer, name))
    broken = save_model(tmp_path / "broken")
    os.truncate(os.path.join(broken, "model.safetensors"), 1000)
    plain = save_model(tmp_path / "plain", template=None)
    (tmp_path / "bad.yaml").write_text("max_new_token: 3\n")
    for words, message in (
        (["-m", str(tmp_path / "emty")], "no such folder (did you mean `empty`?)"),
        (["-m", str(tmp_path / "empty")], "no model in this folder"),
        (["-m", str(tmp_path / "run")], "a run that was not exported yet; write its model with: recipes export"),
        (["-m", str(tmp_path / "x.ckpt")], "a checkpoint; make a model folder of it with: recipes export"),
        (["-m", str(tmp_path / "bare")], "no weights in this folder"),
        (["-m", no_tokenizer], "no tokenizer in this folder"),
        (["-m", broken, "--prompt", "x"], "cannot be opened"),
        (["-m", plain, "--prompt", "x", "--system", "y"], "--system: needs a chat template"),
        (["-m", folder, "--prompt", "x", "--temperature", "0.5"], "temperature=0.5 is read by strategy 'sample' only"),
        (["-m", folder, "--prompt", "x", "--file", "y"], "--prompt and --file: one or the other"),
        (["-m", folder, "--file", "y"], "--file and --out go together"),
        (["-m", folder, "--prompt", "x", "--column", "y"], "--column: goes with --file"),
        (["-m", folder, "--file", "missing.jsonl", "--out", "y.jsonl"], "--file missing.jsonl: no such file"),
        (["-m", folder, "-c", str(tmp_path / "bad.yaml")], "bad.yaml:1: unknown key `max_new_token` (did you mean"),
        (["-m", folder, "-c", "generate/greedyy"], "no such config (did you mean `generate/greedy`?)"),
        (["-m", folder, "--prompt", "x", "--device", "cuda:99"], "--device cuda:99: not usable here"),
    ):
        capsys.readouterr()
        assert main(["generate", *words]) == 2, words
        assert_one_line(capsys.readouterr().err, message)


@pytest.mark.slow
def test_kill_nine_and_start_again(tmp_path):
    folder = save_model(tmp_path / "model", positions=1024)
    write_rows(tmp_path / "in.jsonl", [{"prompt": f"row {n} " + "x" * (n * 7 % 50)} for n in range(60)])

    def start(out):
        words = ["--file", str(tmp_path / "in.jsonl"), "--out", str(out), "--max_new_tokens", "60", "--batch_size", "3"]
        words += ["-c", "generate/sample"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "recipes", "generate", "-m", folder, *words]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    whole, out = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    undisturbed = start(whole)
    process = start(out)
    while not out.exists() or out.stat().st_size < 3000:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    rows = out.read_bytes().count(b"\n")
    assert 0 < rows < 60
    again = start(out)
    assert again.wait() == 0
    assert undisturbed.wait() == 0
    assert f"{rows} of 60 rows are there already" in again.stderr.read()
    assert out.read_bytes() == whole.read_bytes()
