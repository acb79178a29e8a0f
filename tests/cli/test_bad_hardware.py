"""Machines, processes and overlays that do not go together: one line, soon, status 2 or the launcher's, no run."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from recipes.__main__ import main

ROOT = Path(__file__).parents[2]
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
  init_args: {sources: [{path: rows.jsonl}], batch_size: 2, validation_fraction: 0.1}
trainer: {max_steps: 2, accelerator: cpu, devices: 1, enable_progress_bar: false}
"""
MESH = (
    "{class_path: lightning.pytorch.strategies.ModelParallelStrategy, "
    "init_args: {data_parallel_size: 2, tensor_parallel_size: 2}}"
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    rows = [json.dumps({"text": f"row number {i}, " * (1 + i % 3)}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "tiny.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def said(text: str) -> list[str]:
    return [line.removeprefix("recipes: ") for line in text.splitlines() if line.startswith("recipes: ")]


STRATEGY = {
    "a GPU where there is none": (["--trainer.accelerator", "gpu", "--trainer.devices", "8"], "sees no GPU on this"),
    "so many devices are none": (["--trainer.devices", "0"], "devices"),
    "devices of a GPU on a CPU": (["--trainer.devices", "[0, 1]"], "--trainer.devices: `trainer.devices` is [0, 1]: "),
    "devices in words": (["--trainer.devices", "two"], "--trainer.devices: `trainer.devices` is 'two': "),
    "a package that is missing": (["--trainer.strategy", "xla"], "Requirement 'torch_xla"),
    "Lightning's DeepSpeed": (["--trainer.strategy", "deepspeed"], "-c strategies/zero2"),
    "spawned processes": (["--trainer.strategy", "ddp_spawn", "--trainer.devices", "2"], "use -c strategies/ddp"),
    "tensor parallelism on one": (
        ["-c", "strategies/tp", "--trainer.devices", "1"],
        "is 2, which does not divide ",
    ),
    "tensor parallelism on three": (["-c", "strategies/tp", "--trainer.devices", "3"], "number of devices, 3; set "),
    "heads that do not divide": (["-c", "strategies/tp"], "does not divide the model's num_key_value_heads 1"),
    "a family without a plan": (
        ["-c", "strategies/tp", "--model.backbone", "models/gpt2-tiny.yaml"],
        "'gpt2' has no tensor-parallel plan",
    ),
    "a mesh of another size": (["--trainer.strategy", MESH, "--trainer.devices", "2"], "is 4, but there are 2 devices"),
    "not so many at least": (["-c", "strategies/tp", "--trainer.strategy.tensor_parallel", "0"], "0 is not allowed"),
    "what another stage has": (
        ["-c", "strategies/zero2", "--trainer.strategy.offload_parameters", "true"],
        "strategy.offload_parameters: needs stage 3",
    ),
    "states in files, and no folder": (
        ["-c", "strategies/zero3", "--trainer.strategy.offload_optimizer", "nvme"],
        "strategy.nvme_path: is needed with nvme",
    ),
    "hybrid shards": (
        ["-c", "strategies/fsdp1", "--trainer.strategy.sharding_strategy", "HYBRID_SHARD"],
        "HYBRID_SHARD is for machines with GPUs",
    ),
}
BATCH = {
    "more rows than there are": (
        ["-c", "strategies/ddp", "--trainer.devices", "2", "--data.batch_size", "50"],
        "fewer than the 100 of one optimizer step (2 processes x batch_size 50 x accumulate_grad_batches 1)",
    ),
    "an incomplete step": (
        ["--trainer.limit_train_batches", "3", "--trainer.accumulate_grad_batches", "2"],
        "which is no multiple of accumulate_grad_batches 2",
    ),
    "no micro-batch": (["--trainer.accumulate_grad_batches", "0"], "is 0; it must be at least 1"),
}
OVERLAYS = {
    "one device and two": (["-c", "strategies/single", "--trainer.devices", "2"], "contradicts -c strategies/single"),
    "one node and two": (["-c", "strategies/single", "--trainer.num_nodes", "2"], "contradicts -c strategies/single"),
    "qlora and fp32": (
        ["-c", "adapters/qlora", "-c", "precision/32-true"],
        "-c precision/32-true: contradicts -c adapters/qlora, of which `model.backbone.quantization` would stay",
    ),
    "qlora and fsdp1": (["-c", "adapters/qlora", "-c", "strategies/fsdp1"], "a base in nf4-double is of several"),
    "two adapters": (["-c", "adapters/lora", "-c", "adapters/ia3"], "-c adapters/ia3: contradicts -c adapters/lora: "),
    "a quantized base and full precision": (
        ["-c", "adapters/lora", "-c", "precision/nf4", "-c", "precision/32-true"],
        "of which `model.backbone.quantization`, `model.backbone.dtype` would stay; ",
    ),
    "a quantized base without adapter": (["-c", "precision/nf4"], "whose weights cannot be trained; add an adapter"),
}


@pytest.mark.parametrize(("words", "text"), [*STRATEGY.values(), *BATCH.values(), *OVERLAYS.values()])
def test_refused_by_fit(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    before = {path.name for path in folder.iterdir()}
    assert main(["fit", "-c", "tiny", *words]) == 2
    err = capsys.readouterr().err
    (line,) = said(err)
    assert text in line
    assert "Traceback" not in err
    assert {path.name for path in folder.iterdir()} == before


@pytest.mark.parametrize("words", [["-c", "strategies/tp"], ["-c", "strategies/ddp", "--data.batch_size", "50"]])
def test_a_dry_run_refuses_it_too(folder: Path, words: list[str]) -> None:
    assert main(["fit", "-c", "tiny", *words, "--dry-run"]) == 2


@pytest.mark.parametrize("later", ["fsdp2", "tp", "fsdp2-tp", "context", "fsdp2-context"])
def test_nothing_of_how_rows_are_shared_stays_of_an_earlier_strategy(
    folder: Path, capsys: pytest.CaptureFixture[str], later: str
) -> None:
    def sides(*words: str) -> list[Any]:
        assert main(["fit", "-c", "tiny", *words, "--print_config"]) == 0
        strategy = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]["init_args"]
        return [strategy["tensor_parallel"], strategy["context_parallel"]]

    alone = sides("-c", f"strategies/{later}")
    for earlier in ("tp", "context"):
        assert sides("-c", f"strategies/{earlier}", "-c", f"strategies/{later}") == alone


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "strategies/single", "-c", "strategies/ddp", "--trainer.devices", "2"],
        ["-c", "strategies/tp", "-c", "strategies/fsdp2", "--trainer.devices", "1"],
        ["-c", "adapters/qlora", "-c", "precision/bf16-mixed"],
        ["-c", "precision/16-mixed", "-c", "precision/bf16-mixed"],
    ],
)
def test_the_later_of_two_that_set_the_same_wins(folder: Path, words: list[str]) -> None:
    assert main(["fit", "-c", "tiny", *words, "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["-c", "strategies/single", "--devices", "2"], "contradicts -c strategies/single"),
        (
            ["-c", "strategies/context", "--devices", "3"],
            "`context_parallel` is 2, which does not divide the 3 devices",
        ),
        (
            ["-c", "strategies/context", "--devices", "6", "--trainer.strategy.tensor_parallel", "2"],
            "makes groups of 4 devices, which does not divide the 6 devices",
        ),
        (["-c", "strategies/context", "--devices", "4", "--rows-per-step", "6"], "2 groups of devices x data.batch"),
        (["-c", "strategies/tp", "--devices", "3"], "`tensor_parallel` is 2, which does not divide the 3 devices"),
        (["-c", "strategies/tp", "--devices", "4", "--rows-per-step", "6"], "2 groups of devices x data.batch_size 2"),
        (["--devices", "2", "--nodes", "2", "--master", "a:port", "--node-rank", "1", "--job", "x"], "--master a:port"),
        (["--devices", "2", "--nodes", "2", "--master", "a", "--node-rank", "2", "--job", "x"], "allowed: 0 to 1"),
        (["--devices", "2", "--nodes", "2", "--master", "a", "--local-addr", "b"], "--local-addr"),
    ],
)
def test_refused_by_launch(folder: Path, capsys: pytest.CaptureFixture[str], words: list[str], text: str) -> None:
    assert main(["launch", "torchrun", "-c", "tiny", *words]) == 2
    (line,) = said(capsys.readouterr().err)
    assert text in line


