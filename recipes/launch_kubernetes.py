"""A recipe as a Kubernetes JobSet: an indexed job behind a headless service, torchrun in each pod."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from typing import Any

from recipes.errors import UserError
from recipes.launch_plan import Plan, Shell, add_common_arguments, as_yaml, folded, make_plan, new_job
from recipes.launch_torchrun import ELASTIC, JOIN_SECONDS, PORT, timeouts, variables
from recipes.redaction import redact_config

RUNS, WORK = "/runs", "/work"
_KEY = "recipe.yaml"


def add_launcher_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser)
    parser.add_argument("--image", required=True, metavar="IMAGE", help="container image with LitRecipes in it")
    parser.add_argument("--namespace", metavar="NAME", help="default: the one of your kubectl context")
    parser.add_argument("--claim", metavar="NAME", help="volume claim for runs/; all nodes write to it")
    parser.add_argument("--claim-size", metavar="SIZE", help="make that claim, of this size, such as 200Gi")
    parser.add_argument("--storage-class", metavar="NAME", help="of the claim that is made; must allow ReadWriteMany")
    parser.add_argument("--cpus", metavar="N", help="cores of a node")
    parser.add_argument("--mem", metavar="SIZE", help="memory of a node, such as 200Gi")
    parser.add_argument("--shm", default="16Gi", metavar="SIZE", help="/dev/shm, which NCCL and loaders use (16Gi)")
    parser.add_argument("--gpu-resource", default="nvidia.com/gpu", metavar="NAME", help="default: nvidia.com/gpu")
    parser.add_argument("--secret", action="append", default=[], metavar="NAME", help="secret that gives variables")
    parser.add_argument("--node-selector", action="append", default=[], metavar="KEY=VALUE", help="label of a node")
    parser.add_argument("--max-restarts", type=int, default=3, metavar="N", help="of the whole job (default: 3)")


def launch(args: argparse.Namespace) -> int:
    plan = make_plan(args, WORK)
    text = as_yaml(manifest(plan, args, new_job(plan)))
    if args.dry_run:
        print(text, end="")
        return 0
    print(plan.summary(), file=sys.stderr)
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        raise UserError("kubectl: not found on this machine; --dry-run prints the manifest, for kubectl apply -f -")
    done = subprocess.run([kubectl, "apply", "-f", "-"], input=text, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"kubectl: {' '.join(done.stderr.split()) or f'ended with status {done.returncode}'}")
    print(done.stdout, end="")
    return 0


def manifest(plan: Plan, args: argparse.Namespace, job: str) -> list[dict[str, Any]]:
    """The objects, in the order in which they are applied."""
    if args.claim is None:
        raise UserError("--claim: a volume for runs/ must be named; without one a restart would lose the checkpoints")
    metadata = {"name": job} | ({"namespace": args.namespace} if args.namespace else {})
    # The merged recipe travels with the job: files of this machine are not in the image. Variables stay names.
    recipe = redact_config(plan.composed, plan.composed.root.plain())
    text = as_yaml([recipe])
    objects = [{"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {_KEY: text}}]
    if args.claim_size:
        objects.insert(0, _claim(args))
    elif args.storage_class:
        raise UserError("--storage-class: goes with --claim-size, which makes the claim")
    indexed = {
        "completionMode": "Indexed",
        "completions": plan.nodes,
        "parallelism": plan.nodes,
        "backoffLimit": 0,
        "template": {"spec": _pod(plan, args, job)},
    }
    spec = {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
        "failurePolicy": {"maxRestarts": args.max_restarts},
        "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": indexed}}],
    }
    return [*objects, {"apiVersion": "jobset.x-k8s.io/v1alpha2", "kind": "JobSet", "metadata": metadata, "spec": spec}]


def _claim(args: argparse.Namespace) -> dict[str, Any]:
    metadata = {"name": args.claim} | ({"namespace": args.namespace} if args.namespace else {})
    spec: dict[str, Any] = {
        "accessModes": ["ReadWriteMany"],
        "resources": {"requests": {"storage": args.claim_size}},
    }
    if args.storage_class:
        spec["storageClassName"] = args.storage_class
    return {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": metadata, "spec": spec}


def _pod(plan: Plan, args: argparse.Namespace, job: str) -> dict[str, Any]:
    name = plan.composed.name
    limits = {"cpu": args.cpus, "memory": args.mem, args.gpu_resource: plan.devices if plan.accelerated else None}
    limits = {key: value for key, value in limits.items() if value is not None}
    container: dict[str, Any] = {
        "name": "recipes",
        "image": args.image,
        "workingDir": WORK,
        "command": ["/bin/sh", "-c"],
        "args": [_command(plan, args, job)],
        "env": _environment(args),
        "ports": [{"containerPort": PORT}],
        "resources": {"limits": limits, "requests": limits},
        "volumeMounts": [
            {"name": "recipe", "mountPath": f"{WORK}/configs/{name}.yaml", "subPath": _KEY, "readOnly": True},
            {"name": "runs", "mountPath": RUNS},
            {"name": "shm", "mountPath": "/dev/shm"},
        ],
    }
    if args.secret:
        container["envFrom"] = [{"secretRef": {"name": secret}} for secret in args.secret]
    pod: dict[str, Any] = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,  # time for a last checkpoint when the pod is evicted
        "containers": [container],
        "volumes": [
            {"name": "recipe", "configMap": {"name": job}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": args.claim}},
            {"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": args.shm}},
        ],
    }
    if args.node_selector:
        pod["nodeSelector"] = dict(_label(text) for text in args.node_selector)
    return pod


def _label(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserError(f"--node-selector {text}: KEY=VALUE is asked for")
    return key, value


def _environment(args: argparse.Namespace) -> list[dict[str, str]]:
    values = {"XDG_CACHE_HOME": f"{RUNS}/.cache", "PYTHONUNBUFFERED": "1", **variables(args.interface)}
    return [{"name": key, "value": value} for key, value in values.items()]


def _command(plan: Plan, args: argparse.Namespace, job: str) -> str:
    """The shell's command of each pod: torchrun, which meets the others at pod 0 by its name in the service."""
    master = f"{job}-node-0-0.{job}:{PORT}"
    conf = Shell(f'"is_host=$((JOB_COMPLETION_INDEX == 0)),{timeouts(JOIN_SECONDS)}"')
    words = ["exec", "python", "-m", ELASTIC, "--nnodes", str(plan.nodes)]
    words += ["--nproc-per-node", str(plan.devices), "--max-restarts", "0"]
    words += ["--rdzv-backend", "c10d", "--rdzv-endpoint", master, "--rdzv-id", job, "--rdzv-conf", conf]
    named = [plan.composed.name]
    return folded([*words, "-m", "recipes", *plan.words(job, named, [("runs_dir", RUNS)])])
