"""Exporters of a run that never took place: the project's own, with made-up values that move from scrape to scrape."""

from __future__ import annotations

import json
import math
import time
from itertools import count
from pathlib import Path

from data_pipeline.output import replace_file
from tests.training import free_port
from train.config import MetricsConfig
from train.metric_table import TABLE, Histogram
from train.metrics import TARGETS, BuildInfo, Metrics, Value, targets
from train.timing import PARTS, RUN_TIMES
from train.watchdog import PHASES

# Labels of a metric, and what their series are. Of all others there is one series, at 1.
_BY_LABEL = {
    "lvface_stage": {"early": 0.0},
    "lvface_phase": dict.fromkeys(PHASES, 0.0) | {"forward": 1.0},
    "lvface_steps_total": {"applied": 10.0, "spike": 0.0, "loss_not_finite": 0.0, "gradient_not_finite": 0.0, "overflow": 0.0},
    "lvface_step_part_seconds_total": dict.fromkeys(PARTS, 0.01) | {"forward": 0.4},
    "lvface_run_time_seconds_total": dict.fromkeys(RUN_TIMES, 1.0),
    "lvface_gradient_norm": {"backbone": 2.0, "head": 0.5},
    "lvface_head_classes": {"held": 100.0, "sampled": 30.0, "positive": 8.0},
    "lvface_records_total": {"read": 64.0, "replaced": 0.0},
    "lvface_memory_bytes": {"used": 5e10, "peak": 6e10, "total": 8e10},
    "lvface_evaluation_accuracy_ratio": {"lfw": 0.99},
    "lvface_evaluation_true_accept_ratio": {("lfw", "0.001"): 0.9},
}
_FIRST_RANK_ONLY = ("step", "timestamp_seconds", "size_bytes", "free_bytes")  # of lvface_checkpoint_; NaN elsewhere


def values(rank: int, scrape: int) -> dict[str, Value]:
    """What a healthy rank serves at a scrape, by metric; ``scrape``: how many there have been."""
    now = time.time()
    special = {
        "lvface_step": 100.0 + scrape,
        "lvface_heartbeat_timestamp_seconds": now,
        "lvface_checkpoint_timestamp_seconds": now - 60,
        "lvface_checkpoint_size_bytes": 1e9,
        "lvface_checkpoint_free_bytes": 1e12,
    }
    made_up: dict[str, Value] = {}
    for spec in TABLE:
        if spec.name == "lvface_build_info":
            continue  # the exporter's own
        if spec.kind == "histogram":
            made_up[spec.name] = Histogram([scrape] * (len(spec.edges) + 1), float(scrape))
        elif spec.label:
            growth = scrape if spec.kind == "counter" else 1
            made_up[spec.name] = {label: growth * value for label, value in _BY_LABEL[spec.name].items()}
        else:
            made_up[spec.name] = special.get(spec.name, float(scrape) if spec.kind == "counter" else 1.0)
    if rank:
        made_up |= {f"lvface_checkpoint_{name}": math.nan for name in _FIRST_RANK_ONLY}
    return made_up


class FakeRun:
    """``with FakeRun(output, world_size) as run:`` its ranks answer scrapes; :attr:`ranks` are their exporters."""

    def __init__(self, output: Path, world_size: int) -> None:
        self.output = output
        self.ranks = [self._exporter(rank) for rank in range(world_size)]

    def announce(self) -> None:
        """Write what a run of these ranks, each on a node of its own, writes for Prometheus' service discovery."""
        nodes, ports = [f"node{rank}" for rank in range(len(self.ranks))], [rank.port for rank in self.ranks]
        replace_file(self.output / TARGETS, json.dumps(targets(MetricsConfig(), self.output.name, nodes, ports)))

    def __enter__(self) -> FakeRun:
        return self

    def __exit__(self, *_: object) -> None:
        for rank in self.ranks:
            rank.close()

    def _exporter(self, rank: int) -> Metrics:
        scrapes = count(1)
        build = BuildInfo(world_size=2, zero_stage=1, precision="bf16")
        return Metrics(None, MetricsConfig(port=free_port()), rank, 0, build, lambda: values(rank, next(scrapes)))
