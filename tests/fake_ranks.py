"""Exporters of a run that never took place: every metric that ranks serve, with made-up values that move from scrape to scrape."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

PHASES = ("start", "data", "head", "forward", "backward", "optimizer", "checkpoint", "loop", "end")


class Fake(NamedTuple):
    """A metric. ``values``: by label, of a histogram by upper edge; counters and histograms have that times the number of the scrape."""

    kind: Literal["counter", "gauge", "histogram"]
    values: Mapping[str, float]
    label: str = ""
    first_rank_only: bool = False


def _gauge(value: float, first_rank_only: bool = False) -> Fake:
    return Fake("gauge", {"": value}, "", first_rank_only)


def metrics(now: float, scrape: int) -> dict[str, Fake]:
    """Name -> metric, all but lvface_build_info. ``now``: Unix time; ``scrape``: how many there have been."""
    return {
        "lvface_step": _gauge(100 + scrape),
        "lvface_target_steps": _gauge(370),
        "lvface_epoch": _gauge(1.5),
        "lvface_stage": Fake("gauge", {"early": 0}, "name"),
        "lvface_phase": Fake("gauge", dict.fromkeys(PHASES, 0.0) | {"forward": 1.0}, "phase"),
        "lvface_heartbeat_timestamp_seconds": _gauge(now),
        "lvface_restarts": _gauge(1),
        "lvface_remaining_seconds": _gauge(600),
        "lvface_samples_total": Fake("counter", {"": 64}),
        "lvface_steps_total": Fake(
            "counter", {"applied": 10, "spike": 0, "loss_not_finite": 0, "gradient_not_finite": 0, "overflow": 0}, "outcome"
        ),
        "lvface_step_duration_seconds": Fake("histogram", {"0.05": 8, "0.1": 10, "+Inf": 10}),
        "lvface_step_part_seconds_total": Fake(
            "counter",
            {
                "data_wait": 0.01,
                "head": 0.1,
                "forward": 0.2,
                "backward": 0.3,
                "comm": 0.05,
                "optimizer": 0.1,
                "checkpoint": 0.01,
                "other": 0.01,
            },
            "part",
        ),
        "lvface_run_time_seconds_total": Fake(
            "counter", {"start": 0.1, "train": 1, "repeat": 0.1, "skip": 0.1, "checkpoint": 0.1, "evaluate": 0.1}, "kind"
        ),
        "lvface_model_operations_total": Fake("counter", {"": 1e9}),
        "lvface_model_utilization_ratio": _gauge(0.4),
        "lvface_loss": _gauge(12.0),
        "lvface_loss_maximum": _gauge(13.0),
        "lvface_learning_rate": _gauge(1e-3),
        "lvface_gradient_norm": Fake("gauge", {"backbone": 2.0, "head": 0.5}, "group"),
        "lvface_loss_scale": _gauge(1.0),
        "lvface_head_classes": Fake("gauge", {"held": 100, "sampled": 30, "positive": 8}, "kind"),
        "lvface_sample_rate": _gauge(0.3),
        "lvface_target_cosine": _gauge(0.4),
        "lvface_target_cosine_square": _gauge(0.2),
        "lvface_target_cosine_smoothed": _gauge(0.19),
        "lvface_own_center_cosine": Fake("histogram", {"0.0": 4, "0.5": 60, "+Inf": 64}),
        "lvface_hardest_negative_cosine": _gauge(0.2),
        "lvface_center_norm": _gauge(1.0),
        "lvface_expectation_classes": _gauge(90),
        "lvface_expectation_cosine": _gauge(0.5),
        "lvface_center_expectation_cosine": _gauge(0.7),
        "lvface_expectation_drift": _gauge(0.05),
        "lvface_expectation_updates_total": Fake("counter", {"": 8}),
        "lvface_curricular_t": _gauge(0.2),
        "lvface_uniface_bias": _gauge(7.0),
        "lvface_norm_mean": _gauge(20.0),
        "lvface_norm_std": _gauge(3.0),
        "lvface_records_total": Fake("counter", {"read": 64, "replaced": 0}, "outcome"),
        "lvface_record_bytes_total": Fake("counter", {"": 1e6}),
        "lvface_data_queue_batches": _gauge(2),
        "lvface_memory_bytes": Fake("gauge", {"used": 5e10, "peak": 6e10, "total": 8e10}, "kind"),
        "lvface_checkpoint_step": _gauge(100, first_rank_only=True),
        "lvface_checkpoint_timestamp_seconds": _gauge(now - 60, first_rank_only=True),
        "lvface_checkpoint_duration_seconds": _gauge(2.0),
        "lvface_checkpoint_blocked_seconds": _gauge(0.1),
        "lvface_checkpoint_size_bytes": _gauge(1e9, first_rank_only=True),
        "lvface_checkpoint_free_bytes": _gauge(1e12, first_rank_only=True),
        "lvface_evaluation_accuracy_ratio": _gauge(0.97, first_rank_only=True),
        "lvface_evaluation_true_accept_ratio": Fake("gauge", {"0.001": 0.9}, "false_accept_rate", first_rank_only=True),
    }


class FakeRank:
    """The exporter of one rank, on a port of its own, until ``close``."""

    def __init__(self, rank: int) -> None:
        self._rank, self._scrapes = rank, 0
        registry = CollectorRegistry()
        registry.register(self)
        ProcessCollector(registry=registry)
        self._server, self._thread = start_http_server(0, addr="127.0.0.1", registry=registry)
        self.port: int = self._server.server_port

    def collect(self) -> Iterable[Metric]:
        self._scrapes += 1
        build = GaugeMetricFamily("lvface_build_info", "Always 1", labels=["world_size", "zero_stage", "precision"])
        build.add_metric(["2", "1", "bf16"], 1.0)
        yield build
        for name, fake in metrics(time.time(), self._scrapes).items():
            yield self._family(name, fake)

    def _family(self, name: str, fake: Fake) -> Metric:
        if fake.kind == "histogram":
            family = HistogramMetricFamily(name, "Made up")
            family.add_metric([], [(edge, value * self._scrapes) for edge, value in fake.values.items()], sum_value=None)
            return family
        labels = [fake.label] if fake.label else []
        family = (CounterMetricFamily if fake.kind == "counter" else GaugeMetricFamily)(name, "Made up", labels=labels)
        for label, value in fake.values.items():
            if fake.first_rank_only and self._rank:
                value = math.nan
            family.add_metric([label] if labels else [], value * self._scrapes if fake.kind == "counter" else value)
        return family

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def write_targets(output: Path, ranks: list[FakeRank]) -> None:
    """What a run of the ranks writes for Prometheus' service discovery, each on a node of its own."""
    groups = [
        {"targets": [f"127.0.0.1:{fake.port}"], "labels": {"run": output.name, "rank": str(rank), "node": f"node{rank}"}}
        for rank, fake in enumerate(ranks)
    ]
    (output / "prometheus_targets.json").write_text(json.dumps(groups))
