"""Manifests for Kubernetes and SkyPilot, with the field names of the real APIs; their commands run by a shell."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import test_launch
import yaml
from test_launch import pairs, printed, refused, stand_in, understood

from recipes.__main__ import main
from recipes.compose import compose

folder = test_launch.folder


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
