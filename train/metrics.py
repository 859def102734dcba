"""The metrics of a run for Prometheus, one exporter per rank, and for ``metrics.jsonl`` on rank 0. What they are: train.metric_table.

Prometheus scrapes ``http://host:port + local_rank/metrics``; which rank that is comes from its service discovery, so no series carries
a rank: ``prometheus_targets.json`` in the output says it, in Prometheus' file_sd format.
"""

from __future__ import annotations

import errno
import json
import logging
import math
import ssl
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from train.config import MetricsConfig
from train.document import ConfigError
from train.metric_table import TABLE, Histogram, MetricSpec, StepRecord

PORTS_TO_TRY = 64
LOG, TARGETS = "metrics.jsonl", "prometheus_targets.json"  # in the output
Value = float | Mapping[str | tuple[str, ...], float] | Histogram  # of a series; of its series by label


@dataclass(frozen=True)
class BuildInfo:
    """Labels of lvface_build_info."""

    world_size: int
    zero_stage: int
    precision: str


class Metrics:
    """Publishes StepRecords: to Prometheus from every rank, to a JSON-lines file from rank 0.

    Args:
        jsonl_path: appended to; None: no file.
        config: where to listen; this rank takes ``port + local_rank``, or the next free port (with a warning). port 0: no exporter.
        live: what is read at a scrape and not from records, by metric; called in the exporter's thread.
    Attributes: ``port``, where the exporter listens, or None; ``last``, the record that the file ends with, as JSON values, or None;
        ``problem``, why the file could not be written at the last step; what is missing in it follows at the next.
    Raises: ConfigError when the address cannot be listened on, or a file of metrics.tls cannot be used.
    """

    def __init__(
        self,
        jsonl_path: Path | None,
        config: MetricsConfig,
        rank: int,
        local_rank: int,
        build: BuildInfo,
        live: Callable[[], Mapping[str, Value]] = dict,
    ) -> None:
        self._exported, self._path = _Exported(build, live), jsonl_path
        self._file, self.last = None, None
        if jsonl_path is not None and rank == 0:
            self._file, self.last = _open_for_append(jsonl_path)
        self._server: Any = None
        self.problem: str | None = None
        self.port: int | None = None
        if config.port:
            registry = CollectorRegistry()
            registry.register(self._exported)
            ProcessCollector(registry=registry)
            self._server, self._thread, self.port = _serve(registry, config, config.port + local_rank)

    def record_step(self, record: StepRecord) -> None:
        """Publish one log window. A number that is not finite becomes null in the file; Prometheus takes it as it is."""
        self._exported.update(record)
        if self._file is not None:
            line = {"time": time.time(), **finite_or_null(asdict(record))}  # time: seconds since 1970
            try:
                self._file.write(json.dumps(line, allow_nan=False) + "\n")
                self._file.flush()
                self.problem = None
            except OSError as error:
                self.problem = f"{self._path}: cannot be written ({error.strerror}); make that possible, and start again"

    def collect(self) -> Iterable[Metric]:
        """The present values, as Prometheus would be given them."""
        return self._exported.collect()

    def require_written(self) -> None:
        """Raises OSError unless the file holds every record."""
        if self.problem:
            raise OSError(self.problem)

    def close(self) -> None:
        """Stop the exporter, free its port, close the file. A second call does nothing."""
        if self._server is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None
        if self._file is not None:
            self._file.close()
            self._file = None


class _Exported:
    """The present values, as a prometheus_client collector. A scrape sees one record whole, never half of the next."""

    def __init__(self, build: BuildInfo, live: Callable[[], Mapping[str, Value]]) -> None:
        labels = {field.name: str(getattr(build, field.name)) for field in fields(build)}
        self._build = GaugeMetricFamily("lvface_build_info", "Always 1; what this process runs [1]", labels=list(labels))
        self._build.add_metric(list(labels.values()), 1.0)
        self._live = live
        self._values: dict[str, Value] = {spec.name: 0.0 for spec in TABLE if spec.kind == "counter" and not spec.label}

    def update(self, record: StepRecord) -> None:
        values = dict(self._values)
        for spec in TABLE:
            if spec.field:
                value = getattr(record, spec.field)
                values[spec.name] = value if spec.kind == "gauge" else _sum(values.get(spec.name), value)
        self._values = values

    def collect(self) -> Iterable[Metric]:
        values = {**self._values, **self._live()}
        yield self._build
        for spec in TABLE:
            if spec.name in values:
                yield _family(spec, values[spec.name])