def test_rows_of_a_step_count_ranks_that_share_them_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-c", "strategies/tp", "--devices", "4", "--rows-per-step", "8", "--dry-run"]
    assert main(["launch", "torchrun", "-c", "tiny", *words]) == 0
    text = capsys.readouterr().out
    assert "8 rows an optimizer step" in text
    assert "--trainer.accumulate_grad_batches 2 " in text


# --- with real processes --------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def start(folder: Path, *words: str, **variables: object) -> subprocess.Popen[str]:
    told = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | {key: str(value) for key, value in variables.items()}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        cwd=folder,
        env=os.environ | told,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: subprocess.Popen[str], seconds: float = 500) -> tuple[int, list[str], str]:
    try:
        _, err = process.communicate(timeout=seconds)
    finally:
        process.kill()
    return process.returncode, said(err), err


@pytest.mark.slow
@pytest.mark.cluster
def test_a_recipe_for_one_device_under_torchrun(folder: Path) -> None:
    """Each process would take itself for the only one, and train a model of its own."""
    launcher = ["torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    status, lines, err = ended(start(folder, *launcher, "-m", "recipes", "fit", "-c", "tiny"))
    assert status == 1, err  # torchrun's
    assert len(lines) == 1
    assert "a launcher started 2 processes, but trainer.devices x trainer.num_nodes is 1" in lines[0]
    assert not (folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.cluster
def test_a_mistake_under_the_launcher_is_said_once_and_not_tried_again(folder: Path) -> None:
    words = ["--devices", "2", "--preflight", "0", "--data.sources.0.path", "nothing.jsonl"]
    status, lines, err = ended(start(folder, "recipes", "launch", "torchrun", "-c", "tiny", *words))
    assert status == 2, err
    assert len(lines) == 1
    assert "nothing.jsonl" in lines[0]
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.cluster
def test_a_mistake_that_all_ranks_find_is_said_by_rank_0(folder: Path) -> None:
    """Found when the processes stand, in Lightning's own launcher."""
    endless = ["--trainer.max_steps", "-1", "--trainer.max_epochs", "-1"]
    schedule = ["--model.schedule", "{class_path: llm_modules.schedules.WarmupCosine, init_args: {warmup: 1}}"]
    words = ["-c", "strategies/ddp", "--trainer.devices", "2", *endless, *schedule]
    status, lines, err = ended(start(folder, "recipes", "fit", "-c", "tiny", *words))
    assert status == 2, err
    assert len(lines) == 1, err
    assert lines[0].startswith("schedule: the run has no length")


@pytest.mark.slow
@pytest.mark.cluster
def test_a_mistake_that_one_rank_alone_finds_names_it(folder: Path) -> None:
    """A file is missing on the second of two nodes, which are two folders."""
    (folder / "other").mkdir()
    (folder / "other/tiny.yaml").write_text(RECIPE)
    words = ["-c", "strategies/ddp", "--nodes", "2", "--devices", "1", "--preflight", "0", "--job", "x"]
    words += ["--master", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1", "--node-rank"]
    nodes = [
        start(place, "recipes", "launch", "torchrun", "-c", "tiny", *words, str(rank))
        for rank, place in enumerate((folder, folder / "other"))
    ]
    (status, lines, err), (other_status, other_lines, other_err) = [ended(node) for node in nodes]
    assert (status, other_status) == (2, 2), (err, other_err)
    assert len(other_lines) == 1, other_err
    assert other_lines[0].startswith(f"rank 1 on {socket.gethostname()}: ")
    assert "rows.jsonl" in other_lines[0]
    assert lines == [f"node {socket.gethostname()}: another node has ended; see its log, which says why"], err
    assert not (folder / "runs").exists()


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("missing", ["the module", "what it imports"])
def test_a_module_is_missing_on_one_node(folder: Path, missing: str) -> None:
    """The nodes are two folders; what rank 0 alone has is in `more`."""
    nodes = [folder / name for name in ("a", "b")]
    for node in nodes:
        node.mkdir()
        (node / "tiny.yaml").write_text(RECIPE)
        (node / "my_objective.py").write_text(
            "import only_on_one\nfrom llm_modules.objectives import NextToken as Mine\n"
        )
    (folder / "more").mkdir()
    (folder / "more/only_on_one.py").write_text("")
    if missing == "the module":
        (nodes[1] / "my_objective.py").unlink()
    words = ["--timeout", "180", "-c", "tiny", "--model.objective", "my_objective.Mine", "--runs_dir", str(folder)]
    port = free_port()
    processes = []
    for rank, node in enumerate(nodes):
        told = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        path = f"{ROOT}:{folder / 'more'}" if rank == 0 else str(ROOT)
        command = ["recipes", "check", "cluster", "--mebibytes", "1", *words]
        processes.append(start(node, *command, **told, PYTHONPATH=path))
    results = [ended(process) for process in processes]
    assert [status for status, _, _ in results] == [2, 2], results
    (line,) = results[0][1]
    host = socket.gethostname()
    if missing == "the module":
        assert "module my_objective is " in line
        assert f"missing on rank 1 ({host})" in line
    else:
        assert line == f"rank 1 on {host}: module my_objective cannot be imported: No module named 'only_on_one'"
    assert results[1][1] == []


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("rank", "text"),
    [
        (0, "the 2 nodes did not meet"),
        (1, "not reached: the master"),
    ],
)
def test_a_node_that_never_comes(folder: Path, rank: int, text: str) -> None:
    """Under torchrun, which by itself waits ten minutes and then shows a traceback."""
    place = ["--nodes", "2", "--devices", "1", "--master", f"127.0.0.1:{free_port()}", "--node-rank", str(rank)]
    words = [*place, "--job", "never", "--join", "5", "--local-addr", "127.0.0.1"]
    status, lines, err = ended(start(folder, "recipes", "launch", "torchrun", "-c", "tiny", *words))
    assert status == 2, err
    (line,) = lines
    assert text in line
    assert "Traceback" not in err
