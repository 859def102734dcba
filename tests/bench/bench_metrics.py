"""What the metrics cost a training step, and a scrape.

    python -m tests.bench.bench_metrics
    python -m tests.bench.bench_metrics --model vit_l --images 8

Each thing that a step or a log line does for the metrics alone is timed by itself and counted as often as a step does it, next to a forward
and backward pass of the backbone and the head on one core. Two ways of observing take turns where the head computes either way.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import torch

from model.partial_fc import PartialFC
from model.vit import build_vit
from tests.bench.timing import medians
from tests.training import free_port
from tests.unit.test_metrics import record
from train.config import MetricsConfig
from train.metric_table import StepRecord
from train.metrics import BuildInfo, Metrics
from train.timing import PARTS, PartTimer, RunTime
from train.watchdog import PHASES
from train.window import memory

D, CLASSES = 512, 32_187  # of a rank: 2,059,906 / 64
SPANS = 40  # parts entered in a step: 9 by the loop, the others by collectives
CALLS = 1000  # of what takes microseconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit_t", help="preset of model.vit")
    parser.add_argument("--images", type=int, default=32, help="of a step")
    parser.add_argument("--log-every", type=int, default=MetricsConfig().log_every, help="steps per log line")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="bench_metrics_") as folder:
        metrics = open_metrics(Path(folder))
        report(arguments, metrics)
        metrics.close()
    return 0


def open_metrics(folder: Path) -> Metrics:
    run_time = RunTime()
    live = {
        "lvface_phase": {phase: 0.0 for phase in PHASES},
        "lvface_heartbeat_timestamp_seconds": time.time(),
        "lvface_run_time_seconds_total": run_time.seconds,
    }
    return Metrics(folder / "metrics.jsonl", MetricsConfig(port=free_port()), 0, 0, BuildInfo(64, 1, "bf16"), lambda: live)


def report(arguments: argparse.Namespace, metrics: Metrics) -> None:
    step, full = Step(arguments.model, arguments.images), full_record()
    timer, run_time, cosines = PartTimer("cpu"), RunTime(), torch.rand(arguments.images, dtype=torch.float64)

    def parts() -> None:
        for _ in range(CALLS):
            with timer.part("comm"):
                pass
        timer.restart()

    def often(call):
        return lambda: [call() for _ in range(CALLS)]

    times = medians(
        {
            "step": step,
            "observed": lambda: step.head_alone(True),
            "plain": lambda: step.head_alone(False),
            "parts": parts,
            "lap": often(lambda: run_time.lap("train")),
            "cosines": often(lambda: step.head.observation.note_cosines(cosines, torch.ones(arguments.images, dtype=torch.bool))),
            "statistics": step.head.statistics,
            "memory": often(lambda: memory(torch.device("cpu"))),
            "record": often(lambda: metrics.record_step(full)),
        },
        arguments.repeats,
        "cpu",
    )
    per_step = {
        f"{SPANS} parts": SPANS * times["parts"] / CALLS,
        "use of time": times["lap"] / CALLS,
        "cosines by bucket": times["cosines"] / CALLS,
        "hardest negatives, classes met": max(0.0, times["observed"] - times["plain"]) / arguments.log_every,
        "head's statistics": times["statistics"] / arguments.log_every,
        "memory": times["memory"] / CALLS / arguments.log_every,
        "log line and exporter": times["record"] / CALLS / arguments.log_every,
    }
    print(f"{arguments.model}, {arguments.images} images, {CLASSES:,} classes, a log line every {arguments.log_every} steps, one core")
    print(f"  step                            {times['step']:>10.1f} ms")
    for name, taken in {**per_step, "in all": sum(per_step.values())}.items():
        print(f"  {name:<32}{taken:>10.4f} ms a step{taken / times['step']:>10.4%}")
    begin = time.process_time()
    size = len(scrape(metrics.port))
    for _ in range(20):
        scrape(metrics.port)
    taken = (time.process_time() - begin) / 21
    print(f"scrape: {size:,} bytes and {1e3 * taken:.1f} ms of CPU, both ends; of 64 ranks {64 * size / 1e6:.2f} MB")


class Step:
    """A forward and backward pass of backbone and head; or of the head alone, with and without what a log line asks of it."""

    def __init__(self, model: str, images: int) -> None:
        self.net, self.head = build_vit(model, embedding_size=D), PartialFC(D, CLASSES, 0.1)
        self.images, self.labels = torch.randn(images, 3, 112, 112), torch.randint(0, CLASSES, (images,))
        self.embeddings = torch.randn(images, D, requires_grad=True)

    def __call__(self) -> None:
        self.head(self.net(self.images), self.labels).backward()
        self.head.discard()

    def head_alone(self, observing: bool) -> None:
        self.head.observing = observing
        self.head(self.embeddings, self.labels).backward()
        self.head.observing = False
        self.head.discard()


def full_record() -> StepRecord:
    """With a value for every part."""
    parts = dict.fromkeys(PARTS, 0.1)
    return StepRecord(**{**vars(record()), "part_seconds": parts, "step_seconds": {**parts, "total": 0.8}})


def scrape(port: int) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        return response.read()


if __name__ == "__main__":
    sys.exit(main())
