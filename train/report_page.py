"""``python -m train report``: one page on a run, complete or not, and its curves as pictures."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.output import replace_file
from eval.pictures import DARK, LIGHT, embedded, page
from train.redact import redact
from train.report_curves import curves, picture, smoothing
from train.run_log import RunLog, read_run
from train.table import format_seconds

PAGE, CURVES = "report.html", "curves"
_ERROR = 2
_ROWS = 12  # of a table at most
_UNFINISHED = "not complete"


@dataclass(frozen=True)
class Figure:
    """A number with its name."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of text under column names."""

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""


def write_report(folder: Path) -> Path:
    """Write ``report.html`` and ``curves/*.png`` into a run's output, from what lies there; returns the page.

    The page needs no other file and asks no server for anything. Raises: RunLogError if there is no log; OSError.
    """
    run = read_run(folder)
    (folder / CURVES).mkdir(exist_ok=True)
    pictures = []
    for curve in curves(run):
        light, dark = picture(curve, run, LIGHT), picture(curve, run, DARK)
        replace_file(folder / CURVES / f"{curve.name}.png", light)
        pictures.append(embedded(curve.title, light, dark))
    replace_file(folder / PAGE, _page(run, pictures))
    return folder / PAGE


def _page(run: RunLog, pictures: list[dict[str, str]]) -> str:
    return page(
        Path(__file__).with_name("report_page.html"),
        redact(
            {
                "title": str(run.folder),
                "complete": run.summary is not None,
                "state": _state(run),
                "when": _when(run),
                "warnings": _warnings(run),
                "figures": [vars(figure) for figure in _figures(run)],
                "legend": _legend(run),
                "tables": [vars(table) for table in (_stages(run), _checkpoints(run), _skipped(run)) if table.rows],
                "recipe": run.recipe,
            }
        )
        | {"pictures": pictures},
    )


def _state(run: RunLog) -> str:
    last = run.entries[-1]
    if run.summary is not None:
        return f"complete: {run.summary['steps']:,} steps"
    total, left = last.number("target_steps"), last.remaining_seconds
    of = f" of {total:,.0f}" if math.isfinite(total) else ""
    more = f"; {format_seconds(left)} were left" if math.isfinite(left) else ""
    return f"{_UNFINISHED}: its log ends at step {last.step:,}{of}, in stage {last.stage_name}{more}"


def _warnings(run: RunLog) -> list[str]:
    lines = "line" if run.unreadable == 1 else "lines"
    return [f"{run.unreadable} {lines} of its logs cannot be read"] if run.unreadable else []


def _when(run: RunLog) -> str:
    first, last = (entry.number("time") for entry in (run.entries[0], run.entries[-1]))
    return f"logged {_date(first)} to {_date(last)}" if math.isfinite(first + last) else ""


