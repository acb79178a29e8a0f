"""report.html: what it reads from a run's folder, what it shows, and that nothing in it is executed."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from callback_runs import TinyModule, make_trainer

from callbacks import Memory, RunReport, SpikeGuard, Throughput
from callbacks.report_data import MOST_POINTS, differing_settings, read_columns, read_run
from callbacks.report_page import render
from callbacks.spike_guard import UnstableTraining

EVIL = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "sft" / "x" / "0"
    arguments: dict[str, Any] = {"max_steps": 12, "limit_val_batches": 2, "val_check_interval": 4}
    make_trainer(folder, Throughput(peak_flops=1e9), Memory(), **arguments).fit(TinyModule())
    (folder / "environment.json").write_text(json.dumps({"recipe": "sft/x", "command": ["recipes", EVIL]}))
    (folder / "config.yaml").write_text(f"a: {json.dumps(EVIL)}\ntrainer: {{max_steps: 12}}\n")
    (folder / "audit.json").write_text(
        json.dumps({"lines": [EVIL], "sample": f"see ⟦{EVIL}⟧ \x1b[32mgreen\x1b[0m", "fatal": []})
    )
    rows = [
        {"step": step, "row": row, "prompt": prompt, "text": f"{EVIL} at {step}"}
        for step in (0, 6, 12)
        for row, prompt in enumerate(["plain", [{"role": "user", "content": EVIL}]])
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 18, "to')
    return folder


class Page(HTMLParser):
    """Tags and texts of a page, as Python's own parser sees them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def data(self) -> Any:
        place = next(i for i, text in enumerate(self.texts) if text.startswith("[{"))
        return json.loads(self.texts[place])


def test_the_page_shows_every_file_of_the_run_and_loads_nothing(run: Path) -> None:
    text = render([read_run(run)])
    page = Page(text)
    assert not {name for _, attributes in page.tags for name in attributes} & {"src", "href", "style", "onerror"}
    assert not re.search(r"url\(|@import|fetch\(|https?://(?!www\.w3\.org/2000/svg)", text)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert tags.count("mark") == 3  # the word itself, and the two of the sample
    everything = "\n".join(page.texts)
    assert f"{EVIL} at 0" in everything
    assert f"{EVIL} at 12" in everything
    assert f"user: {EVIL}" in everything
    # six texts, a prompt, the command, a line of the audit and its sample
    assert everything.count(EVIL) == 10
    assert json.dumps(EVIL) in everything, "the config"
    (columns,) = [data["columns"] for data in page.data]
    assert columns["step"] == list(range(1, 13))
    assert columns["train/loss"][0] > 0
    assert [i for i, value in enumerate(columns["val/loss"]) if value is not None] == [3, 7, 11]
    assert [text for text in page.texts if text in ("finished", "unfinished")] == ["unfinished"]


def test_scripts_of_the_page_are_the_only_ones_the_browser_may_run(run: Path) -> None:
    """The policy names the script by its hash; computed here by another tool."""
    text = render([read_run(run)])
    script = text.rpartition("<script>")[2].partition("</script>")[0]
    hashed = subprocess.run(
        "openssl dgst -sha256 -binary | base64", shell=True, input=script.encode(), capture_output=True, check=True
    )
    policy = next(attrs["content"] for tag, attrs in Page(text).tags if attrs.get("http-equiv"))
    assert policy is not None
    assert f"script-src 'sha256-{hashed.stdout.decode().strip()}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs the browser chromium")
