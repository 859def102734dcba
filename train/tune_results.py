"""What ``train tune`` has measured so far: a CSV that a sweep goes on from, the ranking, and what can be told apart in it."""

from __future__ import annotations

import csv
import io
import json
import statistics
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.output import replace_file
from train.document import ConfigError
from train.tune_process import MEASURED, Outcome
from train.tune_settings import ON_OFF, Settings

FIELDS = (
    "micro_batch_size", "zero_stage", "precision", "activation_checkpointing", "overlap_comm", "repeat", "status", "images_per_second",
    "windows", "peak_bytes", "seconds", "reason",
)  # fmt: skip


@dataclass(frozen=True)
class Ranked:
    """Settings, and all that their trials measured."""

    settings: Settings
    windows: tuple[float, ...]  # images per second
    trials: int
    peak_bytes: int

    @property
    def median(self) -> float:
        """Images per second."""
        return statistics.median(self.windows)

    def within_noise_of(self, other: Ranked) -> bool:
        """Whether the slowest and the fastest window of the one leave room for those of the other."""
        return min(self.windows) <= max(other.windows) and min(other.windows) <= max(self.windows)


class Results:
    """The rows of ``results.csv``, one a trial, written as they come; ``windows`` are the images per second of each."""

    def __init__(self, folder: Path, sweep: dict) -> None:
        """Open those in ``folder``. ``sweep``: what all of them have in common, as JSON values.

        Raises: ConfigError if the folder holds the results of another sweep; OSError.
        """
        self.path = folder / "results.csv"
        self.rows: dict[tuple[Settings, int], Outcome] = {}  # by repeat: 0 for the sweep itself
        self._same_sweep(folder / "sweep.json", json.loads(json.dumps(sweep)))
        if self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = dict(map(_from_row, csv.DictReader(file)))

    def add(self, settings: Settings, repeat: int, outcome: Outcome) -> None:
        """On the disk when this returns."""
        self.rows[settings, repeat] = outcome
        text = io.StringIO(newline="")
        table = csv.DictWriter(text, FIELDS, lineterminator="\n")
        table.writeheader()
        table.writerows(_to_row(*key, outcome) for key, outcome in self.rows.items())
        replace_file(self.path, text.getvalue())

    def ranking(self, *, repeats: bool = True) -> list[Ranked]:
        """Fastest first; before all others those that were measured again, for which ``repeats`` counts.

        These were the fastest of the sweep. A machine that has become slower since would else put them behind others.
        """
        measured: dict[Settings, list[Outcome]] = {}
        for (settings, repeat), outcome in self.rows.items():
            if outcome.status == MEASURED and (repeats or not repeat):
                measured.setdefault(settings, []).append(outcome)
        ranked = [
            Ranked(
                settings,
                tuple(window for outcome in outcomes for window in outcome.images_per_second),
                len(outcomes),
                max(outcome.peak_bytes for outcome in outcomes),
            )
            for settings, outcomes in measured.items()
        ]
        return sorted(ranked, key=lambda entry: (-entry.trials, -entry.median))

    def _same_sweep(self, path: Path, sweep: dict) -> None:
        if not path.exists():
            replace_file(path, json.dumps(sweep, indent=1) + "\n")
            return
        found = json.loads(path.read_text())
        other = [key for key in sweep if sweep[key] != found.get(key)]
        if other:
            raise ConfigError(
                f"{path}: this folder holds a sweep of another {', '.join(other)}; give --output another folder, or remove this one"
            )


def _to_row(settings: Settings, repeat: int, outcome: Outcome) -> dict[str, object]:
    measured = outcome.status == MEASURED
    values = (
        *(settings.micro_batch_size, settings.zero_stage, settings.precision, ON_OFF[settings.checkpointing], ON_OFF[settings.overlap]),
        *(repeat, outcome.status, f"{outcome.median:.2f}" if measured else ""),
        *(" ".join(f"{window:.2f}" for window in outcome.images_per_second), outcome.peak_bytes if measured else ""),
        *(f"{outcome.seconds:.1f}", outcome.reason),
    )
    return dict(zip(FIELDS, values, strict=True))


def _from_row(row: dict[str, str]) -> tuple[tuple[Settings, int], Outcome]:
    settings = Settings(
        int(row["micro_batch_size"]),
        int(row["zero_stage"]),
        row["precision"],
        row["activation_checkpointing"] == ON_OFF[True],
        row["overlap_comm"] == ON_OFF[True],
    )
    windows = tuple(map(float, row["windows"].split()))
    peak = int(row["peak_bytes"]) if row["peak_bytes"] else None
    return (settings, int(row["repeat"])), Outcome(row["status"], row["reason"], windows, peak, float(row["seconds"]))
