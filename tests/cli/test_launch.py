"""What would be submitted: scripts that a shell runs with stand-ins for srun and sbatch, commands that torchrun's own
parser reads, manifests with the field names of the real APIs; and what is refused before anything is submitted."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from recipes.__main__ import main
from recipes.compose import compose

RECIPE = """\
tokenizer: builtin:bytes
sequence_length: 32
model:
  class_path: llm_modules.LanguageModelModule
  init_args:
    backbone:
      config: {model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2,
               num_key_value_heads: 1, max_position_embeddings: 64}
data:
  class_path: llm_modules.data.TextDataModule
  init_args: {sources: [{path: rows.jsonl}], batch_size: 4}
trainer: {max_steps: 2, accumulate_grad_batches: 3}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a recipe, and a folder of stand-ins first on PATH."""
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / "bin" / name
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["launch", *words, "--dry-run"]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(["launch", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 1, captured.err
    return captured.err


def options(script: str) -> dict[str, str]:
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", script, re.M)
    return {key: " ".join(shlex.split(value)) for key, value in found}


def ran(folder: Path, script: str, **variables: str) -> list[str]:
    """What srun was given when a shell ran the script."""
    stand_in(
        folder, "srun", f'printf "%s\\n" "$@" > {folder}/words; echo "$MASTER_ADDR $MASTER_PORT" > {folder}/master'
    )
    stand_in(folder, "scontrol", "printf 'node7\\nnode8\\n'")
    environment = os.environ | {"SLURM_JOB_ID": "20123", "SLURM_JOB_NODELIST": "node[7-8]"} | variables
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, cwd=folder)
    assert done.returncode == 0, done.stderr
    return (folder / "words").read_text().splitlines()


# --- Slurm ----------------------------------------------------------------------------------------------------------


def test_slurm_asks_for_nodes_tasks_and_gpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(
        capsys, "slurm", "-c", "tiny", "--nodes", "2", "--devices", "8", "--partition", "big", "--account", "lab",
        "--time", "1-00:00:00", "--cpus", "12", "--mem", "900G", "--constraint", "h100&ib", "--sbatch", "qos=high",
        "--sbatch", "exclusive", "--sbatch", "comment=a b", "--save-before", "120",
    )  # fmt: skip
    assert script.startswith("#!/bin/bash\n")
    assert options(script) == {
        "job-name": "tiny",
        "partition": "big",
        "account": "lab",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "cpus-per-task": "12",
        "mem": "900G",
        "time": "1-00:00:00",
        "constraint": "h100&ib",
        "chdir": str(folder),
        "signal": "USR1@120",
        "open-mode": "append",
        "requeue": "",
        "qos": "high",
        "exclusive": "",
        "comment": "a b",
    }


def test_slurm_runs_fit_with_the_words_that_were_given(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(
        capsys, "slurm", "-c", "tiny", "-c", "strategies/ddp", "--nodes", "2", "--devices", "4",
        "--data.sources", "[{path: it's here.jsonl}]", "--trainer.max_steps", "10", "--cpus", "3",
    )  # fmt: skip
    words = ran(folder, script)
    assert words[:2] == ["--kill-on-bad-exit=1", "--cpus-per-task=3"]
    assert words[3:] == [
        "-m", "recipes", "fit", "-c", "tiny", "-c", "strategies/ddp", "--data.sources", "[{path: it's here.jsonl}]",
        "--trainer.max_steps", "10", "--trainer.num_nodes", "2", "--trainer.devices", "4", "--preflight", "60",
        "--job", "slurm-20123",
    ]  # fmt: skip
    assert (folder / "master").read_text() == "node7 15123\n"


def test_slurm_on_cpus_asks_for_no_gpus(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = printed(capsys, "slurm", "-c", "tiny", "--devices", "2", "--trainer.accelerator", "cpu")
    assert "gpus-per-node" not in options(script)


def test_slurm_finds_python(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "env/bin").mkdir(parents=True)
    (folder / "env/bin/activate").write_text("export ACTIVATED=1\n")
    stand_in(folder, "module", "")  # not a function here, as on a cluster
    script = printed(
        capsys, "slurm", "-c", "tiny", "--devices", "1", "--module", "cuda/12.8", "--venv", "env", "--container",
        "image:1", "--container-mounts", "/data:/data", "--preflight", "0",
    )  # fmt: skip
    words = ran(folder, script)
    assert words[:5] == [
        "--kill-on-bad-exit=1", "--container-image=image:1", "--container-mounts=/data:/data", "python", "-m",
    ]  # fmt: skip
    assert "--preflight" not in words


def test_slurm_check_only(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ran(folder, printed(capsys, "slurm", "-c", "tiny", "--devices", "2", "--check-only"))
    assert words[2:7] == ["-m", "recipes", "check", "cluster", "--timeout"]
    assert "--job" not in words


def test_slurm_submits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(folder, "sbatch", f'cat > {folder}/submitted; echo "4711;cluster"')
    assert main(["launch", "slurm", "-c", "tiny", "--devices", "2"]) == 0
    assert capsys.readouterr().out == "4711\n"
    assert options((folder / "submitted").read_text())["ntasks-per-node"] == "2"


def test_slurm_says_what_sbatch_says(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(folder, "sbatch", "echo 'sbatch: error: invalid partition' >&2; exit 1")
    stand_in(folder, "x", "")
    assert main(["launch", "slurm", "-c", "tiny", "--devices", "2"]) == 2
    assert "invalid partition" in capsys.readouterr().err


@pytest.mark.parametrize(("key", "flag"), [("nodes=3", "--nodes"), ("ntasks-per-node=3", "--devices")])
def test_slurm_refuses_what_has_a_flag(folder: Path, capsys: pytest.CaptureFixture[str], key: str, flag: str) -> None:
    assert flag in refused(capsys, "slurm", "-c", "tiny", "--devices", "2", "--sbatch", key, "--dry-run")


# --- what is refused, and nothing submitted -------------------------------------------------------------------------

WRONG = {
    "no recipe": (["--devices", "2"], "-c: a recipe must be named"),
    "no devices": (["-c", "tiny"], "--devices"),
    "an unknown key": (["-c", "tiny", "--devices", "2", "--trainer.max_step", "3"], "max_steps"),
    "a value of a wrong kind": (["-c", "tiny", "--devices", "2", "--data.batch_size", "many"], "batch_size"),
    "a contradiction": (["-c", "tiny", "--devices", "2", "--trainer.devices", "4"], "contradicts --devices"),
    "rows that do not divide": (
        ["-c", "tiny", "--nodes", "2", "--devices", "8", "--rows-per-step", "100"],
        "16 devices x data.batch_size 4 are 64 rows at once; write 64 or 128",
    ),
    "nodes": (["-c", "tiny", "--devices", "2", "--nodes", "two"], "--nodes two"),
    "elastic": (["-c", "tiny", "--devices", "2", "--nodes", "1:2"], "for torchrun"),
    "a mesh of another size": (
        ["-c", "tiny", "--devices", "2", "--trainer.strategy", "{class_path: "
         "lightning.pytorch.strategies.ModelParallelStrategy, init_args: {data_parallel_size: 2, "
         "tensor_parallel_size: 2}}"],
        "is 4, but there are 2 devices",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_refused_before_anything_is_submitted(folder: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    stand_in(folder, "sbatch", f"touch {folder}/submitted")
    words, text = WRONG[what]
    assert text in refused(capsys, "slurm", *words)
    assert not (folder / "submitted").exists()


def test_rows_of_a_step_are_kept_on_any_number_of_devices(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for nodes, devices, window in ((1, 2, 16), (2, 4, 4), (4, 8, 1)):
        sizes = ["--nodes", str(nodes), "--devices", str(devices)]
        words = ran(folder, printed(capsys, "slurm", "-c", "tiny", *sizes, "--rows-per-step", "128"))
        assert words[words.index("--trainer.accumulate_grad_batches") + 1] == str(window)


# --- torchrun -------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[list[str]]:
    """The commands of what was printed, without Python."""
    lines = [line for line in text.replace("\\\n", " ").splitlines() if not line.startswith(("#", "export"))]
    return [shlex.split(line)[1:] for line in lines]


def understood(command: list[str]) -> argparse.Namespace:
    assert command[:2] == ["-m", "recipes.elastic"]  # which takes torchrun's arguments
    return get_args_parser().parse_args(command[2:])


def pairs(words: list[str]) -> list[tuple[str, str]]:
    ours = ("--job", "--preflight")
    flags = [(word, words[i + 1]) for i, word in enumerate(words[:-1]) if word.startswith("--") and word not in ours]
    return [(flag[2:], value) for flag, value in flags]


def test_torchrun_on_one_machine(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (command,) = commands(printed(capsys, "torchrun", "-c", "tiny", "--devices", "3"))
    args = understood(command)
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("1", "3", 3)
    assert (args.rdzv_backend, args.rdzv_endpoint, args.module) == ("c10d", "localhost:0", True)
    assert args.training_script == "recipes"
    rest = args.training_script_args
    assert rest[rest.index("--job") + 1] == args.rdzv_id


def test_torchrun_tells_each_node_its_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "4", "--devices", "8", "--master", "alpha:1234", "--interface", "ib0"]
    text = printed(capsys, "torchrun", "-c", "tiny", *words)
    first, others = map(understood, commands(text))
    assert first.rdzv_conf.startswith("is_host=1,")
    assert others.rdzv_conf.startswith("is_host=0,")
    assert {first.rdzv_endpoint, others.rdzv_endpoint} == {"alpha:1234"}
    assert first.rdzv_id == others.rdzv_id
    assert first.training_script_args == others.training_script_args
    assert text.count("GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0") == 2


def test_torchrun_elastic_asks_torchrun_for_the_sizes(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = printed(capsys, "torchrun", "-c", "tiny", "--nodes", "1:4", "--devices", "2", "--master", "alpha")
    args = understood(commands(text)[0])
    assert args.nnodes == "1:4"
    rest = args.training_script_args
    sizes = [(key, value) for key, value in pairs(rest) if key.startswith("trainer.")]
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    trainer = compose(["tiny"], sizes).values["trainer"]
    assert (trainer["num_nodes"], trainer["devices"]) == (3, 2)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--nodes", "2"], "--master"),
        (["--nodes", "2", "--master", "a"], "--node-rank"),
        (["--nodes", "2", "--master", "a", "--node-rank", "1"], "--job"),
        (["--nodes", "1:2", "--master", "a", "--rows-per-step", "8"], "--rows-per-step"),
        (["--nodes", "3:2", "--master", "a"], "--nodes 3:2"),
        (["--job", "a b"], "--job a b"),
    ],
)
def test_torchrun_refuses(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    assert text in refused(capsys, "torchrun", "-c", "tiny", "--devices", "2", *words)


@pytest.mark.parametrize(
    ("launcher", "program", "words"),
    [
        ("slurm", "sbatch", []),
        ("kubernetes", "kubectl", ["--image", "x", "--claim", "y"]),
        ("skypilot", "sky", ["--gpu", "L4"]),
    ],
)
def test_a_program_that_is_not_here(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    launcher: str,
    program: str,
    words: list[str],
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    capsys.readouterr()
    assert main(["launch", launcher, "-c", "tiny", "--devices", "1", *words]) == 2
    assert f"{program}: not found" in capsys.readouterr().err


def test_the_json_of_a_command_is_not_cut(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Words with spaces, quotes and dollars come to the job as they were given."""
    value = json.dumps({"path": "a $HOME `b` \"c\" 'd'.jsonl"})
    words = ran(folder, printed(capsys, "slurm", "-c", "tiny", "--devices", "1", "--data.sources", f"[{value}]"))
    assert f"[{value}]" in words
