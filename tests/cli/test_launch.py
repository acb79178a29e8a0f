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
from typing import Any

import pytest
import yaml
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


# --- Kubernetes, SkyPilot -------------------------------------------------------------------------------------------

# Field names of JobSet v1alpha2, Job batch/v1 and core/v1, as far as they are used, off their published schemas.
FIELDS: dict[str, Any] = {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": {"name": str, "namespace": str},
    "spec": {
        "network": {"enableDNSHostnames": bool, "publishNotReadyAddresses": bool},
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [
            {
                "name": str,
                "replicas": int,
                "template": {
                    "spec": {
                        "completionMode": str,
                        "completions": int,
                        "parallelism": int,
                        "backoffLimit": int,
                        "template": {
                            "spec": {
                                "restartPolicy": str,
                                "terminationGracePeriodSeconds": int,
                                "nodeSelector": dict,
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "workingDir": str,
                                        "command": list,
                                        "args": list,
                                        "env": [{"name": str, "value": str}],
                                        "envFrom": [{"secretRef": {"name": str}}],
                                        "ports": [{"containerPort": int}],
                                        "resources": {"limits": dict, "requests": dict},
                                        "volumeMounts": [
                                            {"name": str, "mountPath": str, "subPath": str, "readOnly": bool}
                                        ],
                                    }
                                ],
                                "volumes": [
                                    {
                                        "name": str,
                                        "configMap": {"name": str},
                                        "persistentVolumeClaim": {"claimName": str},
                                        "emptyDir": {"medium": str, "sizeLimit": str},
                                    }
                                ],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def conforms(value: Any, fields: Any) -> None:
    if isinstance(fields, dict):
        assert set(value) <= set(fields)
        for key, item in value.items():
            conforms(item, fields[key])
    elif isinstance(fields, list):
        for item in value:
            conforms(item, fields[0])
    elif isinstance(fields, type):
        assert type(value) is fields
    else:
        assert value == fields


POD = ["--image", "lab/recipes:1", "--claim", "runs", "--devices", "8", "--nodes", "2"]


def test_kubernetes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys, "kubernetes", "-c", "tiny", "--trainer.max_steps", "7", *POD, "--claim-size", "10Gi", "--namespace",
        "lab", "--mem", "100Gi", "--cpus", "32", "--secret", "hub", "--node-selector", "gpu=h100",
    )  # fmt: skip
    claim, config, job = yaml.safe_load_all(text)
    assert (claim["kind"], claim["spec"]["accessModes"]) == ("PersistentVolumeClaim", ["ReadWriteMany"])
    conforms(job, FIELDS)
    name = job["metadata"]["name"]
    assert re.fullmatch(r"[a-z][a-z0-9-]*[a-z0-9]", name)
    assert config["metadata"]["name"] == name
    spec = job["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    pod = spec["template"]["spec"]
    container = pod["containers"][0]
    assert container["resources"]["limits"] == {"cpu": "32", "memory": "100Gi", "nvidia.com/gpu": 8}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "16Gi"}} in pod["volumes"]
    # The pods find the merged recipe where it is mounted, and come to the same values.
    (folder / "work/configs").mkdir(parents=True)
    (folder / "work/configs/tiny.yaml").write_text(config["data"]["recipe.yaml"])
    os.chdir(folder / "work")
    args = run_in_pod(folder, container["args"][0], JOB_COMPLETION_INDEX="1")
    assert args.rdzv_conf.startswith("is_host=0,")
    assert args.rdzv_endpoint == f"{name}-node-0-0.{name}:29500"
    rest = args.training_script_args
    assert rest[:3] == ["fit", "-c", "tiny"]
    composed = compose(["tiny"], pairs(rest))
    assert composed.name == "tiny"
    assert composed.values["trainer"]["max_steps"] == 7
    assert composed.values["trainer"]["num_nodes"] == 2
    assert composed.values["runs_dir"] == "/runs"
    assert composed.values["data"]["init_args"]["batch_size"] == 4
    args = run_in_pod(folder, container["args"][0], JOB_COMPLETION_INDEX="0")
    assert args.rdzv_conf.startswith("is_host=1,")


def pairs(words: list[str]) -> list[tuple[str, str]]:
    ours = ("--job", "--preflight")
    flags = [(word, words[i + 1]) for i, word in enumerate(words[:-1]) if word.startswith("--") and word not in ours]
    return [(flag[2:], value) for flag, value in flags]


def run_in_pod(folder: Path, script: str, **variables: str) -> argparse.Namespace:
    """The command that a shell makes of a script, as torchrun understands it."""
    stand_in(folder, "python", f'printf "%s\\n" "$@" > {folder}/words')
    done = subprocess.run(["/bin/sh", "-c", script], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return understood((folder / "words").read_text().splitlines())


def test_kubernetes_hosts_have_short_names(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "tiny.yaml").rename(folder / f"{'a-long-name-' * 6}.yaml")
    text = printed(capsys, "kubernetes", "-c", "a-long-name-" * 6, *POD)
    name = list(yaml.safe_load_all(text))[-1]["metadata"]["name"]
    assert len(f"{name}-node-0-1023") <= 63
    assert "--" not in name


def test_kubernetes_keeps_secrets_out(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_API_KEY", "hidden-value")
    logger = "{class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: '${oc.env:TEST_API_KEY}'}}"
    text = printed(capsys, "kubernetes", "-c", "tiny", *POD, "--trainer.logger", logger)
    assert "hidden-value" not in text
    assert "${oc.env:TEST_API_KEY}" in text


def test_kubernetes_needs_a_volume(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["kubernetes", "-c", "tiny", "--image", "x", "--devices", "1"]
    assert "--claim" in refused(capsys, *words, "--dry-run")


def test_kubernetes_applies(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(folder, "kubectl", f'echo "$@" > {folder}/words; cat > {folder}/applied; echo created')
    assert main(["launch", "kubernetes", "-c", "tiny", *POD]) == 0
    assert (folder / "words").read_text() == "apply -f -\n"
    assert [one["kind"] for one in yaml.safe_load_all((folder / "applied").read_text())] == ["ConfigMap", "JobSet"]


# Field names of a SkyPilot task, as far as they are used, off its schema.
SKY: dict[str, Any] = {
    "name": str,
    "workdir": str,
    "num_nodes": int,
    "resources": {
        "infra": str,
        "accelerators": str,
        "cpus": str,
        "memory": str,
        "image_id": str,
        "use_spot": bool,
        "job_recovery": {"max_restarts_on_errors": int},
    },
    "volumes": {"/runs": str},
    "envs": dict,
    "setup": str,
    "run": str,
}


def test_skypilot(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(
        capsys, "skypilot", "-c", "tiny", "--nodes", "2", "--devices", "8", "--gpu", "H100", "--spot", "--volume",
        "mine", "--infra", "k8s", "--cpus", "32+", "--env", "HF_TOKEN",
    )  # fmt: skip
    task = yaml.safe_load(text)
    conforms(task, SKY)
    assert (task["num_nodes"], task["resources"]["accelerators"]) == (2, "H100:8")
    assert task["envs"] == {"HF_TOKEN": None}
    variables = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1", "SKYPILOT_TASK_ID": "sky-7"}
    args = run_in_pod(folder, task["run"], **variables)
    assert (args.nnodes, args.nproc_per_node, args.rdzv_id) == ("2", "8", "sky-7")
    assert args.rdzv_endpoint == "10.0.0.1:29500"
    assert args.rdzv_conf.startswith("is_host=0,")
    rest = args.training_script_args
    assert rest[rest.index("--job") + 1] == "sky-7"
    assert rest[rest.index("--runs_dir") + 1] == "/runs"


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ([], "--gpu"),
        (["--gpu", "H100", "--spot"], "--volume"),
        (["--gpu", "H100", "--nodes", "2"], "--volume"),
    ],
)
def test_skypilot_refuses(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    assert text in refused(capsys, "skypilot", "-c", "tiny", "--devices", "1", "--dry-run", *words)


def test_skypilot_launches_a_managed_job(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand_in(folder, "sky", f'printf "%s\\n" "$@" > {folder}/words; cat "${{@: -1}}" > {folder}/task')
    assert main(["launch", "skypilot", "-c", "tiny", "--devices", "1", "--gpu", "L4", "--env", "HF_TOKEN"]) == 0
    words = (folder / "words").read_text().splitlines()
    assert words[:-1] == ["jobs", "launch", "--yes", "--detach-run", "--env", "HF_TOKEN"]
    assert yaml.safe_load((folder / "task").read_text())["resources"]["accelerators"] == "L4:1"


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
