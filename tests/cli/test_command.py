"""What answers at once: --help, --version, list, show, completion, fit --help; none of them imports torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import recipes
from recipes.__main__ import main
from recipes.config_names import all_recipes

SECONDS = 0.5


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        [],
        ["--version"],
        ["list"],
        ["list", "--parts"],
        ["show", "precision/bf16-mixed", "-c", "strategies/ddp", "--trainer.devices", "2"],
        ["fit", "--help"],
        ["predict", "-h"],
        ["completion", "bash"],
        ["completion", "words", "--", "fit", "-c", "pre"],
        ["completion", "words", "--", "generate", "--"],
        ["list", "--help"],
        ["no-such-verb"],
    ],
)
def test_nothing_heavy_is_imported(words: list[str], folder: Path) -> None:
    code = (
        "import sys; from recipes.__main__ import main; main(sys.argv[1:]);"
        "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse', 'numpy'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    result = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "words", [["--help"], ["list"], ["show", "precision/32-true"], ["--version"], ["fit", "--help"]]
)
def test_it_answers_at_once(words: list[str], folder: Path) -> None:
    took = []
    for _ in range(3):
        before = os.times()
        subprocess.run([sys.executable, "-m", "recipes", *words], check=True, capture_output=True)
        after = os.times()
        # Seconds of the processor, which an idle machine's clock shows too: other tests may be running beside this one.
        took.append(after.children_user + after.children_system - before.children_user - before.children_system)
    assert min(took) <= SECONDS


def test_help_names_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    verbs = {line.split()[0] for line in text.partition("verbs:")[2].partition("\n\n")[0].splitlines() if line}
    assert {"fit", "validate", "test", "predict", "generate", "export", "list", "show", "completion"} <= verbs
    assert all(len(line) <= 120 for line in text.splitlines())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"litrecipes {recipes.__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fti"], "recipes: fti: no such verb (did you mean `fit`?); `recipes --help` lists them"),
        (["list", "--parst"], "recipes: --parst: not understood (did you mean `--parts`?); see recipes list --help"),
        (["show"], "recipes: the following arguments are required: name; see recipes show --help"),
        (["fit"], "recipes: -c: a recipe must be named, such as recipes fit -c pretrain/quickstart; see recipes list"),
        (["fit", "sft/x"], "recipes: sft/x: not a flag; a recipe is named by -c, a value is set by --key value"),
        (["fit", "-c"], "recipes: -c: a value must follow (write -c=VALUE where it begins with a dash)"),
        (["fit", "--trainer.x", "--y"], "recipes: --trainer.x: a value must follow (write --trainer.x=VALUE where"),
        (["fit", "--run", "x"], "recipes: --run x: the number of a run is asked for, such as --run 3"),
        (["fit", "--dry-run=1"], "recipes: --dry-run: a switch, it takes no value"),
        (["fit", "-x", "1"], "recipes: -x: no such flag"),
        (["fit", "-c", "sft/no"], "recipes: sft/no: no such config"),
        (["list", "nostage"], "recipes: nostage: no recipe has this stage"),
        (["completion", "ksh"], "recipes: argument shell: invalid choice: 'ksh'"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(message)
    assert captured.err.count("\n") == 1
    assert captured.out == ""


class TestList:
    def test_every_recipe_with_what_it_needs(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["list"]) == 0
        text = capsys.readouterr().out
        for recipe in all_recipes():
            assert f"  {recipe.name} " in text
        assert main(["list", "--names"]) == 0
        assert capsys.readouterr().out.split() == [recipe.name for recipe in all_recipes()]

    def test_the_users_own_configs(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "configs/sft").mkdir(parents=True)
        (folder / "configs/sft/mine.yaml").write_text("# Does my thing.\n# Needs: a GPU\nmodel: {}\n")
        (folder / "configs/odd.yaml").write_text("# Odd.\nmodel: {}\n")
        (folder / "configs/part.yaml").write_text("trainer: {}\n")
        assert main(["list", "sft"]) == 0
        lines = [line.strip() for line in capsys.readouterr().out.splitlines()]
        place = lines.index(next(line for line in lines if line.startswith("sft/mine")))
        assert lines[place].split(maxsplit=1)[1] == "Does my thing."
        assert lines[place + 1] == "needs: a GPU"
        main(["list", "--names", "--parts"])
        names = capsys.readouterr().out.split()
        assert names.index("odd") < names.index("part")


class TestShow:
    def test_the_file_what_it_resolves_to_and_where_from(
        self, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder / "r.yaml").write_text(
            "# R.\nsequence_length: 8\nmodel:\n  class_path: m.M\n  init_args:\n"
            '    parts: [{a: 1, b: [2, {c: x}]}, two]\n    text: "a: b\\nc"\n    empty: []\n'
        )
        assert main(["show", "r", "-c", "precision/bf16-mixed", "--model.depth", "3"]) == 0
        text = capsys.readouterr().out
        assert (folder / "r.yaml").read_text() in text
        resolved = text.partition("# --- resolves to\n")[2]
        assert yaml.safe_load(resolved) == {
            "sequence_length": 8,
            "model": {
                "class_path": "m.M",
                "init_args": {
                    "parts": [{"a": 1, "b": [2, {"c": "x"}]}, "two"],
                    "text": "a: b\nc",
                    "empty": [],
                    "depth": 3,
                    "sequence_length": 8,
                },
            },
            "trainer": {"precision": "bf16-mixed"},
        }
        origins = {line.split(":")[0].strip(): line.partition("  # ")[2] for line in resolved.splitlines()}
        assert origins["class_path"] == "r.yaml:4"
        assert origins["depth"] == "--model.depth"
        assert origins["precision"].endswith("configs/precision/bf16-mixed.yaml:5")

    @pytest.mark.parametrize("name", ["models/llama-1m", "generate/greedy", "strategies/ddp"])
    def test_parts_can_be_shown(self, name: str, folder: Path) -> None:
        assert main(["show", name]) == 0

    def test_secrets_are_not_shown(
        self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("MY_API_KEY", "hush")
        (folder / "r.yaml").write_text("trainer: {logger: {init_args: {api_key: '${oc.env:MY_API_KEY}'}}}")
        assert main(["show", "r"]) == 0
        assert "hush" not in capsys.readouterr().out


class TestHelp:
    def test_fit_help_is_readable(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["fit", "--help"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) <= 60
        assert all(len(line) <= 120 for line in lines)
        for word in ("--ckpt_path", "--dry-run", "--trainer.max_steps", "prepare data"):
            assert any(word in line for line in lines)

    def test_of_a_key(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (folder / "r.yaml").write_text(
            "model:\n  class_path: llm_modules.LanguageModelModule\n"
            "  init_args: {backbone: models/llama-1m.yaml, optimizer: {class_path: torch.optim.AdamW}}\n"
        )
        cases = {
            "trainer.max_steps": ["--trainer.max_steps  (a whole number; default -1)"],
            "checkpoint": ["--checkpoint.every_n_steps"],
            "model": [
                "--model.backbone  (a mapping of source, config, ",
                "--model.optimizer  (a class_path of Optimizer;",
            ],
            "model.backbone": ["--model.backbone.attention"],
            "model.optimizer": ["--model.optimizer.lr"],
            "model.optimizer.weight_decay": ["--model.optimizer.weight_decay"],
            "full": ["--trainer.devices", "--model.optimizer.lr"],
        }
        for key, expected in cases.items():
            assert main(["fit", "-c", "r", "--help", key]) == 0
            text = capsys.readouterr().out
            assert all(word in text for word in expected), (key, text)
        assert main(["fit", "-c", "r", "--help", "model.backbon"]) == 2
        assert "did you mean `model" in capsys.readouterr().err


class TestCompletion:
    @pytest.mark.parametrize(
        ("typed", "expected"),
        [
            (["sh"], ["show"]),
            (["fit", "-c", "precision/bf16"], ["precision/bf16-mixed", "precision/bf16-true"]),
            (["fit", "--ckpt_path", "l"], ["last"]),
            (["fit", "-c", "precision/32-true", "--trainer.p"], ["--trainer.precision"]),
            (["fit", "-c", "precision/32-tr", "--seq"], ["--sequence_length"]),
            (["fit", "--dry"], ["--dry-run"]),
            (["show", "generate/gr"], ["generate/greedy"]),
            (["list", "--na"], ["--names"]),
            (["completion", "f"], ["fish"]),
            (["nothing", "x"], []),
        ],
    )
    def test_words(
        self, typed: list[str], expected: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["completion", "words", "--", *typed]) == 0
        assert capsys.readouterr().out.split() == expected

    def test_in_bash(self, folder: Path) -> None:
        bash = shutil.which("bash")
        if bash is None:
            pytest.skip("no bash here")
        script = (
            f'recipes() {{ {sys.executable} -m recipes "$@"; }}\n'
            'eval "$(recipes completion bash)"\n'
            "COMP_WORDS=(recipes fit -c precision/bf); COMP_CWORD=3; _recipes_complete; echo ${COMPREPLY[@]}\n"
            'COMP_WORDS=(recipes ""); COMP_CWORD=1; _recipes_complete; echo ${COMPREPLY[@]}\n'
        )
        result = subprocess.run([bash, "-c", script], capture_output=True, text=True, check=True)
        first, second = result.stdout.splitlines()
        assert first.split() == ["precision/bf16-mixed", "precision/bf16-true"]
        assert {"fit", "list"} <= set(second.split())

    @pytest.mark.parametrize("shell", ["zsh", "fish"])
    def test_other_shells_accept_the_script(
        self, shell: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        main(["completion", shell])
        text = capsys.readouterr().out
        assert "recipes completion words --" in text
        if shutil.which(shell) is None:
            pytest.skip(f"no {shell} here")
        (tmp_path / "script").write_text(text)
        subprocess.run([str(shutil.which(shell)), "-n", str(tmp_path / "script")], check=True)
