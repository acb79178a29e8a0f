"""The wheel, installed: it carries the configs, and a user's own class trains from an empty folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from recipes.config_names import all_recipes

ROOT = Path(__file__).resolve().parent.parent.parent

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("hatchling", reason="needs hatchling (extra dev) to build the wheel")
    build = "import sys; from hatchling.build import build_wheel; build_wheel(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(folder)], cwd=ROOT, check=True, capture_output=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def command(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`recipes` of an environment that has the wheel, and this environment's libraries, but not this checkout."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False)
    python = folder / "bin/python"
    where = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True,
        capture_output=True,
        text=True,
    )
    site = Path(where.stdout.strip())
    # A .pth file's folder is searched for modules, but its own .pth files (the editable install) are not read.
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    return folder / "bin/recipes"


def run(command: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([command, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_it_carries_configs_and_sweeps_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"recipes", "llm_modules", "callbacks"}
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"recipes/{path.relative_to(ROOT).as_posix()}" in names
    assert any(name.endswith("entry_points.txt") for name in names)
    assert not [name for name in names if "__pycache__" in name or name.startswith("recipes/tests")]


def test_list_from_an_empty_folder(command: Path, tmp_path: Path) -> None:
    listed = run(command, tmp_path, "list", "--names")
    assert listed.returncode == 0, listed.stderr
    assert set(listed.stdout.split()) == {recipe.name for recipe in all_recipes()}
    shown = run(command, tmp_path, "show", "models/llama-1m")
    assert "site-packages/recipes/configs/models" in shown.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_users_own_loss(command: Path, tmp_path: Path) -> None:
    rows = [json.dumps({"text": f"row number {i}, " * 9}) for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    (tmp_path / "my_loss.py").write_text(
        "from llm_modules.objectives import NextToken\n\n\n"
        "class MyLoss(NextToken):\n"
        "    def __call__(self, scores):\n"
        "        print('my own loss')\n"
        "        return super().__call__(scores)\n"
    )
    (tmp_path / "mine.yaml").write_text(
        "# Mine.\ntokenizer: builtin:bytes\nsequence_length: 64\n"
        "model:\n  class_path: llm_modules.LanguageModelModule\n  init_args:\n"
        "    backbone: models/llama-1m.yaml\n    objective: my_loss.MyLoss\n"
        "data:\n  class_path: llm_modules.data.TextDataModule\n"
        "  init_args: {sources: [{path: rows.jsonl}], batch_size: 2}\n"
        "trainer: {max_steps: 2, accelerator: cpu, log_every_n_steps: 1}\n"
    )
    done = run(command, tmp_path, "fit", "-c", "mine")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("my own loss") >= 2
    assert len((tmp_path / "runs/mine/0/metrics.csv").read_text().splitlines()) == 3
    assert (tmp_path / "runs/mine/0/export/model.safetensors").exists()
