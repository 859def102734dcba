"""The metrics as TensorBoard's scalars, under the names that Prometheus knows them by.

Written through tensorboardX, a small package that needs nothing but numpy and protobuf; TensorBoard itself (a web server, with gRPC) is
only needed where somebody looks at them. tensorboardX's SummaryWriter has a thread that a full disk ends, and a queue that then holds up
training for ever; its EventsWriter, which is used here, writes at once or raises.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client.metrics_core import Metric

from train.document import ConfigError

# They say what a process is, or is doing at the moment of a scrape: nothing to draw over steps.
_LEFT_OUT = ("_info", "_phase", "_timestamp_seconds")


def require_tensorboard() -> None:
    """Raises: ConfigError if tensorboardX cannot be imported."""
    try:
        import tensorboardX  # noqa: F401 - imported for a run that asks for it, and no other
    except ImportError as error:
        raise ConfigError(
            f"metrics.tensorboard: true needs the package tensorboardX ({error}); pip install -r requirements.txt, or set it to false"
        ) from None


class TensorBoard:
    """An event file of this process in a run's folder of them. A label's value follows the metric's name: ``lvface_gradient_norm/head``.

    A file that cannot be written to is told once, and no more is written: the run goes on.
    """

    def __init__(self, folder: Path, step: int, say: Callable[[str], None]) -> None:
        """
        Args:
            folder: made if there is none.
            step: optimizer steps that the run has taken. What others have written of later ones is forgotten.
            say: prints a line.
        Raises: OSError if the file cannot be made.
        """
        from tensorboardX.event_file_writer import EventsWriter

        self._folder, self._say = folder, say
        folder.mkdir(parents=True, exist_ok=True)
        # It names files by the second and overwrites; TensorBoard reads them in the order of their names.
        self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self.go_back(step)  # the first process too: a reader takes the first such event for the start of the run

    def record(self, step: int, metrics: Iterable[Metric]) -> None:
        """The values at ``step``, on the disk when it returns. Of those that are not finite there is no point in the curve."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        self._write(
            Event(
                wall_time=time.time(),
                step=step,
                summary=Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in _scalars(metrics)]),
            )
        )

    def go_back(self, step: int) -> None:
        """The run goes on from ``step`` steps taken: TensorBoard forgets what came after, in this file and the ones before."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._write(Event(wall_time=time.time(), step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def close(self) -> None:
        if self._writer:
            self._writer.close()
            self._writer = None

    def _write(self, event) -> None:
        if self._writer is None:
            return
        try:
            self._writer.write_event(event)
            self._writer.flush()
        except OSError as error:
            self._writer = None
            self._say(f"warning: {self._folder}: TensorBoard's events cannot be written ({error.strerror}); the run goes on without them")


def _scalars(metrics: Iterable[Metric]) -> Iterable[tuple[str, float]]:
    """(tag, value); of a histogram nothing."""
    for metric in metrics:
        if metric.type == "histogram" or metric.name.endswith(_LEFT_OUT):
            continue
        for sample in metric.samples:
            if math.isfinite(sample.value):
                yield "/".join([sample.name, *sample.labels.values()]), sample.value
