"""The metrics table, a real exporter scraped over HTTP and HTTPS, the JSON lines."""

import contextlib
import json
import math
import re
import socket
import ssl
import subprocess
import urllib.error
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

import train.metrics
from train.config import ConfigError, MetricsConfig, TlsConfig
from train.metric_table import TABLE, Histogram, StepRecord, metrics_table
from train.metrics import BuildInfo, Metrics, targets

HOST = "127.0.0.1"


def record(**changes) -> StepRecord:
    """Every number finite, and none equal to another of its kind by accident."""
    values = {
        "step": 20, "target_steps": 370, "furthest_step": 25, "epoch": 1.5, "stage": 1, "stage_name": "stable", "restarts": 2,
        "remaining_seconds": 60.0, "images": 640, "samples": 320, "steps": 10, "outcomes": {"applied": 9, "spike": 1},
        "images_per_second": 100.0, "step_seconds": {"forward": 0.3, "other": 0.1, "total": 0.4},
        "part_seconds": {"forward": 3.0, "other": 1.0}, "step_durations": Histogram([0, 0, 0, 0, 1, 9, 0, 0, 0, 0, 0, 0, 0], 4.0),
        "operations": 2e9, "utilization": 0.4, "memory": {"used": 1e9, "peak": 2e9, "total": 3e9}, "sample_rate": 0.5, "loss": 3.25,
        "loss_maximum": 4.5, "target_cosine": 0.4, "target_cosine_square": 0.2, "learning_rate": 1e-3, "gradient_norm": 2.0,
        "head_gradient_norm": 0.5, "loss_scale": 1.0, "head_classes": {"held": 100, "sampled": 50, "positive": 7},
        "own_center_cosines": Histogram([5, *[0] * 11, 315, 0], None),
        "records": {"read": 320, "replaced": 1}, "bad_records": 2, "record_bytes": 10_000,
        "data_queue_batches": 9, "hardest_negative_cosine": 0.35, "center_norm": 1.25, "expectation_updates": 12,
        "target_cosine_smoothed": 0.3, "expectation_cosine": 0.5, "expectation_classes": 9.0, "center_expectation_cosine": 0.8,
        "expectation_drift": 0.01, "curricular_t": 0.2, "uniface_bias": 7.0, "norm_mean": 20.0, "norm_std": 3.0,
        "checkpoint_step": 10.0, "checkpoint_timestamp_seconds": 1.8e9, "checkpoint_blocked_seconds": 0.1,
        "checkpoint_write_seconds": 2.0, "checkpoint_size_bytes": 7e8, "checkpoint_free_bytes": 1e12, "checkpoint_score": 0.9,
        "evaluation_step": 10.0, "evaluation_accuracy": {"lfw": 0.99},
    }  # fmt: skip
    return StepRecord(**{**values, **changes})


LIVE = {
    "lvface_phase": {"data": 1.0, "forward": 0.0},
    "lvface_heartbeat_timestamp_seconds": 1.7e9,
    "lvface_run_time_seconds_total": {"start": 20.0, "train": 300.0},
    "lvface_evaluation_step": 10.0,
    "lvface_evaluation_accuracy_ratio": {"lfw": 0.99},
    "lvface_evaluation_true_accept_ratio": {("lfw", "0.001"): 0.97},
}
# In the file alone.
NOT_EXPORTED = {"images", "steps", "images_per_second", "step_seconds", "furthest_step", "bad_records", "checkpoint_score"}
NOT_EXPORTED |= {"evaluation_step", "evaluation_accuracy"}  # they are read at the scrape


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


@pytest.fixture
def open_metrics(request):
    """Metrics that are closed when the test ends."""

    def build(jsonl_path=None, port=0, rank=0, local_rank=0, **config) -> Metrics:
        build = BuildInfo(world_size=2, zero_stage=1, precision="bf16")
        metrics = Metrics(jsonl_path, MetricsConfig(host=HOST, port=port, **config), rank, local_rank, build, lambda: LIVE)
        request.addfinalizer(metrics.close)
        return metrics

    return build


