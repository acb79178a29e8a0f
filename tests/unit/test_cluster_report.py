"""What is said of processes that do not go together."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.check_cluster import _device
from recipes.cluster_folder import SharedFolder
from recipes.cluster_report import code_digests, machines, problems, versions
from recipes.cluster_world import World, find_world, spans
from recipes.compose import compose
from recipes.errors import UserError


def report(host: str, **changes: object) -> dict[str, object]:
    return {
        "host": host,
        "address": "10.0.0.1",
        "interface": "eth0",
        "device": "H100",
        "device_id": "",
        "versions": {"torch": "2.13.0", "peft": "0.21"},
        "code": {"recipes/cli.py": "aa"},
        "recipe": {"recipe": "bb"},
        "problem": "",
    } | changes


def test_all_is_well() -> None:
    assert problems({rank: report(f"n{rank // 2}") for rank in range(4)}) == []


def test_versions_that_differ() -> None:
    reports = {rank: report("a") for rank in range(2)}
    reports |= {rank: report("b", versions={"torch": "2.12.0"}) for rank in (2, 3)}
    (line,) = problems(reports)
    assert line == (
        "package versions differ: peft is 0.21 on ranks 0-1 (a), missing on ranks 2-3 (b); torch is 2.13.0 on ranks "
        "0-1 (a), 2.12.0 on ranks 2-3 (b); install the same on all nodes"
    )


def test_code_that_differs() -> None:
    (line,) = problems({0: report("a"), 1: report("b", code={"recipes/cli.py": "cc"})})
    assert line.startswith("the code differs: recipes/cli.py is aa on rank 0 (a), cc on rank 1 (b)")


def test_many_differences_are_cut() -> None:
    code = {f"{i}.py": "x" for i in range(9)}
    (line,) = problems({0: report("a", code=code), 1: report("b", code={})})
    assert "4.py" in line
    assert "5.py" not in line
    assert "and 4 more" in line


def test_what_a_process_found_itself() -> None:
    reports = {0: report("a"), 1: report("b", problem="no space"), 2: report("b", problem="no space")}
    assert problems(reports) == ["ranks 1-2 on b: no space"]


def test_a_gpu_for_two() -> None:
    reports = {0: report("a", device_id="u1"), 1: report("a", device_id="u1"), 2: report("b", device_id="u1")}
    assert problems(reports) == ["ranks 0-1 on a: all have the same GPU; give each task its own"]


def test_machines() -> None:
    reports = {0: report("a"), 1: report("a"), 2: report("b", device="A100")}
    assert machines(reports) == ["a: ranks 0-1; H100 x 2; eth0 10.0.0.1", "b: rank 2; A100 x 1; eth0 10.0.0.1"]


def test_spans() -> None:
    assert spans([0, 1, 2, 5, 7, 8]) == "0-2, 5, 7-8"
    assert spans([]) == ""


def test_missing_ranks_are_named_with_their_node() -> None:
    world = World(0, 8, 0, 4, "a", 1)
    assert world.names([4, 5, 6, 7]) == "ranks 4-7 of 8 (node 1)"
    assert World(0, 2, 0, 2, "a", 1).names([1]) == "rank 1 of 2"


def test_digests_follow_the_code_and_the_users_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "loss_of_mine.py").write_text("a = 1\n")
    (tmp_path / "r.yaml").write_text(
        "model: {class_path: x_not_here.Y, init_args: {objective: {class_path: loss_of_mine.L}}}\n"
    )
    first = code_digests(compose(["r"]))
    assert first["module x_not_here"] == "missing"
    assert "recipes/cluster_report.py" in first
    assert code_digests(compose(["r"])) == first
    (tmp_path / "loss_of_mine.py").write_text("a = 2\n")
    changed = code_digests(compose(["r"]))
    assert {name for name in changed if changed[name] != first[name]} == {"module loss_of_mine"}


def test_versions_are_those_installed() -> None:
    import torch

    assert versions()["torch"] == torch.__version__


def test_devices() -> None:
    assert _device("cpu") == "cpu"
    assert _device("gpu") == "cuda"  # whether there is one is said with the rank's name


def test_a_folder_that_all_write_to_leaves_nothing_behind(tmp_path: Path) -> None:
    first, second = SharedFolder(tmp_path / "a/runs"), SharedFolder(tmp_path / "a/runs")
    second.name = first.make()
    assert (first.use(0), second.use(1)) == ("", "")
    assert first.unseen(World(0, 2, 0, 1, "a", 1)) == []
    first.remove()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.cluster_folder._PATIENCE", 0.2)
    first, second = SharedFolder(tmp_path / "runs"), SharedFolder(tmp_path / "elsewhere")
    second.name = first.make()
    assert first.use(0) == ""
    assert "share" in second.use(1)
    (line,) = first.unseen(World(0, 2, 0, 1, "a", 1))
    assert "rank 1 of 2 (node 1)" in line


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    folder = SharedFolder(tmp_path / "runs")
    assert folder.make() == ""
    assert "cannot be written: Not a directory" in folder.use(0)
    folder.remove()
    assert (tmp_path / "runs").read_text() == "a file"


def test_a_launcher_that_says_half(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR"):
        find_world()
