"""What a run tells its user: the opening lines, a progress line per log window, the summary."""

from __future__ import annotations

import json
import math
import socket
from dataclasses import asdict
from typing import TYPE_CHECKING

from data_pipeline.output import replace_file
from train.metrics import LOG, TARGETS, targets, url
from train.redact import redact
from train.table import format_seconds

if TYPE_CHECKING:
    from train.ds_config import DeepSpeedSummary
    from train.evaluation import Reports
    from train.metric_table import StepRecord
    from train.run import Run
    from train.stages import Stage

RECIPE = "recipe.yaml"  # in the output, as resolved
SUMMARY = "summary.json"  # in the output of a run that is complete, and of no other


def announce(run: Run, ds_config: dict, summary: DeepSpeedSummary) -> None:
    """Write both resolved configs, without secrets, beside the checkpoints, and print what is about to run.

    Collectives: two gathers.
    """
    cfg, ranks, batches = run.cfg, run.ranks, run.batches
    if ranks.is_first:
        (cfg.output / SUMMARY).unlink(missing_ok=True)
        (cfg.output / RECIPE).write_text(cfg.to_yaml())
        (cfg.output / "ds_config.json").write_text(json.dumps(redact(ds_config), indent=1) + "\n")
    parameters = sum(getattr(p, "ds_numel", p.numel()) for p in run.engine.module.parameters())
    ports = ranks.gather(run.metrics.port)
    nodes = ranks.gather(socket.gethostname())
    ranks.say(
        f"{cfg.model.name} ({parameters / 1e6:.2f} M parameters), ZeRO {summary.zero_stage}, {summary.precision}, "
        f"{ranks.world_size} ranks on {ranks.device.type}"
    )
    ranks.say(
        f"{batches.num_images:,} images of {batches.num_classes:,} identities in {cfg.data.path}; global batch "
        f"{run.stages.stage.images_per_step:,}; {run.stages.total_steps:,} steps, {run.stages.stage.steps_per_epoch:,} an epoch"
    )
    if run.metrics.port:
        ranks.say("metrics at " + ", ".join(url(cfg.metrics, port) for port in ports))
    if run.metrics.port and ranks.is_first:
        replace_file(cfg.output / TARGETS, json.dumps(targets(cfg.metrics, cfg.output.name, nodes, ports), indent=1) + "\n")


def stage_line(stage: Stage, start: int, stop: int) -> str:
    """``start``, ``stop``: optimizer steps of the run before it begins, and when it is over at the latest."""
    config = stage.config
    expectation = "updated" if config.update_expectation else "not updated"
    frozen = ", backbone frozen" if config.freeze_backbone else ""
    until = f" or until cos^2 reaches {config.until.target_cosine_square:g}" if config.until else ""
    return (
        f"stage {stage.name}: steps {start + 1} to {stop}{until}, {stage.margin.text()}, sample_rate {config.sample_rate:g}, "
        f"centers {config.centers}, expectation {expectation}, global batch {stage.images_per_step:,}{frozen}"
    )


def progress_line(record: StepRecord, total_steps: int) -> str:
    total, skipped = record.step_seconds.get("total", 0.0), record.steps - record.outcomes["applied"]
    parts = [
        f"step {record.step:>{len(str(total_steps))}}/{total_steps}",
        record.stage_name,
        f"epoch {record.epoch:.2f}",
        f"loss {record.loss:.4f}",
        f"cos {record.target_cosine:.3f}",
        f"lr {record.learning_rate:.2e}",
        "" if math.isnan(record.gradient_norm) else f"|g| {record.gradient_norm:.3g}",
        f"skipped {skipped}" if skipped else "",
        f"{record.images_per_second:,.0f} images/s",
        f"data {record.step_seconds['data_wait'] / total:.0%}" if total else "",
        f"ETA {format_seconds(record.remaining_seconds)}",
    ]
    return "  ".join(part for part in parts if part)


def write_summary(run: Run, pairs: Reports, pairs_ema: Reports) -> None:
    """Print the outcome and write it to ``summary.json`` in the output folder: the mark of a complete run. Rank 0 only.

    Args:
        pairs: of the last weights; empty if nothing was evaluated.
        pairs_ema: of the mean weights; empty also without model.ema_decay.
    """
    cfg, losses = run.cfg, run.losses.summary()
    throughput = run.images_trained / run.seconds_trained if run.seconds_trained else None
    rows = [("throughput", f"{throughput:,.0f} images/s over {run.ranks.world_size} ranks")] if throughput else []
    rows += [("loss", f"{stage}: {start:.4f} at the start, {end:.4f} at the end") for stage, (start, end) in losses.items()]
    for name, reports in (("accuracy", pairs), ("accuracy of the mean weights", pairs_ema)):
        for pair_set, report in reports.items():
            accuracy, source = report.accuracy, run.verification.sets[pair_set].source
            text = f"{100 * accuracy.mean:.2f} % (std {100 * accuracy.std:.2f}) on the {report.num_pairs:,} pairs of {source}"
            rows.append((name, text))
    if run.metrics.port:
        rows.append(("metrics", f"were served at {url(cfg.metrics, run.metrics.port)}"))
    rows += [("log", str(cfg.output / LOG)), ("checkpoint", str(run.checkpoints.last))]
    width = max(len(name) for name, _ in rows)
    run.ranks.say("\n".join(["\ndone", *(f"  {name:<{width}}  {text}" for name, text in rows)]))
    outcome = {
        "steps": run.step,
        "images_per_second": throughput,
        "training_seconds": run.seconds_trained,
        "stage_losses": {stage: {"start": start, "end": end} for stage, (start, end) in losses.items()},
        "pairs": next(iter(_summaries(pairs).values()), None),  # of the first set
        "pair_sets": _summaries(pairs),
        "pair_sets_ema": _summaries(pairs_ema),
        "checkpoint": str(run.checkpoints.last),
        "began_with": run.origin and asdict(run.origin),
    }
    replace_file(cfg.output / SUMMARY, json.dumps(outcome, indent=1) + "\n")


def _summaries(reports: Reports) -> dict[str, dict[str, float]]:
    """By set of pairs."""
    return {
        name: {"accuracy": report.accuracy.mean, "std": report.accuracy.std, "count": report.num_pairs} for name, report in reports.items()
    }
