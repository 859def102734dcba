"""The report of a run, from what lies in its folder."""

import html.parser
import json
import math
import re

import pytest
from PIL import Image

import train.report_page
from train.__main__ import _report
from train.report_curves import running_mean, smoothing
from train.report_page import main, write_report
from train.run_log import RunLogError, read_run


def line(step, **changes):
    values = {
        "time": 1.8e9 + step,
        "step": step,
        "stage_name": "early" if step <= 20 else "stable",
        "epoch": step / 10,
        "loss": 10.0 / step,
        "target_cosine": 0.01 * step,
        "expectation_cosine": None,
        "learning_rate": 1e-3,
        "gradient_norm": 2.0,
        "head_gradient_norm": 1.0,
        "images": 640,
        "images_per_second": 64.0,
        "skipped_steps": 0,
        "bad_records": 0,
        "step_seconds": {"data": 0.1, "forward": 0.4, "total": 1.0},
        "eta_seconds": 400.0 - step,
        "checkpoint_step": None if step < 15 else 10.0 * (step // 10),
        "checkpoint_blocked_seconds": 0.5,
        "checkpoint_write_seconds": 2.0,
        "checkpoint_score": None,
        "evaluation_step": None if step < 15 else 10.0 * (step // 10),
        "evaluation_accuracy": {} if step < 15 else {"lfw": 0.9},
    }
    return {**values, **changes}


def write_run(folder, lines, skipped=(), summary=None, recipe="output: run\n", tail=""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines) + tail)
    (folder / "recipe.yaml").write_text(recipe)
    if skipped:
        (folder / "skipped_steps.jsonl").write_text("".join(json.dumps(each) + "\n" for each in skipped))
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Logged every 5 steps to 40; killed after 30 and gone on from 22, in whose first lines stand other losses; a step skipped."""
    lines = [line(step) for step in range(5, 31, 5)] + [line(step, loss=0.5, skipped_steps=step == 40) for step in range(25, 41, 5)]
    skip = {"step": 38, "stage": "stable", "reason": "spike", "loss": 9.5, "running_mean": 0.5, "ranks": [], "records": {"0": ["a"]}}
    recipe = "output: run\ndata:\n  path: s3://me:hunter2@bucket/shards?X-Amz-Signature=0123\n  note: <b>bold</b>\n"
    summary = {
        "steps": 40,
        "images_per_second": 61.0,
        "training_seconds": 80.0,
        "stage_losses": {"early": {"start": 3.0, "end": 1.25}, "stable": {"start": 1.0, "end": 0.75}},
        "pairs": {"accuracy": 0.9875, "std": 0.01, "count": 1200},
        "pair_sets": {"lfw": {"accuracy": 0.9875, "std": 0.01, "count": 1200}},
        "pair_sets_ema": {},
    }
    return write_run(tmp_path_factory.mktemp("report") / "run", lines, [skip], summary, recipe)


@pytest.fixture(scope="module")
def written(run):
    """The page's HTML."""
    return write_report(run).read_text()


class _Page(html.parser.HTMLParser):
    """What a page shows and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.text, self.loads, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "srcset", "href")]
        if tag == "style":
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open and tag == self.open[-1]:
            self.open.pop()

    def handle_data(self, data):
        if not self.open and data.strip():
            self.text.append(data.strip())


def test_the_last_word_on_a_step_that_was_taken_twice_counts(run):
    log = read_run(run)
    assert [entry.step for entry in log.entries] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [entry.number("loss") for entry in log.entries][3:5] == [0.5, 0.5]
    assert log.setbacks == [30]
    assert log.restarts == 1
    assert [(span.name, span.start, span.stop) for span in log.stages] == [("early", 0, 20), ("stable", 20, 40)]


def test_steps_of_the_killed_process_that_the_next_one_logs_at_other_places_are_forgotten(tmp_path):
    lines = [line(step) for step in (4, 8, 12, 16)] + [line(step) for step in (10, 20)]
    assert [entry.step for entry in read_run(write_run(tmp_path / "run", lines)).entries] == [4, 8, 10, 20]


def test_the_page_says_what_became_of_the_run(run, written):
    page = _Page(written)
    assert f"{run}" in page.text[0]
    for text in (
        "complete: 40 steps",
        "98.75 %",
        "std 1.00, 1,200 pairs",
        "61",
        "1:20 of training",
        "0.5000",
        "3.0000",
        "1.2500",
        "spike",
        "9.5000",
    ):
        assert text in page.text, text
    assert page.text[page.text.index("skipped steps") + 1] == "1"
    assert page.text[page.text.index("restarts") + 1] == "1"


def test_the_page_needs_no_other_file_and_asks_no_server(written):
    page = _Page(written)
    assert page.loads
    assert all(value.startswith("data:image/png;base64,") for value in page.loads)
    assert not re.search(r"https?://|<script|@import|url\(", written)


def test_secrets_are_hidden_and_markup_in_a_recipe_is_text(written):
    recipe = written.split("<h2>Recipe</h2>")[1]
    assert "hunter2" not in written
    assert "0123" not in recipe
    assert "s3://***@bucket/shards?X-Amz-Signature=***" in recipe
    assert "&lt;b&gt;bold&lt;/b&gt;" in recipe


def test_every_curve_is_a_picture_with_something_drawn_in_it(run, written):
    pictures = {path.stem: Image.open(path).convert("RGB") for path in (run / "curves").glob("*.png")}
    assert set(pictures) == {"loss", "cosines", "learning_rate", "throughput", "time", "gradient_norm", "accuracy"}
    for name, picture in pictures.items():
        assert picture.size == (972, 540)
        blue = sum(count for count, color in picture.getcolors(2**20) if color == (0x00, 0x72, 0xB2))
        assert blue > 100, name  # the first curve


def test_arunning_mean_is_that_of_what_is_finite_around():
    values = [1.0, 2.0, math.nan, 4.0, 9.0]
    assert running_mean(values, 3) == pytest.approx([1.5, 1.5, math.nan, 6.5, 6.5], nan_ok=True)
    assert [smoothing(points) for points in (1, 400, 4000)] == [1, 1, 20]


def test_new_keys_have_curves_and_figures_of_their_own(tmp_path):
    more = {
        "restarts": 3,
        "target_steps": 400,
        "remaining_seconds": 125.0,
        "utilization": 0.41,
        "memory": {"used": 6e10, "total": 8e10},
        "outcomes": {"applied": 4, "spike": 1},
    }
    lines = [line(step, **more) for step in (5, 10)]
    page = _Page(write_report(write_run(tmp_path / "run", lines)).read_text())
    assert {path.stem for path in (tmp_path / "run/curves").iterdir()} > {"memory", "utilization"}
    assert "not complete: its log ends at step 10 of 400, in stage early; 2:05 were left" in page.text
    assert page.text[page.text.index("MFU") + 1] == "41%"
    assert page.text[page.text.index("restarts") + 1] == "3"
    assert page.text[page.text.index("skipped steps") + 1] == "2"


@pytest.mark.parametrize("count", [1, 2], ids=["one line", "two lines"])
def test_a_run_of_hardly_any_line_without_a_finite_loss_has_a_page(count, tmp_path):
    nothing = dict.fromkeys(("loss", "target_cosine", "gradient_norm", "head_gradient_norm"))
    lines = [line(step, **nothing, step_seconds={}) for step in range(1, count + 1)]
    page = _Page(write_report(write_run(tmp_path / "run", lines)).read_text())
    assert page.text[page.text.index("loss") + 1] == "not finite"


def test_a_torn_line_is_passed_over_and_told(tmp_path):
    folder = write_run(tmp_path / "run", [line(5), line(10)], tail='{"time": 1.8e9, "st')
    page = _Page(write_report(folder).read_text())
    assert "1 line of its logs cannot be read" in page.text
    assert read_run(folder).entries[-1].step == 10


def test_the_command_prints_the_page_or_says_in_a_line_what_is_missing(run, tmp_path, capsys):
    assert main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n"
    assert main([str(tmp_path / "nothing")]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path / 'nothing'}: no such folder; expected the output of a run\n"
    assert main([str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}: no metrics.jsonl in it; expected the output of a run that has logged a step\n"
    with pytest.raises(RunLogError, match="holds no complete line"):
        read_run(write_run(tmp_path / "torn", [], tail='{"st'))


def test_a_report_that_fails_is_a_warning_at_the_end_of_a_run(run, monkeypatch):
    said = []
    _report(run, said.append)
    assert said.pop() == f"report in {run / 'report.html'}"

    def fail(folder):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(train.report_page, "write_report", fail)
    _report(run, said.append)
    assert said == [f"warning: no report was written (RuntimeError: no fonts); python -m train report {run} tries again"]