def scrape(port: int) -> dict[str, list]:
    """Sample name -> samples, as a Prometheus server reads them; those of the process itself left out."""
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=10) as response:
        families = text_string_to_metric_families(response.read().decode())
        samples = [sample for family in families for sample in family.samples if not sample.name.startswith("process_")]
    return {name: [sample for sample in samples if sample.name == name] for name in {sample.name for sample in samples}}


def by_label(samples: list) -> dict[str, float]:
    """Of a metric with one label."""
    return {value: sample.value for sample in samples for value in sample.labels.values()}


def test_names_are_unique_legal_and_in_base_units():
    names = [spec.name for spec in TABLE]
    assert len(set(names)) == len(names)
    for spec in TABLE:
        assert re.fullmatch(r"lvface_[a-z]+(_[a-z]+)*", spec.name)
        assert spec.name.endswith("_total") == (spec.kind == "counter")
        assert bool(spec.edges) == (spec.kind == "histogram")
        assert not re.search(r"_(ms|milliseconds|minutes|hours|percent|kilo\w+|num|avg|max|min|eta)(_|$)", spec.name)
        assert not {"step", "path", "rank"} & set(spec.labels)


def test_every_field_of_a_record_is_exported_once_or_for_the_file_alone():
    derived = {"stage_by_name": ["stage", "stage_name"], "gradient_norms": ["gradient_norm", "head_gradient_norm"]}
    fed = [field for spec in TABLE if spec.field for field in derived.get(spec.field, [spec.field])]
    assert sorted([*fed, *NOT_EXPORTED]) == sorted(StepRecord.__dataclass_fields__)


def test_the_documentation_table_lists_every_metric():
    rows = metrics_table().splitlines()[2:]
    assert len(rows) == len(TABLE)
    assert "| `lvface_samples_total` | counter | images | Images that this rank has trained on |" in rows


def test_a_scrape_shows_every_metric_of_the_table_and_nothing_else(open_metrics):
    metrics = open_metrics(port=free_port())
    metrics.record_step(record())
    samples = scrape(metrics.port)
    series = {spec.name + "_bucket" * (spec.kind == "histogram") for spec in TABLE}
    assert set(samples) == series | {"lvface_step_duration_seconds_count", "lvface_step_duration_seconds_sum"}
    assert samples["lvface_loss"][0].value == 3.25
    assert by_label(samples["lvface_step_part_seconds_total"]) == {"forward": 3.0, "other": 1.0}
    assert by_label(samples["lvface_gradient_norm"]) == {"backbone": 2.0, "head": 0.5}
    assert by_label(samples["lvface_phase"]) == LIVE["lvface_phase"]
    assert samples["lvface_build_info"][0].labels == {"world_size": "2", "zero_stage": "1", "precision": "bf16"}


def test_the_process_is_exported_as_prometheus_does(open_metrics):
    port = open_metrics(port=free_port()).port
    with urllib.request.urlopen(f"http://{HOST}:{port}/metrics", timeout=10) as response:
        names = re.findall(r"^(process_\w+) ", response.read().decode(), re.MULTILINE)
    assert {"process_resident_memory_bytes", "process_start_time_seconds", "process_cpu_seconds_total"} <= set(names)


def test_counters_add_up_while_gauges_replace(open_metrics):
    metrics = open_metrics(port=free_port())
    before = scrape(metrics.port)
    assert before["lvface_samples_total"][0].value == 0
    assert "lvface_loss" not in before
    metrics.record_step(record())
    metrics.record_step(record(loss=2.0, step=30, outcomes={"applied": 10, "overflow": 3}))
    after = scrape(metrics.port)
    assert after["lvface_samples_total"][0].value == 640
    assert by_label(after["lvface_steps_total"]) == {"applied": 19, "spike": 1, "overflow": 3}
    assert by_label(after["lvface_step_part_seconds_total"]) == {"forward": 6.0, "other": 2.0}
    assert after["lvface_loss"][0].value == 2.0
    assert after["lvface_step"][0].value == 30