def _sum(before: Value | None, more: Value) -> Value:
    if before is None:
        return more
    if isinstance(more, Mapping):
        return {key: before.get(key, 0.0) + more.get(key, 0.0) for key in {**before, **more}}
    return before + more


def _family(spec: MetricSpec, value: Value) -> Metric:
    help_text = f"{spec.meaning} [{spec.unit}]"
    if spec.kind == "histogram":
        family = HistogramMetricFamily(spec.name, help_text)
        edges = [*map(str, spec.edges), "+Inf"]
        family.add_metric([], list(zip(edges, accumulate(value.counts), strict=True)), sum_value=value.total)
        return family
    family = (CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily)(spec.name, help_text, labels=spec.labels or None)
    for label, one in (value if spec.label else {(): value}).items():
        family.add_metric([label] if isinstance(label, str) else label, one)
    return family


def _serve(registry: CollectorRegistry, config: MetricsConfig, wanted: int) -> tuple[Any, Any, int]:
    tls = config.tls
    options = {} if tls is None else {"certfile": str(tls.certificate), "keyfile": str(tls.key)}
    if tls is not None and tls.client_ca is not None:
        options |= {"client_cafile": str(tls.client_ca), "client_auth_required": True}
    for port in range(wanted, min(wanted + PORTS_TO_TRY, 65536)):
        try:
            server, thread = start_http_server(port, addr=config.host, registry=registry, **options)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                continue
            if isinstance(error, ssl.SSLError | FileNotFoundError):
                raise ConfigError(
                    f"metrics.tls: {error}: certificate, key and client_ca are PEM files, the key fits the certificate"
                ) from None
            raise ConfigError(f"metrics.host, metrics.port: cannot listen on {config.host}:{port}: {error.strerror}") from None
        if port != wanted:
            logging.getLogger(__name__).warning("port %d is taken: metrics are at %s", wanted, url(config, port))
        return server, thread, port
    raise ConfigError(
        f"metrics.port: no free port on {config.host} among the {PORTS_TO_TRY} from {wanted}; choose another, or 0 for no exporter"
    )


def url(config: MetricsConfig, port: int) -> str:
    return f"http{'s' if config.tls else ''}://{config.host}:{port}/metrics"


def targets(config: MetricsConfig, run: str, nodes: Sequence[str], ports: Sequence[int]) -> list[dict[str, Any]]:
    """For Prometheus' file_sd: where each rank is found, with the labels ``run``, ``rank`` and ``node``. By rank: host names, ports."""
    everywhere = config.host in ("0.0.0.0", "::")
    scheme = {"__scheme__": "https"} if config.tls else {}
    return [
        {"targets": [f"{node if everywhere else config.host}:{port}"], "labels": {"run": run, "rank": str(rank), "node": node, **scheme}}
        for rank, (node, port) in enumerate(zip(nodes, ports, strict=True))
    ]


def _open_for_append(path: Path) -> tuple[TextIO, dict[str, Any] | None]:
    """Open for appending; of a line that a killed run or a full disk has torn nothing stays. Returns the file and its last record."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        end = _line_start(file, file.tell())
        file.truncate(end)
        start = _line_start(file, end - 1)
        file.seek(start)
        last = file.read(end - start)
    try:
        record = json.loads(last) if last else None
    except ValueError:
        raise ConfigError(f"{path}: its last line is no JSON; mend or remove the file") from None
    return path.open("a", encoding="utf-8"), record


def _line_start(file: BinaryIO, end: int) -> int:
    """Of the line that ``end`` lies in."""
    while end > 0 and (file.seek(end - 1), file.read(1))[1] != b"\n":
        end -= 1
    return max(end, 0)


def finite_or_null(value: Any) -> Any:
    """``value`` for JSON: in it and the mappings inside it None for every number that is not finite."""
    if isinstance(value, Mapping):
        return {key: finite_or_null(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