def _date(seconds: float) -> str:
    """``seconds`` since 1970."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _figures(run: RunLog) -> list[Figure]:
    last, summary = run.entries[-1], run.summary or {}
    figures = [
        Figure("epochs", f"{last.number('epoch'):.2f}", f"{last.step:,} steps"),
        Figure(
            "loss",
            _text("{:.4f}", last.number("loss")),
            f"{_text('{:.4f}', run.entries[0].number('loss'))} at step {run.entries[0].step:,}",
        ),
        Figure("target cosine", _text("{:.3f}", last.number("target_cosine")), "of embedding and own class center"),
    ]
    for name, key in (("accuracy on {}", "pair_sets"), ("mean weights on {}", "pair_sets_ema")):
        for pair_set, pairs in summary.get(key, {}).items():
            note = f"std {100 * pairs['std']:.2f}, {pairs['count']:,} pairs"
            figures.append(Figure(name.format(pair_set), f"{100 * pairs['accuracy']:.2f} %", note))
    speed, trained = summary.get("images_per_second"), summary.get("training_seconds")
    if speed is None:  # not complete: the mean of all windows
        images = sum(entry.number("images") for entry in run.entries)
        trained = sum(entry.number("images") / entry.number("images_per_second") for entry in run.entries)
        speed = images / trained
    figures.append(Figure("images per second", f"{speed:,.0f}", f"{format_seconds(trained)} of training"))
    if math.isfinite(last.utilization):
        figures.append(Figure("MFU", f"{last.utilization:.0%}", "in the last window"))
    figures.append(Figure("skipped steps", f"{run.skipped_steps:,}"))
    seen = "" if math.isfinite(last.number("restarts")) else "restarts or rollbacks that the log shows"
    figures.append(Figure("restarts", f"{run.restarts:,}", seen))
    damaged = last.number("bad_records")
    if damaged:
        figures.append(Figure("damaged records", _text("{:,.0f}", damaged), "met by rank 0"))
    return figures


def _text(form: str, value: float) -> str:
    return form.format(value) if math.isfinite(value) else "not finite"


def _legend(run: RunLog) -> str:
    marks = ["Bands are stages"]
    if run.checkpoints:
        marks.append("triangles checkpoints")
    if run.skipped:
        marks.append("crosses skipped steps, those included that were taken again later")
    if run.setbacks:
        marks.append("dashed lines where the run stopped or was rolled back and went on from an earlier step")
    width = smoothing(len(run.entries))
    smooth = "" if width == 1 else f" Faint: as logged; solid: the mean of {width} windows around."
    return f"{', '.join(marks)}. Points are means over the log window that ends at their step.{smooth}"


def _stages(run: RunLog) -> Table:
    rows = []
    losses = (run.summary or {}).get("stage_losses", {})
    for span in run.stages:
        inside = [entry for entry in run.entries if span.start < entry.step <= span.stop]
        start, end = losses.get(span.name, {"start": inside[0].number("loss"), "end": inside[-1].number("loss")}).values()
        speed = sorted(entry.number("images_per_second") for entry in inside)[len(inside) // 2]
        seconds = sum(entry.number("images") / entry.number("images_per_second") for entry in inside)
        cells = [f"{start:.4f}", f"{end:.4f}", f"{inside[-1].number('target_cosine'):.3f}", f"{speed:,.0f}", format_seconds(seconds)]
        rows.append([span.name, f"{span.start + 1:,} to {span.stop:,}", *cells])
    return Table(
        "Stages", ["stage", "steps, as logged", "loss at the start", "at the end", "target cosine", "images/s, median", "training"], rows
    )


def _checkpoints(run: RunLog) -> Table:
    rows = {}
    for entry in run.entries:
        step = entry.number("checkpoint_step")
        if math.isfinite(step):
            score = entry.number("checkpoint_score")
            waited, written = entry.number("checkpoint_blocked_seconds"), entry.number("checkpoint_write_seconds")
            rows[step] = [f"{step:,.0f}", f"{waited:.2f} s", f"{written:.1f} s", f"{100 * score:.2f} %" if math.isfinite(score) else ""]
    note = f"The last {_ROWS} of {len(rows):,}." if len(rows) > _ROWS else ""
    columns = ["step", "held up training", "written in", "pair accuracy"]
    cells = [rows[step] for step in sorted(rows)][-_ROWS:]
    if not any(row[-1] for row in cells):
        columns, cells = columns[:-1], [row[:-1] for row in cells]
    return Table("Checkpoints", columns, cells, note)


def _skipped(run: RunLog) -> Table:
    rows = []
    for line in run.skipped[-_ROWS:]:
        loss, mean = (line.get(name) for name in ("loss", "running_mean"))
        ranks = ", ".join(map(str, line.get("ranks", [])))
        rows.append([f"{line['step']:,}", line["stage"], line["reason"], *("" if x is None else f"{x:.4f}" for x in (loss, mean)), ranks])
    many = f"The last {_ROWS} of {len(run.skipped):,}. " if len(run.skipped) > _ROWS else ""
    note = f"{many}Their records are in skipped_steps.jsonl."
    return Table("Skipped steps", ["step", "stage", "reason", "loss", "running mean", "ranks not finite"], rows, note)


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 2 something given is wrong (one line on stderr)."""
    parser = argparse.ArgumentParser(
        "train report",
        description="Write report.html, one page on a run, and its curves as curves/*.png, from what lies in the run's output; also while "
        "it trains, or after it was stopped. A run that is complete has written them itself. The page needs no other file and no network.",
    )
    parser.add_argument("run", type=Path, help="output of a run")
    arguments = parser.parse_args(argv)
    try:
        print(write_report(arguments.run))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return _ERROR
    return 0