def test_histograms_are_cumulative_and_add_up(open_metrics):
    metrics = open_metrics(port=free_port())
    metrics.record_step(record())
    metrics.record_step(record())
    samples = scrape(metrics.port)
    buckets = by_label(samples["lvface_step_duration_seconds_bucket"])
    assert (buckets["0.1"], buckets["0.25"], buckets["0.5"], buckets["60.0"], buckets["+Inf"]) == (0, 2, 20, 20, 20)
    assert samples["lvface_step_duration_seconds_count"][0].value == 20
    assert samples["lvface_step_duration_seconds_sum"][0].value == 8.0
    cosines = by_label(samples["lvface_own_center_cosine_bucket"])
    assert (cosines["-0.2"], cosines["0.9"], cosines["1.0"]) == (10, 10, 640)


def test_only_the_current_stage_is_exported(open_metrics):
    metrics = open_metrics(port=free_port())
    metrics.record_step(record(stage=0, stage_name="early"))
    metrics.record_step(record(stage=1, stage_name="stable"))
    (stage,) = scrape(metrics.port)["lvface_stage"]
    assert (stage.labels, stage.value) == ({"name": "stable"}, 1.0)


def test_a_loss_that_is_not_finite_reaches_prometheus_as_it_is(open_metrics):
    metrics = open_metrics(port=free_port())
    metrics.record_step(record(loss=math.nan))
    assert math.isnan(scrape(metrics.port)["lvface_loss"][0].value)


def test_each_local_rank_has_its_own_port(open_metrics, monkeypatch):
    wanted = []

    def listen(port, addr, registry):
        wanted.append(port)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(train.metrics, "start_http_server", listen)
    with pytest.raises(ConfigError, match=rf"cannot listen on {HOST}:9403: Permission denied"):
        open_metrics(port=9400, local_rank=3)
    assert wanted == [9403]


def test_an_occupied_port_is_passed_over_with_a_warning_that_names_the_port_used(open_metrics, caplog):
    with socket.socket() as squatter:
        squatter.bind((HOST, 0))
        squatter.listen()
        taken = squatter.getsockname()[1]
        metrics = open_metrics(port=taken)
        assert taken < metrics.port < taken + train.metrics.PORTS_TO_TRY
        assert f"port {taken} is taken: metrics are at http://{HOST}:{metrics.port}/metrics" in caplog.text
        assert "lvface_build_info" in scrape(metrics.port)


def test_no_free_port_at_all_is_an_error(open_metrics, monkeypatch):
    monkeypatch.setattr(train.metrics, "PORTS_TO_TRY", 1)
    with socket.socket() as squatter:
        squatter.bind((HOST, 0))
        squatter.listen()
        with pytest.raises(ConfigError, match=r"metrics\.port: no free port"):
            open_metrics(port=squatter.getsockname()[1])


def test_port_zero_means_no_exporter(open_metrics):
    assert open_metrics(port=0).port is None


def test_close_frees_the_port_and_may_be_called_twice(open_metrics):
    metrics = open_metrics(port=free_port())
    metrics.close()
    metrics.close()
    with pytest.raises(urllib.error.URLError):
        scrape(metrics.port)
    assert open_metrics(port=metrics.port).port == metrics.port


