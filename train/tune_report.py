"""What ``train tune`` has to say: the ranking, the best settings, why they are, and what to start with them."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_pipeline.output import replace_file
from train.redact import redact
from train.table import table as aligned
from train.tune_process import MEASURED, Outcome
from train.tune_results import Ranked, Results
from train.tune_settings import ON_OFF, Settings, Workload

BEST_CONFIG, BEST_TEXT = "best_ds_config.json", "best.txt"


def measured_text(outcome: Outcome) -> str:
    """One trial in a line."""
    if outcome.status != MEASURED:
        return f"{outcome.status}: {outcome.reason}"
    return f"{_speed(outcome.images_per_second, outcome.median)}, {_gib(outcome.peak_bytes)}"


def table(workload: Workload, results: Results) -> str:
    """The ranking, fastest first, and what was not measured, with reasons."""
    rows = [
        ("", "micro-batch", "accum", "ZeRO", "precision", "checkpointing", "overlap", "images/s", "lowest to highest", "memory", "trials")
    ]
    ranking = results.ranking()
    for place, entry in enumerate(ranking, 1):
        settings = entry.settings
        rows.append(
            (
                f"{place}{'=' if place > 1 and entry.within_noise_of(ranking[0]) else ''}",
                f"{settings.micro_batch_size}",
                f"{workload.grad_accum_steps(settings)}",
                f"{settings.zero_stage}",
                settings.precision,
                ON_OFF[settings.checkpointing],
                ON_OFF[settings.overlap],
                f"{entry.median:,.1f}",
                f"{min(entry.windows):,.1f} to {max(entry.windows):,.1f}",
                _gib(entry.peak_bytes),
                f"{entry.trials}",
            )
        )
    lines = aligned(rows, str.rjust)
    if any(entry.within_noise_of(ranking[0]) for entry in ranking[1:]):
        lines.append("=: within noise of the first: the ranges of their windows overlap")
    return "\n".join([*lines, *_not_measured(results)])


def write_best(workload: Workload, results: Results, folder: Path, command_overrides: Sequence[str]) -> str:
    """Write the JSON of the best settings and why they are it to ``folder``; returns the latter.

    ``command_overrides``: the user's, for the command to start.
    """
    best, *others = results.ranking()
    replace_file(folder / BEST_CONFIG, json.dumps(redact(workload.deepspeed_config(best.settings)), indent=2) + "\n")
    command = ["deepspeed", "--num_gpus", str(workload.world_size), "--module", "train", "--config", str(workload.recipe)]
    command += ["--deepspeed_config", str(folder / BEST_CONFIG), *map(redact, command_overrides), *workload.changes(best.settings)]
    text = "\n".join([*_why(workload, best, others), "", "to train with them:", "", shlex.join(command)])
    replace_file(folder / BEST_TEXT, f"{text}\n")
    return text


def _why(workload: Workload, best: Ranked, others: Sequence[Ranked]) -> Iterator[str]:
    settings, cfg = best.settings, workload.cfg
    yield f"best: {settings}"
    windows = f"{len(best.windows)} windows of {workload.window_steps} steps, {best.trials} trials"
    yield f"  {_speed(best.windows, best.median)}, median of {windows}; at most {_gib(best.peak_bytes)} on a rank"
    if others:
        second = others[0]
        yield f"  runner-up: {second.settings}: {_speed(second.windows, second.median)}, {_gib(second.peak_bytes)}"
        if min(len(best.windows), len(second.windows)) == 1:
            yield "  a single window does not tell how much they vary, so neither whether the two are within noise"
        elif second.within_noise_of(best):
            equal = [best, *(entry for entry in others if entry.within_noise_of(best))]
            smallest = min(equal, key=lambda entry: entry.peak_bytes)
            yield (
                f"  within noise: the windows of {len(equal)} settings overlap those of the fastest, so which of them is faster is not "
                f"known; least memory of these takes {smallest.settings} ({_gib(smallest.peak_bytes)})"
            )
        else:
            yield f"  that is {best.median / second.median - 1:.1%} above it, and no two windows of the two overlap"
    stage, batch = cfg.stages[workload.stage], cfg.stage_batch(workload.stage)
    accumulation = workload.grad_accum_steps(settings)
    yield (
        f"  measured in stage {stage.name} of {workload.recipe} on {workload.world_size} ranks ({workload.device_type}); global batch "
        f"{workload.global_batch_size:,} = {settings.micro_batch_size} x {accumulation} x {workload.world_size}, as in the recipe"
    )
    if settings.micro_batch_size != batch.micro_batch_size:
        yield (
            f"  the recipe has a micro-batch of {batch.micro_batch_size}; another one trains otherwise: the head's loss is over "
            f"{settings.micro_batch_size * workload.world_size} images at a time, BatchNorm's statistics over {settings.micro_batch_size}"
        )
    if settings.precision != workload.given.precision:
        yield f"  the JSON given has {workload.given.precision}: another precision also trains otherwise"


def _not_measured(results: Results) -> Iterator[str]:
    """Settings by status and reason; of a reason that several share, how many."""
    shared: dict[tuple[str, str], list[Settings]] = {}
    for (settings, _), outcome in results.rows.items():
        if outcome.status != MEASURED:
            shared.setdefault((outcome.status, outcome.reason), []).append(settings)
    for (status, reason), those in shared.items():
        whose = str(those[0]) if len(those) == 1 else f"{len(those)} settings ({those[0]}; ...)"
        yield f"{status}: {whose}: {reason}"


def counts(results: Results) -> str:
    """``12 measured, 3 refused``."""
    found = Counter(outcome.status for outcome in results.rows.values())
    return ", ".join(f"{number} {status}" for status, number in found.items()) or "nothing yet"


def _speed(windows: Sequence[float], median: float) -> str:
    return f"{median:,.1f} images/s ({min(windows):,.1f} to {max(windows):,.1f})"


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