@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_a_browser_draws_the_curves_and_is_not_owned(run: Path, tmp_path: Path, several: bool) -> None:
    runs = [read_run(run)]
    if several:
        runs.append(read_run(run, name=EVIL))
    page = tmp_path / "report.html"
    page.write_text(render(runs), encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=3000", "--dump-dom", page.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout
    assert "<title>owned" not in dom
    assert dom.count("<svg") == 5  # loss, throughput, memory, MFU, useful share
    assert dom.count('class="curve') == 7 * len(runs)  # of loss and memory two each
    assert "NaN" not in dom.partition("<svg")[2]


def test_several_runs_are_compared(run: Path, tmp_path: Path) -> None:
    other = run.with_name("1")
    shutil.copytree(run, other)
    (other / "config.yaml").write_text((run / "config.yaml").read_text().replace("12", "24"))
    (other / "finished").touch()
    runs = [read_run(run), read_run(other)]
    assert [item.name for item in runs] == ["sft/x #0", "sft/x #1"]
    assert differing_settings(runs) == [("trainer.max_steps", ["12", "24"])]
    page = Page(render(runs))
    assert [data["name"] for data in page.data] == ["sft/x #0", "sft/x #1"]
    assert sum(tag == "mark" for tag, _ in page.tags) == 3, "the same data is shown once"
    assert [text for text in page.texts if text in ("finished", "unfinished")] == ["unfinished", "finished"]


def test_a_run_of_metrics_alone_and_one_with_broken_files(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").write_bytes(b"step,epoch,time,train/loss\n0,0,100.0,nan\n1,0,101.0,2.5\n2,0,10")
    run = read_run(tmp_path)
    assert run.columns["train/loss"] == [None, 2.5]
    assert run.problems == []
    assert "Train loss" in render([run])
    (tmp_path / "environment.json").write_text("{")
    (tmp_path / "samples.jsonl").write_text('{"step": 1}\n')
    problems = read_run(tmp_path).problems
    assert problems[0].startswith("environment.json: cannot be read: ")
    assert problems[1].startswith("samples.jsonl, line 1: cannot be read: ")
    (tmp_path / "metrics.csv").write_bytes(b"step,epoch,time\n")
    assert read_run(tmp_path).columns == {}
    assert "<h1>" in render([read_run(tmp_path)])


def test_says_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        read_run(tmp_path / "x")
    with pytest.raises(ValueError, match=r"no metrics.csv in it"):
        read_run(tmp_path)


def test_long_curves_are_thinned_but_keep_their_extremes_and_validations() -> None:
    rows = ["step,time,train/loss,val/loss"]
    for step in range(20_000):
        loss = 9.0 if step == 7_777 else 0.5 if step == 12_345 else 3.0
        rows.append(f"{step},{step / 10},{loss},{2.0 if step % 4000 == 3999 else ''}")
    columns = read_columns("\n".join([*rows, ""]).encode(), [])
    assert len(columns["step"]) <= MOST_POINTS + 10
    assert {step for step in columns["step"] if step is not None} >= {1, 20_000, 7_778, 12_346}
    assert [value for value in columns["val/loss"] if value] == [2.0] * 5
    assert columns["step"] == sorted(columns["step"], key=float)  # type: ignore[arg-type]


def test_the_pause_between_a_kill_and_the_resume_is_not_training_time() -> None:
    times = [100.0, 101.0, 102.0, 9000.0, 9001.0]
    content = "step,time\n" + "".join(f"{step},{time}\n" for step, time in enumerate(times))
    assert read_columns(content.encode(), [])["elapsed"] == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_the_callback_writes_it_however_the_run_ends(tmp_path: Path) -> None:
    make_trainer(tmp_path / "good", RunReport(), max_steps=3).fit(TinyModule())
    assert ">finished<" in (tmp_path / "good" / "report.html").read_text()
    with pytest.raises(UnstableTraining):
        make_trainer(tmp_path / "bad", RunReport(), SpikeGuard(), max_steps=9).fit(TinyModule(poison=5))
    assert ">failed<" in (tmp_path / "bad" / "report.html").read_text()
    assert list(tmp_path.glob("*/.*")) == []


def test_a_report_that_cannot_be_written_hides_no_error_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = Path.write_text

    def full(path: Path, *arguments: Any, **options: Any) -> int:
        if "report.html" in path.name:
            real(path, "half", encoding="utf-8")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", full)
    make_trainer(tmp_path / "good", RunReport(), max_steps=3).fit(TinyModule())
    with pytest.raises(UnstableTraining):
        make_trainer(tmp_path / "bad", RunReport(), SpikeGuard(), max_steps=9).fit(TinyModule(poison=5))
    assert capsys.readouterr().err.count("report.html: cannot be written: No space left on device") == 2
    assert not list(tmp_path.rglob(".report.html-partial"))