def test_one_json_line_per_record_is_on_disk_at_once_with_null_for_what_is_not_finite(open_metrics, tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    metrics = open_metrics(path)
    metrics.record_step(record())
    metrics.record_step(record(loss=math.nan, gradient_norm=math.inf, step_seconds={"total": math.nan}))
    first, second = (json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines())  # before close
    assert first.pop("time") <= second["time"]
    assert first == json.loads(json.dumps(asdict(record())))
    assert (second["loss"], second["gradient_norm"], second["step_seconds"]) == (None, None, {"total": None})


@pytest.mark.parametrize("whole", ["", '{"step": 1}\n'])
@pytest.mark.parametrize("torn", ["", '{"ste'])
def test_the_file_is_appended_to_and_a_torn_last_line_goes(whole, torn, open_metrics, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(whole + torn)
    open_metrics(path).record_step(record())
    lines = path.read_text().splitlines()
    assert lines[:-1] == whole.splitlines()
    assert json.loads(lines[-1])["step"] == 20


def test_a_line_that_cannot_be_written_is_a_problem_until_it_could_be(open_metrics, tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = open_metrics(path)
    metrics.record_step(record())
    file = metrics._file
    with contextlib.suppress(OSError), open("/dev/full", "w") as metrics._file:
        metrics.record_step(record())
    with pytest.raises(OSError, match=rf"^{path}: cannot be written \(No space left on device\)"):
        metrics.require_written()
    metrics._file = file
    metrics.record_step(record())
    metrics.require_written()


def test_the_last_record_of_the_file_is_read_again(open_metrics, tmp_path):
    path = tmp_path / "metrics.jsonl"
    first = open_metrics(path)
    assert first.last is None
    first.record_step(record(step=10))
    first.record_step(record(step=20, restarts=3))
    with path.open("a") as file:
        file.write('{"step": 3')
    assert (open_metrics(path).last["step"], open_metrics(path).last["restarts"]) == (20, 3)
    path.write_text('{"step": 1}\nno JSON\n')
    with pytest.raises(ConfigError, match=rf"{path}: its last line is no JSON"):
        open_metrics(path)


def test_other_ranks_write_no_file(open_metrics, tmp_path):
    open_metrics(tmp_path / "metrics.jsonl", rank=1).record_step(record())
    assert list(tmp_path.iterdir()) == []


def test_the_readme_shows_the_table_as_it_is():
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    assert metrics_table() in readme


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> Path:
    """A folder with cert.pem and key.pem for 127.0.0.1."""
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=test"]
    command += ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", folder / "key.pem", "-out", folder / "cert.pem"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here: no certificate could be made, and TLS was not tried")
    return folder


def test_tls_answers_those_that_trust_its_certificate(open_metrics, certificate):
    tls = TlsConfig(certificate=certificate / "cert.pem", key=certificate / "key.pem")
    port = open_metrics(port=free_port(), tls=tls).port
    context = ssl.create_default_context(cafile=certificate / "cert.pem")
    with urllib.request.urlopen(f"https://{HOST}:{port}/metrics", timeout=10, context=context) as response:
        assert "lvface_build_info{" in response.read().decode()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"https://{HOST}:{port}/metrics", timeout=10)


def test_with_a_client_ca_a_client_needs_a_certificate(open_metrics, certificate):
    tls = TlsConfig(certificate=certificate / "cert.pem", key=certificate / "key.pem", client_ca=certificate / "cert.pem")
    port = open_metrics(port=free_port(), tls=tls).port
    context = ssl.create_default_context(cafile=certificate / "cert.pem")
    with pytest.raises((urllib.error.URLError, ssl.SSLError, ConnectionError)):
        urllib.request.urlopen(f"https://{HOST}:{port}/metrics", timeout=10, context=context).read()
    context.load_cert_chain(certificate / "cert.pem", certificate / "key.pem")
    with urllib.request.urlopen(f"https://{HOST}:{port}/metrics", timeout=10, context=context) as response:
        assert response.status == 200


def test_a_certificate_that_is_not_there_is_named(open_metrics, certificate, tmp_path):
    with pytest.raises(ConfigError, match=r"metrics\.tls: .*No such file"):
        open_metrics(port=free_port(), tls=TlsConfig(certificate=tmp_path / "no.pem", key=certificate / "key.pem"))
    with pytest.raises(ConfigError, match=r"metrics\.tls: "):
        open_metrics(port=free_port(), tls=TlsConfig(certificate=certificate / "key.pem", key=certificate / "key.pem"))


def test_targets_name_ranks_and_nodes_where_prometheus_finds_them(certificate):
    here = targets(MetricsConfig(), "run", ["a", "a"], [9400, 9402])
    assert here[1] == {"targets": ["127.0.0.1:9402"], "labels": {"run": "run", "rank": "1", "node": "a"}}
    tls = TlsConfig(certificate=certificate / "cert.pem", key=certificate / "key.pem")
    everywhere = targets(MetricsConfig(host="0.0.0.0", tls=tls), "run", ["a", "b"], [9400, 9400])
    assert everywhere[1] == {"targets": ["b:9400"], "labels": {"run": "run", "rank": "1", "node": "b", "__scheme__": "https"}}
